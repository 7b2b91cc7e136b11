"""All processes that a step has started, whatever group or session they are in and whoever their parent has become."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress

import psutil

MARK = "RETNET_GPU_DAY_STEP"  # in the environment of a step, and so of everything it starts
PATIENCE = 10.0  # seconds that killed processes have to be gone; one in the hands of a driver may take longer


def members(mark: str) -> list[psutil.Process]:
    """Every other process whose environment holds the mark and that is no corpse."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            marked = process.pid != os.getpid() and process.environ().get(MARK) == mark
            if marked and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end(mark: str) -> None:
    """SIGKILL to all of them, the oldest first, which ends a stopped process, too."""
    until = time.monotonic() + PATIENCE
    while (left := members(mark)) and time.monotonic() < until:
        for process in sorted(left, key=lambda process: process.pid):
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)


if __name__ == "__main__":
    end(sys.argv[1])
