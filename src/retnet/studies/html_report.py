"""A study as one page of HTML that needs nothing else: no scripts, no network; light or dark as the reader likes."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module, resources
from typing import TYPE_CHECKING, Any

from retnet.errors import require_packages
from retnet.measure import figures
from retnet.measure.summary import Summary
from retnet.settings import dump
from retnet.studies.study import Study
from retnet.tables import EMPTY, MISSING, Table

if TYPE_CHECKING:
    from retnet.studies.report import JobState, StudyState

PUBLISHED = "Shaded: published in the paper, not measured here."

_KNOWN = {
    "cpu",
    "gpu",
    "cores",
    "threads",
    "memory_bytes",
    "platform",
    "python",
    "versions",
    "commit",
    "dirty",
}
_KNOWN |= {"started", "finished", "seconds"}


@dataclass(frozen=True)
class Page:
    """What a page shows.

    Attributes:
        title: its heading.
        line: where, when and how far.
        about: paragraphs below.
        alarm: heading of what has to be said first; shown if there is anything `missing`.
        missing: what that is.
        failures: what failed → why.
        chapters: a title and what stands below it; one without a title has a heading for each kind of result instead.
        settings: captions and rows of plain settings.
        lists: settings that are lists of tables.
        machine: names and values.
        jobs: all that was done, with its state and its time.
    """

    title: str
    line: str
    about: Sequence[str]
    alarm: str
    missing: str
    failures: Mapping[str, str]
    chapters: Sequence[tuple[str, Summary]]
    settings: Sequence[tuple[str, list[tuple[str, str]]]]
    lists: Sequence[Table]
    machine: Sequence[tuple[str, str]]
    jobs: Table


def html_page(found: StudyState) -> str:
    """The page of a study.

    Raises:
        UserError: matplotlib or Jinja is missing.
    """
    settings, lists = _settings(found.study)
    return render(
        Page(
            title=found.study.title,
            line=_line(found),
            about=[" ".join(p.split()) for p in re.split(r"\n\s*\n", found.study.about) if p.strip()],
            alarm="This study is not complete",
            missing=found.missing,
            failures=found.failures,
            chapters=[("", found.summary)],
            settings=settings,
            lists=lists,
            machine=machine(found.environment),
            jobs=jobs_table(found.jobs),
        )
    )


def render(page: Page) -> str:
    """A page as HTML.

    Raises:
        UserError: matplotlib or Jinja is missing.
    """
    require_packages("reports need", "study", "jinja2")
    jinja, markup = import_module("jinja2"), import_module("markupsafe").Markup
    source = resources.files("retnet.studies").joinpath("report.html.jinja").read_text(encoding="utf-8")
    text: str = (
        jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined, keep_trailing_newline=True)
        .from_string(source)
        .render(
            title=page.title,
            line=page.line,
            about=page.about,
            alarm=page.alarm,
            missing=page.missing,
            failures=page.failures,
            chapters=[_chapter(n, *chapter, markup) for n, chapter in enumerate(page.chapters)],
            settings=page.settings,
            lists=[_grid(table, results=False) for table in page.lists],
            machine=page.machine,
            jobs=_grid(page.jobs, results=False),
            colors=figures.COLORS,
            ink=(figures.INK, figures.INK_DARK),
        )
    )
    return text


def _chapter(number: int, title: str, summary: Summary, markup: Any) -> dict[str, Any]:  # noqa: ANN401
    """Findings, tables and drawn figures as the template wants them, with names of their own on the page."""
    drawn = []
    for n, figure in enumerate(summary.figures):
        name = f"{number}-{n}"
        svgs = figures.panels_as_svg(figure, f"drawing{name}")
        drawn.append(
            {
                "id": f"figure-{name}",
                "title": _heading(figure.name),
                "panels": [(p.title, markup(svg)) for p, svg in zip(figure.panels, svgs, strict=True)],
                "legend": [(key, markup(svg)) for key, svg in figures.legend_as_svg(figure, f"key{name}")],
                "notes": figure.notes,
            }
        )
    tables = [{"id": f"table-{number}-{n}", **_grid(table)} for n, table in enumerate(summary.tables)]
    return {
        "id": f"chapter-{number}",
        "title": title,
        "findings": summary.findings,
        "tables": tables,
        "figures": drawn,
    }


def _grid(table: Table, results: bool = True) -> dict[str, Any]:
    """A table as the template wants it: every column and row with its CSS classes; of results, what is published apart."""
    kinds, whole = [], _published(table.title)
    for column, right in zip(table.columns, table.numeric(), strict=True):
        kinds.append(
            " ".join(["number"] * right + ["published"] * (results and (whole or _published(column))))
        )
    rows = [
        {
            "name": row[0],
            "published": results and _published(row[0]),
            "cells": list(zip((MISSING if cell in EMPTY else cell for cell in row), kinds, strict=True))[1:],
        }
        for row in table.rows
    ]
    shaded = any("published" in kind for kind in kinds) or any(row["published"] for row in rows)
    return {
        "title": table.title,
        "columns": list(zip(table.columns, kinds, strict=True)),
        "rows": rows,
        "notes": [*table.notes, *([PUBLISHED] if shaded else [])],
    }


def _published(title: str) -> bool:
    """Whether a column or a row of this title, or the whole table, holds the paper's numbers."""
    return re.search(r"^(paper|published)\b|\bpaper$", title.lower()) is not None


