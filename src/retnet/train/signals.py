"""Signals that end a run in order: after the step in hand."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGTERM and Ctrl-C, to end after the step in hand; a second one ends at once.

    In another thread than the main one there are none, and who started the thread has to see to them.
    """
    received: list[signal.Signals] = []

    def note(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield received
        return
    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
