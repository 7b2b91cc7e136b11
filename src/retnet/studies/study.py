"""A study is data: what to measure, with what budget. This is its TOML, and the two contracts that give it meaning.

A `Measure` is what a study does: it turns settings into jobs, and the results of jobs into tables and figures. A `Job` is
one piece of work that runs in a process of its own and leaves one JSON object behind. Neither knows how jobs are
scheduled, repeated or shown: that is `retnet.studies.runner`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from retnet.measure.summary import Summary
from retnet.settings import Choice, UserError, load
from retnet.studies.estimate import Plan

Result = dict[str, Any]  # what a job leaves behind, plain JSON
Results = Mapping[str, Result]  # name of a finished job → its result
Tell = Callable[[float], None]  # a job's way to say how far it is, 0 to 1

# name of a measure → module of `retnet.studies` that defines `MEASURE` and `JOB`
MODULES = {"quality": "quality", "complexity": "complexity", "decoding": "decoding", "training": "training"}


class _Rows(Mapping[str, type]):
    """Name → one attribute of the module of each measure, imported when it is asked for."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def __getitem__(self, name: str) -> type:
        found: type = getattr(import_module(f"retnet.studies.{MODULES[name]}"), self.attribute)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(MODULES)

    def __len__(self) -> int:
        return len(MODULES)


class Job(Choice):
    """One piece of work; a frozen dataclass with a literal ``name`` field."""

    @classmethod
    def options(cls) -> Mapping[str, type]:
        """Name → class, of every row of `MODULES`."""
        return _Rows("JOB")

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

    @classmethod
    def options(cls) -> Mapping[str, type]:
        """Name → class, of every row of `MODULES`."""
        return _Rows("MEASURE")

    def check(self) -> None:
        """Says before anything is done what cannot be.

        Raises:
            UserError: what, and what to do.
        """

    def prepare(self, out: Path, say: Callable[[str], None]) -> None:
        """What all jobs need, once, before the first of them."""

    def plans(self) -> list[Plan]:
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


@dataclass(frozen=True)
class Study:
    """A study, as its TOML says.

    Attributes:
        title: of the report.
        about: what it reproduces and how it differs from the paper, paragraphs divided by empty lines.
        measure: what is done.
        hours: it may take on the machine it runs on; what is expected to take longer is refused before it starts.
        workers: jobs at the same time, each with its share of the cores; 1 wherever time or memory is measured.
        processes: that share one job, started by torchrun, such as the number of GPUs.
    """

    title: str
    about: str
    measure: Measure
    hours: float = 1.0
    workers: int = 1
    processes: int = 1

    def __post_init__(self) -> None:
        for name in ("workers", "processes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.hours <= 0:
            raise UserError(f"hours is {self.hours}; it must be more than 0")


def load_study(path: Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """Reads a study.

    Raises:
        UserError: the file cannot be read or does not say a study.
    """
    return load(Study, path, overrides)
