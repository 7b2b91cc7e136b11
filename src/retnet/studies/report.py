"""Reports of studies, from their folders: tables on a terminal, one page of HTML, PNG files, and JSON to keep.

A study need not have finished: what failed or was not done yet is named, and the rest is shown.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.console import Console
from rich.markup import escape

from retnet.evals.report import show as show_table
from retnet.evals.report import write
from retnet.io import write_text
from retnet.settings import UserError, dump
from retnet.studies import figures
from retnet.studies.folder import StudyFolder
from retnet.studies.page import jobs_in_words, numeric, page
from retnet.studies.study import Result, Study
from retnet.studies.summary import Summary, Table


class JobState(NamedTuple):
    """How far a job has come."""

    name: str
    state: str  # finished, failed, or begun
    seconds: float | None  # it took, where its result says so


@dataclasses.dataclass(frozen=True)
class Found:
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


def read(out: Path) -> Found:
    """Reads what there is of a study.

    Raises:
        UserError: `out` holds no study, or a file in it is damaged.
    """
    folder = StudyFolder(out)
    study, results, failures = folder.study(), folder.results(), folder.failures()
    jobs = [JobState(name, "finished", _seconds(result)) for name, result in results.items()]
    jobs += [JobState(name, "failed", None) for name in failures]
    jobs += [JobState(name, "begun", None) for name in folder.begun()]
    return Found(
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
    images = [out / f"{figure.name}.png" for figure in found.summary.figures]
    text = page(found)
    write(_record(found), record)
    for figure, image in zip(found.summary.figures, images, strict=True):
        figures.write_png(figure, image)
    try:
        write_text(html, text)
    except OSError as error:
        raise UserError(f"cannot write {html}: {error.strerror}") from None
    return [html, record, *images]


def show(found: Found, console: Console) -> None:
    """Prints findings and tables; what failed goes to standard error."""
    click.echo(found.study.title)
    for sentence in found.summary.findings:
        click.echo(f"* {sentence}")
    for table in found.summary.tables:
        click.echo()
        if not console.is_terminal:
            click.echo(f"# {table.title}")
        words = len(table.columns) - len(list(_trailing_numbers(table)))
        show_table(escape(table.title), table.columns, list(table.rows), words, console)
        for note in table.notes if console.is_terminal else ():
            click.echo(note)
    if found.missing:
        click.echo(f"\n{found.missing}", err=True)
    for name, reason in found.failures.items():
        click.echo(f"{name}: {reason}", err=True)


def _trailing_numbers(table: Table) -> Iterable[int]:
    """Columns of numbers that stand right of all columns of words."""
    for column in reversed(range(1, len(table.columns))):
        if not numeric(row[column] for row in table.rows):
            return
        yield column


def _record(found: Found) -> dict[str, Any]:
    """All there is to keep of a study, as plain JSON; what is no number there (NaN, infinities) is null."""
    study = tomllib.loads(dump(found.study))
    record = {
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
    finite: dict[str, Any] = _finite(record)
    return finite


def _finite(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _seconds(result: Result) -> float | None:
    """What a result says of its time: a number, or parts that add up."""
    said = result.get("seconds")
    parts = list(said.values()) if isinstance(said, dict) else [said]
    known = [float(part) for part in parts if isinstance(part, (int, float))]
    return sum(known) if known else None
