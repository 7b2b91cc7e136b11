"""The page of a GPU day, made from its records alone: what was found, what was not done, and where."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path
from typing import Any

from retnet.io import write_text
from retnet.measure.summary import Summary
from retnet.studies.html_report import Page, jobs_table, machine, render
from retnet.studies.report import JobState
from tools.gpu_day import plan
from tools.gpu_day.notebook import Notebook, file_name

ABOUT = (
    "What a GPU had to say, step by step: its own ceilings, whether every kernel is right on it, the best tiles, the op and "
    "decoding beside peers and ceilings, training beside the paper's table, and the quality of architectures.",
    "Times are medians of interleaved rounds in one process, with the least and the greatest in brackets.",
)
ALARM = "A rehearsal: no number of it is a measurement"
REHEARSED = (
    "Everything here ran on a CPU, kernels in Triton's interpreter, at tiny sizes. It shows that the day runs to its end; "
    "its numbers mean nothing."
)


def write_page(out: Path, rehearsal: bool) -> Path:
    """Writes the page of what there is so far, without network or scripts in it; its path."""
    path = out / file_name("report.html", rehearsal)
    write_text(path, render(_page(out, rehearsal)))
    return path


def chapters(out: Path, rehearsal: bool) -> list[tuple[str, Summary]]:
    """Every step that left a record: its title, and what it found."""
    return [_chapter(step, record) for step, record in _records(out, rehearsal).items()]


def _records(out: Path, rehearsal: bool) -> dict[str, dict[str, Any]]:
    found = {step: Notebook(out, step, rehearsal).read() for step in plan.STEPS}
    return {step: record for step, record in found.items() if record}


def _page(out: Path, rehearsal: bool) -> Page:
    records = _records(out, rehearsal)
    states = [
        (f"{part.step} {part.name}", records.get(part.step, {}).get("parts", {}).get(part.name, {}))
        for part in plan.PARTS
        if plan.is_possible(part) or part.name in records.get(part.step, {}).get("parts", {})
    ]
    failures = {name: state["why"] for name, state in states if state.get("state") == "failed"}
    done = sum(state.get("state") == "done" for _, state in states)
    open_ = [name for name, state in states if state.get("state") not in ("done", "failed")]
    missing = [REHEARSED] if rehearsal else []
    if failures or open_:
        words = f"{done} of {len(states)} parts are done, {len(failures)} failed"
        missing.append(f"{words}; not done: {', '.join(open_) or 'none'}.")
    host: dict[str, Any] = next(iter(records.values()))["host"] if records else {}
    dates = sorted(record["date"] for record in records.values())
    jobs = [JobState(name, state.get("state", "not begun"), state.get("seconds")) for name, state in states]
    return Page(
        title="A rehearsal of a GPU day" if rehearsal else "A GPU day",
        line=" · ".join(
            [
                str(host.get("gpu") or host.get("cpu", "")),
                (dates[0] if dates else time.strftime("%Y-%m-%d"))[:10],
                f"{done} parts",
            ]
        ),
        about=ABOUT,
        alarm=ALARM if rehearsal else "Not everything was done",
        missing=" ".join(missing),
        failures=failures,
        chapters=chapters(out, rehearsal),
        settings=(),
        lists=(),
        machine=machine(host),
        jobs=jobs_table(jobs),
    )


def _chapter(step: str, record: dict[str, Any]) -> tuple[str, Summary]:
    """A step as a chapter."""
    parts = {name: part["found"] for name, part in record["parts"].items() if "found" in part}
    title = f"{step.capitalize()}: {plan.STEPS[step]}"
    try:
        shown: Summary = import_module(f"tools.gpu_day.{step}").summarise(parts)
    except (
        KeyError,
        TypeError,
        ValueError,
        StopIteration,
    ) as error:  # a record of another version, or cut short
        return title, Summary(findings=(f"Its record cannot be shown: {type(error).__name__}: {error}.",))
    return title, shown
