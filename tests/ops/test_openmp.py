"""Teams of OpenMP: a thread that has no more work for one can let it go."""

import ctypes
import os
import threading
from pathlib import Path

import pytest

from retnet.ops.cpu import openmp

TASKS = Path("/proc/self/task")


@pytest.mark.skipif(not TASKS.exists() or openmp.parallel() is None, reason="Linux and GNU OpenMP only")
def test_a_released_team_is_gone_and_comes_back():
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
    found = []

    def made():
        before = {*os.listdir(TASKS)}
        openmp.parallel()(ctypes.cast(function, ctypes.c_void_p), None, 2, 0)
        return {*os.listdir(TASKS)} - before

    def work():
        for _ in range(2):
            team = made()
            openmp.release_team()
            found.append((len(team), team & {*os.listdir(TASKS)}))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(1, set())] * 2
