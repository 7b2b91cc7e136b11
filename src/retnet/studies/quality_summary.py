"""What the measure ``quality`` found: means over seeds beside the published numbers, and how far the orders agree."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from retnet import paper
from retnet.measure.summary import Figure, Line, Panel, Summary
from retnet.studies.protocols import Result
from retnet.studies.tuning import at_end
from retnet.tables import MISSING, Table

PUBLISHED = {"architectures": paper.ARCHITECTURES, "ablations": paper.ABLATIONS, "none": {}}


class VariantResults(NamedTuple):
    """One row of a study, as far as it has come.

    Attributes:
        label: in tables.
        paper: its row in the published table.
        rate: the learning rate that was kept; None while that is open.
        seeds: results at that rate, one a seed.
        tuned: learning rate → result of the first seed.
    """

    label: str
    paper: str | None
    rate: float | None
    seeds: list[Result]
    tuned: Mapping[float, Result]

    def values(self, name: str, key: str = "perplexity") -> list[float]:
        """Of one set, seed by seed."""
        return [result["sets"][name][key] for result in self.seeds]


def summarise(found: Sequence[VariantResults], sets: Sequence[str], published: str, against: str) -> Summary:
    """Tables and figures of all rows; those that have no results yet stand there empty."""
    theirs = PUBLISHED[published]
    tables = [_perplexity(found, sets, theirs)]
    if theirs:
        tables.append(_published(theirs))
    tables += [_bits(found, sets), _tuning(found)]
    figures = [_curves(found), *([_sizes(found, sets)] if against == "parameters" else [_rates(found)])]
    return Summary(tuple(tables), tuple(figures), tuple(_findings(found, sets, theirs)))


def _perplexity(
    found: Sequence[VariantResults], sets: Sequence[str], theirs: Mapping[str, Sequence[float]]
) -> Table:
    columns = ["", "parameters", "learning rate", "seeds", *sets]
    columns += ["paper, in-domain", "paper, mean of the other sets"] if theirs else []
    rows = []
    for row in found:
        size = f"{row.seeds[0]['parameters'] / 1e6:.2f} M" if row.seeds else MISSING
        rate = MISSING if row.rate is None else f"{row.rate:g}"
        cells = [row.label, size, rate, str(len(row.seeds)), *(_mean(row.values(name)) for name in sets)]
        if theirs:
            numbers = theirs.get(row.paper or "")
            cells += (
                [f"{numbers[0]:.2f}", f"{statistics.mean(numbers[1:]):.2f}"] if numbers else [MISSING] * 2
            )
        rows.append(tuple(cells))
    notes = [
        "Perplexity per token, lower is better: mean over seeds ± their standard deviation. Every text is read in fresh "
        "windows of the training length."
    ]
    if theirs:
        notes.append(
            "The paper's models have 200 M parameters, other tokens and other texts: only orders compare."
        )
    return Table("Perplexity", tuple(columns), tuple(rows), tuple(notes))


def _published(theirs: Mapping[str, Sequence[float]]) -> Table:
    columns = ("", *(f"paper, {name}" for name in paper.PERPLEXITY_SETS))
    rows = tuple((name, *(f"{x:.2f}" for x in numbers)) for name, numbers in theirs.items())
    return Table("Published perplexity, 200 M parameters", columns, rows)


def _bits(found: Sequence[VariantResults], sets: Sequence[str]) -> Table:
    rows = tuple(
        (row.label, *(_mean(row.values(name, "bits_per_byte"), digits=4) for name in sets)) for row in found
    )
    return Table(
        "Bits per byte of text", ("", *sets), rows, ("The same losses, in a unit that no tokenizer changes.",)
    )


def _tuning(found: Sequence[VariantResults]) -> Table:
    rates = sorted({rate for row in found for rate in row.tuned})
    rows = []
    for row in found:
        seen = {rate: result["sets"]["in-domain"]["perplexity"] for rate, result in row.tuned.items()}
        cells = (
            f"{seen[rate]:.2f}{' *' if rate == row.rate else ''}" if rate in seen else MISSING
            for rate in rates
        )
        rows.append((row.label, *cells))
    notes = ("In-domain perplexity of the first seed at each learning rate; * is the one kept.",)
    return Table("Tuning", ("", *(f"rate {rate:g}" for rate in rates)), tuple(rows), notes)


def _findings(
    found: Sequence[VariantResults], sets: Sequence[str], theirs: Mapping[str, Sequence[float]]
) -> list[str]:
    """The order here beside the published one, pair by pair, as far as the seeds can tell it."""
    complete = [row for row in found if row.seeds]
    said = []
    if complete:
        ranked = sorted(complete, key=lambda row: statistics.mean(row.values("in-domain")))
        said.append("In-domain order here, best first: " + ", ".join(row.label for row in ranked) + ".")
    known = [row for row in complete if row.paper in theirs]
    for name in sets:
        judged: dict[str, list[str]] = {"same": [], "reversed": [], "not separated": []}
        for a, b in combinations(known, 2):
            better, worse = sorted((a, b), key=lambda row: theirs[row.paper or ""][0])
            judged[_judge(better.values(name), worse.values(name))].append(
                f"{better.label} before {worse.label}"
            )
        if known[1:]:
            count = sum(map(len, judged.values()))
            said.append(
                f"{name}: of {count} pairs that the paper orders in-domain, {len(judged['same'])} stand in the same order "
                f"here at every seed, {len(judged['reversed'])} in the reverse"
                + (f" ({'; '.join(judged['reversed'])})" if judged["reversed"] else "")
                + f", and the seeds do not separate {len(judged['not separated'])}."
            )
    for row in complete:
        said += at_end(row.label, row.rate, row.tuned)
    return said


def _judge(better: Sequence[float], worse: Sequence[float]) -> str:
    """Whether every seed of what is better in the paper is better here than every seed of the other."""
    if max(better) < min(worse):
        return "same"
    return "reversed" if max(worse) < min(better) else "not separated"


def _curves(found: Sequence[VariantResults]) -> Figure:
    lines = []
    for row in found:
        if row.seeds:
            first = row.seeds[0]["curve"]["steps"]
            losses = [
                statistics.mean(at) for at in zip(*(r["curve"]["loss"] for r in row.seeds), strict=True)
            ]
            per_step = row.seeds[0]["tokens"] / first[-1]
            lines.append(Line(row.label, tuple(step * per_step for step in first), tuple(losses)))
    panel = Panel("Training loss", "tokens seen", "nats per token", tuple(lines), log_x=True)
    return Figure("training-loss", (panel,), ("Mean over seeds, at the learning rate kept.",))


def _rates(found: Sequence[VariantResults]) -> Figure:
    lines = []
    for row in found:
        rates = tuple(sorted(row.tuned))
        losses = tuple(row.tuned[rate]["sets"]["in-domain"]["perplexity"] for rate in rates)
        if rates:
            lines.append(Line(row.label, rates, losses))
    panel = Panel("Tuning", "learning rate", "in-domain perplexity", tuple(lines), log_x=True)
    return Figure("tuning", (panel,), ("First seed.",))


def _sizes(found: Sequence[VariantResults], sets: Sequence[str]) -> Figure:
    """Perplexity over parameters; rows whose labels differ in their last word are one line."""
    families: dict[str, list[VariantResults]] = {}
    for row in found:
        if row.seeds:
            families.setdefault(row.label.rsplit(" ", 1)[0], []).append(row)
    panels = []
    for name in sets:
        lines = []
        for family, rows in families.items():
            rows = sorted(rows, key=lambda row: row.seeds[0]["parameters"])
            values = [row.values(name) for row in rows]
            sizes = tuple(float(row.seeds[0]["parameters"]) for row in rows)
            ends = tuple(map(min, values)), tuple(map(max, values))
            lines.append(Line(family, sizes, tuple(map(statistics.mean, values)), *ends))
        panels.append(Panel(name, "parameters", "perplexity", tuple(lines), log_x=True, log_y=True))
    return Figure("scaling", tuple(panels), ("Mean over seeds, from the least to the greatest.",))


def _mean(values: Sequence[float], digits: int = 2) -> str:
    if not values:
        return MISSING
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
