"""Tests are small; one thread each keeps them quick and steady, in the processes they start as well."""

import gc
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.helpers.forks import shared

# Tests kill processes, never the machine, so nothing that was written can be lost, and waiting for a busy disk took most of
# the time of training a tiny model. Which files are flushed, and when, tests of `flush` say.
os.fsync = os.fstat
# A shell starts what runs in the background deaf to Ctrl-C, and what that starts; here it is pressed.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Files whose tests import transformers (see tests/helpers/lazily.py), which takes seconds: one worker does it.
TRANSFORMERS = (
    "tests/bench/test_measurements", "tests/cli/test_convert", "tests/cli/test_eval", "tests/convert/",
    "tests/engine/test_opening", "tests/evals/", "tests/measure/test_peers", "tests/model/test_hf_",
    "tests/train/test_initial_weights",
)  # fmt: skip


def pytest_configure(config):
    config.option.loadscopereorder = False  # of pytest-xdist: the order below is the one that ends early
    gc.disable()  # modules are no garbage: importing some thousands, the collector would look through all, again and again


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "transformers" if nodeid.startswith(TRANSFORMERS) else super()._split_scope(nodeid)

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)  # before slow ones are deselected: both sets have one order
def pytest_collection_modifyitems(items):
    """What takes longest first: begun last, it would keep one worker busy when the other has nothing to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (not item.nodeid.startswith(TRANSFORMERS), item.path not in slow))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded():
    import torch  # not where pytest distributes tests to others

    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # which notes a stack for each kind of device that may still come: a millisecond
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session")
def forks():
    """Processes that begin with everything imported: `forks.run(words of retnet, cwd)`."""
    return shared()