def _settings(study: Study) -> tuple[list[tuple[str, list[tuple[str, str]]]], list[Table]]:
    """Every setting but the words: (caption, rows) of plain ones, table by table, and lists of tables each as one."""
    data = tomllib.loads(dump(study))
    measure = data.pop("measure")
    top = {"measure": measure.pop("name"), **data, **measure}
    plain: list[tuple[str, list[tuple[str, str]]]] = []
    lists: list[Table] = []

    def walk(place: str, table: Mapping[str, Any]) -> None:
        rows = [(key, _value(value)) for key, value in table.items() if not _nested(value)]
        plain.extend([(place, rows)] if rows else [])
        for key, value in table.items():
            inner = f"{place}.{key}" if place else key
            if isinstance(value, Mapping):
                walk(inner, value)
            elif _nested(value):
                lists.append(_list(inner, value))

    walk("", {key: value for key, value in top.items() if key not in ("title", "about")})
    return plain, lists


def _list(place: str, items: list[Mapping[str, Any]]) -> Table:
    flat = [dict(_leaves(item)) for item in items]
    columns = tuple(dict.fromkeys(key for item in flat for key in item))
    return Table(place, columns, tuple(tuple(item.get(key, MISSING) for key in columns) for item in flat))


def _leaves(table: Mapping[str, Any], place: str = "") -> Iterable[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", _value(value)


def _nested(value: object) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
    )


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _line(found: StudyState) -> str:
    """Where, when and how far, in one line."""
    about = found.environment
    far = "all" if not found.missing else f"{found.finished} of"
    parts = [
        about.get("gpu") or about.get("cpu"),
        about.get("cores") and f"{about['cores']} cores",
        _date(about.get("finished") or about.get("started"))[:10],
        _time(about.get("seconds")),
        f"{far} {jobs_in_words(found.total)} finished",
    ]
    return " · ".join(str(part) for part in parts if part and part != MISSING)


def machine(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `retnet.host.describe` and a folder's notes say, as names and values."""
    memory, dirty = about.get("memory_bytes"), about.get("dirty")
    commit = about.get("commit") or MISSING
    rows: list[tuple[str, Any]] = [
        ("processor", about.get("cpu")),
        ("cores", about.get("cores")),
        ("threads of torch", about.get("threads")),
        ("memory", f"{memory / 2**30:.1f} GiB" if isinstance(memory, (int, float)) else None),
        ("GPU", about.get("gpu") or "none"),
        ("system", about.get("platform")),
        ("Python", about.get("python")),
        *(about.get("versions") or {}).items(),
        ("commit", f"{commit}, with changes that were not committed" if dirty else commit),
        ("started", _date(about.get("started"))),
        ("last worked on", _date(about.get("finished"))),
        ("wall time", _time(about.get("seconds"))),
        *((key.replace("_", " "), value) for key, value in about.items() if key not in _KNOWN),
    ]
    return [(name, MISSING if value is None else _value(value)) for name, value in rows] if about else []


def jobs_table(jobs: Sequence[JobState]) -> Table:
    """Name, state and time of each job."""
    rows = tuple((job.name, job.state, _time(job.seconds)) for job in jobs)
    return Table("", ("job", "state", "time"), rows)


def jobs_in_words(count: int) -> str:
    """``"1 job"`` or ``"12 jobs"``."""
    return "1 job" if count == 1 else f"{count:,} jobs"


def _heading(name: str) -> str:
    words = name.replace("-", " ").replace("_", " ")
    return words[:1].upper() + words[1:]


def _time(seconds: object) -> str:
    if not isinstance(seconds, (int, float)):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _date(when: object) -> str:
    """An ISO date as a reader has it; anything else as it is."""
    try:
        return datetime.fromisoformat(str(when)).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return MISSING if when is None else str(when)
