"""Runs every test in a process of its own: vLLM makes one engine a process on a CPU, and takes half a minute to import."""

import os
import sys
import traceback

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # a process whose threads have worked could not be forked
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
    "0"  # the engine in the test's process: errors arrive as they were raised
)
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    """Forks this process, whose imports are done, for the test's own words."""
    wanted = pyfuncitem._fixtureinfo.argnames
    child = os.fork()
    if not child:
        status = 1
        try:
            pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in wanted})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        pytest.fail("the test's process says why, below", pytrace=False)
    return True
