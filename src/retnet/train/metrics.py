"""Metrics of a run: `metrics.jsonl`, and what other trackers are told."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

from retnet.errors import told
from retnet.io import write_bytes
from retnet.train.run_dir import RunDirectory
from retnet.train.trackers import Tracker

_log = logging.getLogger("retnet.train")


class Metrics:
    """`metrics.jsonl`, one object a line, in the order of steps; other trackers hear the same. Closed by ``with``.

    Every line has its step and the seconds that the run has taken up to it, in all calls together.

    Attributes:
        finished: whether the run has taken its last step. Trackers are told at the end, where no error says otherwise.
    """

    def __init__(self, run: RunDirectory, step: int, trackers: Sequence[Tracker] = ()) -> None:
        path = run.path / "metrics.jsonl"
        self._run = run
        with run.writing():
            lines = _until(path, step) if path.is_file() else []
            before = json.loads(lines[-1]).get("seconds", 0.0) if lines else 0.0
            self._began = time.monotonic() - before
            write_bytes(path, b"".join(lines))  # a continued run repeats the steps after its checkpoint
            self._file = path.open("a", encoding="utf-8")
        self._trackers = trackers
        self.finished = False

    def write(self, step: int, **values: float) -> None:
        """Appends what was measured at the end of a step; the line is with the system before this returns.

        Numbers that are not finite, for which JSON has no word, are left out.

        Raises:
            UserError: it cannot be written; says which checkpoint is whole.
        """
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"step": step, "seconds": round(time.monotonic() - self._began, 3), **values}
        with told(f"write {self._file.name}", self._run.whole):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            for tracker in self._trackers:
                tracker.add(step, values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Ends the files.

        Raises:
            UserError: a tracker's, which may keep lines back, cannot be written.
        """
        with ExitStack() as stack:
            for tracker in self._trackers:
                stack.callback(tracker.close, self.finished and error is None)
            with suppress(OSError):  # of a line that could not be written, which was said
                self._file.close()


def _until(path: Path, step: int) -> list[bytes]:
    """The whole lines of steps up to this one. A last line cut short by a crash is left out; other damage is said too."""
    kept, damaged = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            early = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            damaged += line.endswith(b"\n")
            continue
        if early and line.endswith(b"\n"):
            kept.append(line)
    if damaged:
        _log.warning("%s had %d lines that are no metrics; they are left out", path, damaged)
    return kept
