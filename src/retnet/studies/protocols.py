"""Protocols of studies: `Measure` turns settings into jobs and their results into a summary; `Job` does one of them.

A `Job` runs in a process of its own and leaves one JSON object behind. Neither knows how jobs are scheduled, repeated or
shown: that is `retnet.studies.runner`. A new measure is one module with one subclass of each, and its line in
`retnet.studies.study`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from retnet.host import keep_freed_memory
from retnet.measure.summary import Summary
from retnet.settings import Choice
from retnet.studies.estimate import RunEstimate
from retnet.train.config import RunConfig
from retnet.train.progress import TrainingProgress
from retnet.train.trainer import train

Result = dict[str, Any]  # what a job leaves behind, plain JSON
Results = Mapping[str, Result]  # name of a finished job → its result
Tell = Callable[[float], None]  # a job's way to say how far it is, 0 to 1


class Job(Choice):
    """One piece of work; a frozen dataclass with a literal ``name`` field."""

    def run(self, folder: Path, tell: Tell) -> Result | None:
        """Does the work, in a process of its own.

        Args:
            folder: of this job alone; what was left there by an interrupted call is continued.
            tell: to be called now and then.

        Returns:
            the result, or None when a signal asked to stop: it will be continued.
        """
        raise NotImplementedError


class Measure(Choice):
    """What a study does; a frozen dataclass with a literal ``name`` field."""

    def check(self) -> None:
        """Says before anything is done what cannot be.

        Raises:
            UserError: what, and what to do.
        """

    def prepare(self, out: Path, say: Callable[[str], None]) -> None:
        """What all jobs need, once, before the first of them."""

    def plans(self) -> list[RunEstimate]:
        """What its training will take, kind by kind; nothing where nothing is trained."""
        return []

    def count(self) -> int:
        """Jobs in all."""
        raise NotImplementedError

    def jobs(self, out: Path, results: Results, failed: Collection[str]) -> dict[str, Job]:
        """Name → job, of all that can be named now: some wait for the results of others. Names are file names.

        Args:
            out: the folder of the study.
            results: of the jobs that have finished.
            failed: names of those that will not.
        """
        raise NotImplementedError

    def summarise(self, results: Results) -> Summary:
        """Tables and figures of what is there; jobs that failed or have not run are missing from `results`."""
        raise NotImplementedError


class StepsTold(TrainingProgress):
    """Tells how far a training is, and shows nothing."""

    def __init__(self, tell: Tell) -> None:
        super().__init__(Console(quiet=True))
        self._tell = tell

    def step(self, step: int, loss: float, rate: float, left: float | None = None) -> None:
        """As of any training."""
        super().step(step, loss, rate, left)
        self._tell(0.95 * step / self._steps)


def trained(config: RunConfig, run: Path, tell: Tell) -> bool:
    """Trains a run, or goes on training it; whether it is finished, and this one of several processes is to measure it."""
    keep_freed_memory()
    outcome = train(config, run, begin="resume-or-start", progress=StepsTold(tell))
    return outcome.finished and not int(os.environ.get("RANK", "0"))


def part_of(tell: Tell, number: int, parts: int) -> Tell:
    """How a job tells how far one of its parts is, of so many that take as long as each other."""
    return lambda done: tell((number + done) / parts)
