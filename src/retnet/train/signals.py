"""Signals that end a run in order: after the step in hand."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT)
TOGETHER = 5.0  # seconds in which torchrun hands on to its processes what it was told


@contextmanager
def signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGTERM and Ctrl-C, to end after the step in hand; a second one ends at once.

    Under torchrun the same signal may come twice in a moment, which is one: a scheduler may tell every process of a job that
    its time is up, as Slurm does, and torchrun then tells its own processes again.

    In another thread than the main one there are none, and who started the thread has to see to them.
    """
    received: list[signal.Signals] = []
    began = 0.0

    def note(number: int, _: FrameType | None) -> None:
        nonlocal began
        if not received:
            received.append(signal.Signals(number))
            began = time.monotonic()
            return
        twice = number == received[0] and time.monotonic() - began < TOGETHER
        if not (twice and "TORCHELASTIC_RUN_ID" in os.environ):
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield received
        return
    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
