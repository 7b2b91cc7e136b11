"""The page of a GPU day, made from its records alone: what was found, what was not done, and where."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from retnet.errors import UserError
from retnet.io import write_text
from retnet.measure.summary import Summary
from retnet.studies.html_report import Page, jobs_table, machine, render
from retnet.studies.report import JobState
from tools.gpu_day import plan, targets, tune
from tools.gpu_day.notebook import Found, Notebook, attempts, file_name

ABOUT = (
    "What a GPU had to say, step by step: its own ceilings, whether every kernel is right on it, the best tiles, the op and "
    "decoding beside peers and ceilings, training beside the paper's table, and the quality of architectures.",
    "Times are medians of interleaved rounds in one process, with the least and the greatest in brackets.",
)
# of a record of another version, or cut short
BROKEN = (AttributeError, KeyError, TypeError, ValueError, StopIteration)
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
    """The targets, and every step that left a record: its title, and what it found."""
    records, damaged = _records(out, rehearsal)
    found = [_chapter(step, record) for step, record in records.items()]
    found += [(_title(step), Summary(findings=(f"{why}.",))) for step, why in damaged.items()]
    if not found:
        return []
    steps: dict[str, dict[str, Found]] = {}
    for step, record in records.items():
        with suppress(*BROKEN):
            steps[step] = _parts(step, record)
    return [("Targets: what is wanted, and what was measured", targets.summarise(steps)), *found]


def write_patch(out: Path, rehearsal: bool) -> Path | None:
    """Writes the tile table with the rows that were found faster and right; None if there are none."""
    records, _ = _records(out, rehearsal)
    with suppress(*BROKEN):
        return tune.write_patch(out, rehearsal, _parts("tune", records["tune"]))
    return None


def _records(out: Path, rehearsal: bool) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Those that are there, and why others cannot be read."""
    records: dict[str, dict[str, Any]] = {}
    damaged: dict[str, str] = {}
    for step in plan.STEPS:
        try:
            if record := Notebook(out, step, rehearsal).read():
                records[step] = record
        except UserError as error:
            damaged[step] = str(error)
    return records, damaged


def _page(out: Path, rehearsal: bool) -> Page:
    records, damaged = _records(out, rehearsal)
    states = [
        (f"{part.step} {part.name}", records.get(part.step, {}).get("parts", {}).get(part.name, {}))
        for part in plan.PARTS
        if plan.is_possible(part) or part.name in records.get(part.step, {}).get("parts", {})
    ]
    failures = {name: state.get("why", "") for name, state in states if state.get("state") == "failed"}
    failures |= damaged
    done = sum(state.get("state") == "done" for _, state in states)
    open_ = [name for name, state in states if state.get("state") not in ("done", "failed")]
    missing = [REHEARSED] if rehearsal else []
    if failures or open_:
        words = f"{done} of {len(states)} parts are done, {len(failures)} failed"
        missing.append(f"{words}; not done: {', '.join(open_) or 'none'}.")
    host: dict[str, Any] = next((record["host"] for record in records.values() if "host" in record), {})
    dates = sorted(str(record["date"]) for record in records.values() if "date" in record)
    jobs = [JobState(name, _state(state), state.get("seconds")) for name, state in states]
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
    """A step as a chapter; a part that is cut short so that it cannot be shown hides no other."""
    module = import_module(f"tools.gpu_day.{step}")
    parts: dict[str, Found] = {}
    broken = []
    for name, part in record["parts"].items():
        try:
            one = _parts(step, {"parts": {name: part}})
            module.summarise(one)
            parts |= one
        except BROKEN as error:
            broken.append(f"The record of {name} cannot be shown: {type(error).__name__}: {error}.")
    shown = Summary()
    try:  # parts that can be shown each need not go together
        shown = module.summarise(parts)
    except BROKEN as error:
        broken.append(f"The record of {step} cannot be shown: {type(error).__name__}: {error}.")
    return _title(step), replace(shown, findings=(*broken, *shown.findings))


def _parts(step: str, record: dict[str, Any]) -> dict[str, Found]:
    """What each part has found: in the latest attempt, or in all of them where they add up."""
    joined = getattr(import_module(f"tools.gpu_day.{step}"), "joined", lambda found: found[-1])
    return {name: joined(found) for name, part in record["parts"].items() if (found := _found(part))}


def _title(step: str) -> str:
    return f"{step.capitalize()}: {plan.STEPS[step]}"


def _state(part: Found) -> str:
    """How a part stands, in words."""
    count = len(part.get("attempts", ()))
    why = f": {part['why']}" if part.get("state") == "stopped" and part.get("why") else ""
    again = f", attempt {count + 1}" if count else ""
    return f"{part.get('state', 'not begun')}{why}{again}"


def _found(part: Found) -> list[Found]:
    """What the attempts at a part have found, the oldest first, and one that was done behind those that were not."""
    made = sorted(attempts(part), key=lambda one: one.get("state") == "done")
    return [one["found"] for one in made if "found" in one]
