"""Tests are small; one thread each keeps them quick and steady, in the processes they start as well."""

import gc
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests.helpers.forks import Forks

# A shell starts what runs in the background deaf to Ctrl-C, and what that starts; here it is pressed.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure():
    gc.disable()  # modules are no garbage: importing some thousands, the collector would look through all, again and again


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded():
    import torch  # not where pytest distributes tests to others

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def forks():
    """Processes that begin with everything imported: `forks.run(words of retnet, cwd)`."""
    found = Forks()
    yield found
    found.close()
