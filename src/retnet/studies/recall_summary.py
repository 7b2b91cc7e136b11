"""What the measure ``recall`` found: accuracy over seeds by number of pairs and by length, and what is left beyond."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from retnet.measure.summary import Figure, Line, Panel, Summary
from retnet.studies.protocols import Result
from retnet.studies.tuning import at_end
from retnet.tables import MISSING, Table

if TYPE_CHECKING:
    from retnet.studies.recall import RecallTask

GOOD = 0.9  # accuracy from which on something counts as recalled, in sentences
TITLES = {"pairs": "Associative recall", "lengths": "Needle in a haystack"}
ASKED = {"pairs": "pairs", "lengths": "tokens"}


class RecallResults(NamedTuple):
    """One row of a study, as far as it has come.

    Attributes:
        label: in tables.
        rate: the learning rate that was kept; None while that is open.
        seeds: results at that rate, one a seed.
        tuned: learning rate → result of the first seed.
    """

    label: str
    rate: float | None
    seeds: list[Result]
    tuned: Mapping[float, Result]

    def values(self, task: str, number: int) -> list[float]:
        """Accuracy at a number of pairs, or a length, seed by seed."""
        return [result[task][str(number)] for result in self.seeds]


def summarise(found: Sequence[RecallResults], task: RecallTask) -> Summary:
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
        *(end for row in found for end in at_end(row.label, row.rate, row.tuned)),
        chance,
    ]
    return Summary((*tables, _tuning(found)), (figure,), tuple(findings))


def _accuracy(found: Sequence[RecallResults], task: str, numbers: Sequence[int], learned: int) -> Table:
    columns = ("", "parameters", "state, KiB", "seeds", *(f"{n} {ASKED[task]}" for n in numbers))
    rows = []
    for row in found:
        first = row.seeds[0] if row.seeds else None
        size = f"{first['parameters'] / 1e3:,.0f} k" if first else MISSING
        state = f"{first['state_bytes'] / 1024:,.0f}" if first else MISSING
        cells = (_mean(row.values(task, n)) for n in numbers)
        rows.append((row.label, size, state, str(len(row.seeds)), *cells))
    tokens = next((row.seeds[0]["state_tokens"] for row in found if row.seeds), None)
    notes = [
        "Share of answers that are right in %: mean over seeds ± their standard deviation. "
        f"Trained with up to {learned:,} {ASKED[task]}."
    ]
    if tokens:
        notes.append(f"The state is that of all layers after {tokens:,} tokens, fp32.")
    return Table(f"{TITLES[task]}: accuracy", columns, tuple(rows), tuple(notes))


def _panel(found: Sequence[RecallResults], task: str, numbers: Sequence[int]) -> Panel:
    lines = []
    for row in found:
        if row.seeds:
            values = [row.values(task, n) for n in numbers]
            ends = tuple(map(min, values)), tuple(map(max, values))
            lines.append(
                Line(row.label, tuple(map(float, numbers)), tuple(map(statistics.mean, values)), *ends)
            )
    label = "pairs" if task == "pairs" else "tokens of haystack"
    return Panel(TITLES[task], label, "accuracy", tuple(lines), log_x=True, from_zero=True)


def _tuning(found: Sequence[RecallResults]) -> Table:
    rates = sorted({rate for row in found for rate in row.tuned})
    rows = []
    for row in found:
        cells = (
            f"{row.tuned[rate]['nats']:.3f}{' *' if rate == row.rate else ''}"
            if rate in row.tuned
            else MISSING
            for rate in rates
        )
        rows.append((row.label, *cells))
    notes = (
        "Nats per answer of the first seed at each learning rate, over what was trained; * is the one kept.",
    )
    return Table("Tuning", ("", *(f"rate {rate:g}" for rate in rates)), tuple(rows), notes)


def _finding(found: Sequence[RecallResults], task: str, numbers: Sequence[int], learned: int) -> str:
    """Who recalls what was trained, and how much of that is left at the most that was asked."""
    complete = [row for row in found if row.seeds]
    if not complete:
        return ""
    near, far = max((n for n in numbers if n <= learned), default=numbers[0]), numbers[-1]
    ranked = sorted(complete, key=lambda row: -statistics.mean(row.values(task, near)))
    able = [row for row in ranked if statistics.mean(row.values(task, near)) >= GOOD]
    unable = [_written(row, task, near) for row in ranked if row not in able]
    sentence = f"{TITLES[task]}, {near:,} {ASKED[task]}: "
    sentence += f"right in at least {GOOD:.0%} are {', '.join(row.label for row in able) or 'none'}"
    sentence += f"; in less {', '.join(unable)}." if unable else "."
    if far > near:
        ranked = sorted(complete, key=lambda row: -statistics.mean(row.values(task, far)))
        sentence += f" At {far:,}: " + ", ".join(_written(row, task, far) for row in ranked) + "."
    return sentence


def _written(row: RecallResults, task: str, number: int) -> str:
    return f"{row.label} {statistics.mean(row.values(task, number)):.0%}"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return MISSING
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"
