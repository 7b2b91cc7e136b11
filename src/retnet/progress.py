"""Progress of long work: one live line on a terminal, plain lines elsewhere, so that neither is silent for long."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Live

SECONDS_BETWEEN_LINES = 10.0
REFRESHES = 2.0  # of the live line in a second: few, since the machine is being measured


class Say(Protocol):
    """Where progress goes."""

    def __call__(self, text: str, part: float = 0.0, /) -> None:
        """Tells what begins now, and which part of what belongs together with it is done, from 0 to 1."""


@contextmanager
def shown(console: Console | None = None) -> Iterator[Say]:
    """Shows on this console, standard error where left out, what is said inside the block."""
    console = console or Console(stderr=True, highlight=False)
    if console.is_terminal:
        text = TextColumn("{task.description}", markup=False)
        columns = SpinnerColumn(), TimeElapsedColumn(), BarColumn(20), TimeRemainingColumn(), text
        with Live(*columns, console=console, refresh_per_second=REFRESHES) as live:
            task = live.add_task("starting", total=1.0)
            yield lambda text, part=0.0: live.update(task, description=text, completed=part)
        return
    lines = _Lines(console)
    try:
        yield lines.say
    finally:
        lines.end()


class _Lines:
    """What was said last, whenever it is another than ten seconds before; a thread prints it, however long things take."""

    def __init__(self, console: Console) -> None:
        self._console, self._begin, self._said = console, time.monotonic(), ""
        self._thread, self._ended = threading.Thread(target=self._print, daemon=True), threading.Event()

    def say(self, text: str, part: float = 0.0, /) -> None:
        """Keeps what is said for the thread, which begins with the first of it."""
        self._said = f"{text} ({part:.0%} done)" if part else text
        if not self._thread.ident:
            self._thread.start()

    def end(self) -> None:
        """Nothing more is printed."""
        self._ended.set()
        if self._thread.ident:
            self._thread.join()

    def _print(self) -> None:
        printed = ""
        while True:
            if self._said != printed:
                printed = self._said
                since = timedelta(seconds=int(time.monotonic() - self._begin))
                self._console.print(f"{since} {printed}", markup=False, soft_wrap=True)
            if self._ended.wait(SECONDS_BETWEEN_LINES):
                return
