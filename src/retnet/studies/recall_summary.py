"""What the measure ``recall`` found: accuracy over seeds by number of pairs and by length, and what is left beyond."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from retnet.measure.summary import Figure, Line, Panel, Summary
from retnet.studies.tuning import TunedRow, at_end, over_seeds, tuning_table
from retnet.tables import MISSING, Table

if TYPE_CHECKING:
    from retnet.studies.recall import RecallTask

GOOD = 0.9  # accuracy from which on something counts as recalled, in sentences
TITLES = {"pairs": "Associative recall", "lengths": "Needle in a haystack"}
ASKED = {"pairs": "pairs", "lengths": "tokens"}


def summarise(found: Sequence[TunedRow], task: RecallTask) -> Summary:
    """Tables and figures of all rows; those that have no results yet stand there empty."""
    asked = {"pairs": sorted(task.asked_pairs), "lengths": sorted(task.asked_lengths)}
    learned = {"pairs": max(task.pairs), "lengths": max(task.lengths)}
    tables = [_accuracy(found, name, numbers, learned[name]) for name, numbers in asked.items()]
    panels = tuple(_panel(found, name, numbers) for name, numbers in asked.items())
    beyond = f"Trained with up to {learned['pairs']} pairs and {learned['lengths']} tokens. "
    figure = Figure("recall", panels, (beyond + "Mean over seeds, from the least to the greatest.",))
    said = [_finding(found, name, numbers, learned[name]) for name, numbers in asked.items()]
    chance = f"Guessing any of the values is right in {1 / task.vocabulary.values:.1%}."
    findings = [
        *(s for s in said if s),
        *(end for row in found for end in at_end(row)),
        chance,
    ]
    note = (
        "Nats per answer of the first seed at each learning rate, over what was trained; * is the one kept."
    )
    tuning = tuning_table(found, lambda result: f"{result['nats']:.3f}", note)
    return Summary((*tables, tuning), (figure,), tuple(findings))


def _accuracy(found: Sequence[TunedRow], task: str, numbers: Sequence[int], learned: int) -> Table:
    columns = ("", "parameters", "state, KiB", "seeds", *(f"{n} {ASKED[task]}" for n in numbers))
    rows = []
    for row in found:
        first = row.seeds[0] if row.seeds else None
        size = f"{first['parameters'] / 1e3:,.0f} k" if first else MISSING
        state = f"{first['state_bytes'] / 1024:,.0f}" if first else MISSING
        cells = (over_seeds([100 * x for x in row.values(task, str(n))], 1) for n in numbers)
        rows.append((row.label, size, state, str(len(row.seeds)), *cells))
    tokens = next((row.seeds[0]["state_tokens"] for row in found if row.seeds), None)
    notes = [
        "Share of answers that are right in %: mean over seeds ± their standard deviation. "
        f"Trained with up to {learned:,} {ASKED[task]}."
    ]
    if tokens:
        notes.append(f"The state is that of all layers after {tokens:,} tokens, fp32.")
    return Table(f"{TITLES[task]}: accuracy", columns, tuple(rows), tuple(notes))


def _panel(found: Sequence[TunedRow], task: str, numbers: Sequence[int]) -> Panel:
    lines = tuple(
        Line.means(row.label, numbers, [row.values(task, str(n)) for n in numbers])
        for row in found
        if row.seeds
    )
    label = "pairs" if task == "pairs" else "tokens of haystack"
    return Panel(TITLES[task], label, "accuracy", lines, log_x=True, from_zero=True)


def _finding(found: Sequence[TunedRow], task: str, numbers: Sequence[int], learned: int) -> str:
    """Who recalls what was trained, and how much of that is left at the most that was asked."""
    complete = [row for row in found if row.seeds]
    if not complete:
        return ""
    near, far = max((n for n in numbers if n <= learned), default=numbers[0]), numbers[-1]
    ranked = sorted(complete, key=lambda row: -_accuracy_of(row, task, near))
    able = [row for row in ranked if _accuracy_of(row, task, near) >= GOOD]
    unable = [_written(row, task, near) for row in ranked if row not in able]
    sentence = f"{TITLES[task]}, {near:,} {ASKED[task]}: "
    sentence += f"right in at least {GOOD:.0%} are {', '.join(row.label for row in able) or 'none'}"
    sentence += f"; in less {', '.join(unable)}." if unable else "."
    if far > near:
        ranked = sorted(complete, key=lambda row: -_accuracy_of(row, task, far))
        sentence += f" At {far:,}: " + ", ".join(_written(row, task, far) for row in ranked) + "."
    return sentence


def _accuracy_of(row: TunedRow, task: str, number: int) -> float:
    """At a number of pairs, or a length: the mean over seeds."""
    return statistics.mean(row.values(task, str(number)))


def _written(row: TunedRow, task: str, number: int) -> str:
    return f"{row.label} {_accuracy_of(row, task, number):.0%}"
