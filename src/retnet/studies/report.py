"""Reports of studies, from their folders: tables on a terminal, one page of HTML, PNG files, and JSON to keep.

A study need not have finished: what failed or was not done yet is named, and the rest is shown.
"""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.console import Console

from retnet.errors import told
from retnet.io import write_text
from retnet.measure import records
from retnet.measure.summary import Summary
from retnet.settings import dump
from retnet.studies.folder import StudyFolder
from retnet.studies.html_report import html_page, jobs_in_words
from retnet.studies.protocols import Result
from retnet.studies.study import Study
from retnet.tables import print_tables


class JobState(NamedTuple):
    """How far a job has come."""

    name: str
    state: str  # finished, failed, or begun
    seconds: float | None  # it took, where its result says so


@dataclasses.dataclass(frozen=True)
class StudyState:
    """What there is of a study.

    Attributes:
        study: as it was begun.
        summary: of the results there are.
        environment: where and when it ran; empty if that was not kept.
        finished: jobs with a result.
        total: jobs of the whole study.
        failures: name of a job → why it failed.
        jobs: all that left something, by name.
    """

    study: Study
    summary: Summary
    environment: dict[str, Any]
    finished: int
    total: int
    failures: dict[str, str]
    jobs: list[JobState]

    @property
    def missing(self) -> str:
        """What keeps the study from being complete, as a sentence; empty when nothing does."""
        open_ = max(0, self.total - self.finished - len(self.failures))
        parts = [f"{len(self.failures)} failed"] if self.failures else []
        parts += [f"{open_} not done yet"] if open_ else []
        return (
            f"Of {jobs_in_words(self.total)}, {self.finished} finished, {', '.join(parts)}." if parts else ""
        )


def read(out: Path) -> StudyState:
    """Reads what there is of a study.

    Raises:
        UserError: `out` holds no study, or a file in it is damaged.
    """
    folder = StudyFolder(out)
    study, results, failures = folder.study(), folder.results(), folder.failures()
    jobs = [JobState(name, "finished", _seconds(result)) for name, result in results.items()]
    jobs += [JobState(name, "failed", None) for name in failures]
    jobs += [JobState(name, "begun", None) for name in folder.begun()]
    return StudyState(
        study=study,
        summary=study.measure.summarise(results),
        environment=folder.environment(),
        finished=len(results),
        total=study.measure.count(),
        failures=failures,
        jobs=sorted(jobs),
    )


def write_report(out: Path) -> list[Path]:
    """Writes `report.html`, `summary.json` and a PNG file for each figure into a study's folder.

    Returns:
        the files, the page first.

    Raises:
        UserError: `out` holds no study, a file cannot be written, or matplotlib or Jinja is missing.
    """
    found = read(out)
    html, record = out / "report.html", out / "summary.json"
    text = html_page(found)
    files = records.write(_record(found), record, found.summary.figures)
    with told(f"write {html}"):
        write_text(html, text)
    return [html, *files]


def show(found: StudyState, console: Console) -> None:
    """Prints findings and tables; what failed goes to standard error."""
    click.echo(found.study.title)
    for sentence in found.summary.findings:
        click.echo(f"* {sentence}")
    print_tables(found.summary.tables, console)
    if found.missing:
        click.echo(f"\n{found.missing}", err=True)
    for name, reason in found.failures.items():
        click.echo(f"{name}: {reason}", err=True)


def _record(found: StudyState) -> dict[str, Any]:
    """All there is to keep of a study, as plain data."""
    study = tomllib.loads(dump(found.study))
    return {
        "title": study.pop("title"),
        "about": study.pop("about"),
        "settings": study,
        "environment": found.environment,
        "jobs": {
            "total": found.total,
            "finished": found.finished,
            "failures": found.failures,
            "seconds": {job.name: job.seconds for job in found.jobs if job.seconds is not None},
        },
        **dataclasses.asdict(found.summary),
    }


def _seconds(result: Result) -> float | None:
    """What a result says of its time: a number, or parts that add up."""
    said = result.get("seconds")
    parts = list(said.values()) if isinstance(said, dict) else [said]
    known = [float(part) for part in parts if isinstance(part, (int, float))]
    return sum(known) if known else None
