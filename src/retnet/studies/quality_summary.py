"""What the measure ``quality`` found: means over seeds beside the published numbers, and how far the orders agree."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations

from retnet import paper
from retnet.measure.summary import Figure, Line, Panel, Summary
from retnet.studies.tuning import TunedRow, at_end, over_seeds, tuning_table
from retnet.tables import MISSING, Table

IN_DOMAIN = "in-domain"
PUBLISHED = {"architectures": paper.ARCHITECTURES, "ablations": paper.ABLATIONS, "none": {}}


def _perplexities(row: TunedRow, name: str) -> list[float]:
    """On one set, seed by seed."""
    return row.values("sets", name, "perplexity")


def summarise(found: Sequence[TunedRow], sets: Sequence[str], published: str, against: str) -> Summary:
    """Tables and figures of all rows; those that have no results yet stand there empty."""
    theirs = PUBLISHED[published]
    tables = [_perplexity(found, sets, theirs)]
    if theirs:
        tables.append(_published(theirs))
    note = "In-domain perplexity of the first seed at each learning rate; * is the one kept."
    tuning = tuning_table(found, lambda result: f"{result['sets'][IN_DOMAIN]['perplexity']:.2f}", note)
    tables += [_bits(found, sets), tuning]
    figures = [_curves(found), *([_sizes(found, sets)] if against == "parameters" else [_rates(found)])]
    return Summary(tuple(tables), tuple(figures), tuple(_findings(found, sets, theirs)))


def _perplexity(
    found: Sequence[TunedRow], sets: Sequence[str], theirs: Mapping[str, Sequence[float]]
) -> Table:
    columns = ["", "parameters", "learning rate", "seeds", *sets]
    columns += ["paper, in-domain", "paper, mean of the other sets"] if theirs else []
    rows = []
    for row in found:
        size = f"{row.seeds[0]['parameters'] / 1e6:.2f} M" if row.seeds else MISSING
        rate = MISSING if row.rate is None else f"{row.rate:g}"
        cells = [row.label, size, rate, str(len(row.seeds))]
        cells += [over_seeds(_perplexities(row, name)) for name in sets]
        if theirs:
            numbers = theirs.get(row.row.paper or "")
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


def _bits(found: Sequence[TunedRow], sets: Sequence[str]) -> Table:
    cells = {row.label: [row.values("sets", name, "bits_per_byte") for name in sets] for row in found}
    rows = tuple((label, *(over_seeds(bits, 4) for bits in of_row)) for label, of_row in cells.items())
    notes = ("The same losses, in a unit that no tokenizer changes.",)
    return Table("Bits per byte of text", ("", *sets), rows, notes)


def _findings(
    found: Sequence[TunedRow], sets: Sequence[str], theirs: Mapping[str, Sequence[float]]
) -> list[str]:
    """The order here beside the published one, pair by pair, as far as the seeds can tell it."""
    complete = [row for row in found if row.seeds]
    said = []
    if complete:
        ranked = sorted(complete, key=lambda row: statistics.mean(_perplexities(row, IN_DOMAIN)))
        said.append("In-domain order here, best first: " + ", ".join(row.label for row in ranked) + ".")
    known = [row for row in complete if row.row.paper in theirs]
    for name in sets:
        judged: dict[str, list[str]] = {"same": [], "reversed": [], "not separated": []}
        for a, b in combinations(known, 2):
            better, worse = sorted((a, b), key=lambda row: theirs[row.row.paper][0])
            judgement = _judge(*(_perplexities(row, name) for row in (better, worse)))
            judged[judgement].append(f"{better.label} before {worse.label}")
        if known[1:]:
            count = sum(map(len, judged.values()))
            said.append(
                f"{name}: of {count} pairs that the paper orders in-domain, {len(judged['same'])} stand in the same order "
                f"here at every seed, {len(judged['reversed'])} in the reverse"
                + (f" ({'; '.join(judged['reversed'])})" if judged["reversed"] else "")
                + f", and the seeds do not separate {len(judged['not separated'])}."
            )
    for row in complete:
        said += at_end(row)
    return said


def _judge(better: Sequence[float], worse: Sequence[float]) -> str:
    """Whether every seed of what is better in the paper is better here than every seed of the other."""
    if max(better) < min(worse):
        return "same"
    return "reversed" if max(worse) < min(better) else "not separated"


def _curves(found: Sequence[TunedRow]) -> Figure:
    lines = []
    for row in found:
        if row.seeds:
            first = row.seeds[0]["curve"]["steps"]
            losses = map(statistics.mean, zip(*row.values("curve", "loss"), strict=True))
            per_step = row.seeds[0]["tokens"] / first[-1]
            lines.append(Line(row.label, tuple(step * per_step for step in first), tuple(losses)))
    panel = Panel("Training loss", "tokens seen", "nats per token", tuple(lines), log_x=True)
    return Figure("training-loss", (panel,), ("Mean over seeds, at the learning rate kept.",))


def _rates(found: Sequence[TunedRow]) -> Figure:
    lines = []
    for row in found:
        rates = tuple(sorted(row.by_rate))
        losses = tuple(row.by_rate[rate]["sets"][IN_DOMAIN]["perplexity"] for rate in rates)
        if rates:
            lines.append(Line(row.label, rates, losses))
    panel = Panel("Tuning", "learning rate", "in-domain perplexity", tuple(lines), log_x=True)
    return Figure("tuning", (panel,), ("First seed.",))


def _sizes(found: Sequence[TunedRow], sets: Sequence[str]) -> Figure:
    """Perplexity over parameters; rows whose labels differ in their last word are one line."""
    families: dict[str, list[TunedRow]] = {}
    for row in found:
        if row.seeds:
            families.setdefault(row.label.rsplit(" ", 1)[0], []).append(row)
    panels = []
    for name in sets:
        lines = []
        for family, rows in families.items():
            rows = sorted(rows, key=lambda row: row.seeds[0]["parameters"])
            sizes = [row.seeds[0]["parameters"] for row in rows]
            lines.append(Line.means(family, sizes, [_perplexities(row, name) for row in rows]))
        panels.append(Panel(name, "parameters", "perplexity", tuple(lines), log_x=True, log_y=True))
    return Figure("scaling", tuple(panels), ("Mean over seeds, from the least to the greatest.",))
