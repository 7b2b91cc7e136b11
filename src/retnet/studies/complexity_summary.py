"""What the measure ``complexity`` found: measured exponents beside the claimed ones."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from retnet.measure.clock import Spread, spread
from retnet.measure.memory import in_bytes
from retnet.measure.summary import Figure, Line, Panel, Summary
from retnet.mixers import MIXERS
from retnet.paper import COMPLEXITY
from retnet.studies.protocols import Result, Results
from retnet.studies.slopes import Slope, expected, slope
from retnet.tables import MISSING, Table

NEAR = 0.15  # a measured exponent may be so far from theory

NOTES = (
    "Exponents are slopes of ln(cost) over ln(length), of medians over rounds, with the 95 % interval of Student's t; "
    "nothing is subtracted, so a constant part of the cost pulls an exponent down.",
    "One mixer alone, without feed-forward layer and head. State: bytes of the tensors that one sequence leaves for the "
    "next token. Kept: bytes that a forward pass of one sequence keeps for its backward pass.",
    "One sequence alone: how many times longer a token takes in training than when many sequences stand side by side. "
    "About 1: there is enough to do at once along time; far above 1: steps wait for each other.",
    "FlashAttention keeps O(N) where the plain formula keeps O(N²).",
    "N log N is that of the work of Fourier transforms; what they keep grows as N, rounded up to powers of two.",
    "Quality is the paper's word. Of a mixer that is not in the paper, theory is what its own authors say.",
)


class Exponents(NamedTuple):
    """Of one mixer, and what theory says."""

    using: Slope
    state: Slope
    using_theory: float  # of both
    kept: list[tuple[str, Slope]]  # by the form of training
    kept_theory: list[tuple[str, str]]


def summarise(mixers: Sequence[str], results: Results) -> Summary:
    """Tables, figures and findings of the mixers that have results."""
    found = {mixer: results[mixer] for mixer in mixers if mixer in results}
    if not found:
        return Summary(findings=("No mixer has been measured.",))
    exponents = {mixer: _exponents(mixer, result) for mixer, result in found.items()}
    tables = (_architectures(mixers, found, exponents), *_numbers(found, exponents))
    return Summary(tables, tuple(_figures(found)), tuple(_findings(found, exponents)))


def alone(learning: Result) -> Spread:
    """Seconds of a token of one sequence alone ÷ the same of many side by side, round by round."""
    found = learning["alone"]
    return spread(a / b for a, b in zip(found["one"], found["many"], strict=True))


def _exponents(mixer: str, result: Result) -> Exponents:
    using, learning = result["using"], result["learning"]
    inference, memory = _theory(mixer)
    own = {form.name: form.memory for form in MIXERS[mixer].training_forms}
    orders = [(f["form"], own.get(f["form"]) or memory) for f in learning]
    return Exponents(
        slope(using["lengths"], _medians(using["seconds"])),
        slope(using["lengths"], using["state_bytes"]),
        expected(inference, using["lengths"]),
        [(f["form"], slope(f["lengths"], f["kept_bytes"])) for f in learning],
        [(form, f"{expected(order, learning[0]['lengths']):.2f}") for form, order in orders],
    )


def _theory(mixer: str) -> tuple[str, str]:
    """How the cost of a token, and what training keeps, should grow: by the paper's table, else by the mixer's word."""
    row = MIXERS[mixer].paper_row
    return MIXERS[mixer].theory if row is None else COMPLEXITY[row][1:3]


def _architectures(mixers: Sequence[str], found: dict[str, Result], exponents: dict[str, Exponents]) -> Table:
    rows = []
    for mixer in mixers:
        row, along = MIXERS[mixer].paper_row, MIXERS[mixer].along_time
        parallel, inference, memory, quality = COMPLEXITY[row] if row else (MISSING,) * 4
        inference, memory = (f"O({x})" if row else x for x in (inference, memory))
        lone, using, state, theory, kept = [MISSING] * 5
        if mixer in found:
            e = exponents[mixer]
            lone = _forms((f["form"], alone(f)) for f in found[mixer]["learning"])
            using, state, theory, kept = str(e.using), str(e.state), _forms(e.kept_theory), _forms(e.kept)
        rows.append(
            {
                "mixer": mixer,
                "paper's row": row or MISSING,
                "parallel: paper": parallel,
                "along time": along,
                "one sequence alone": lone,
                "cost per token: paper": inference,
                "exponent": using,
                "state: exponent": state,
                "training memory: paper": memory,
                "theory": theory,
                "kept: exponent": kept,
                "quality: paper": quality,
            }
        )
    cells = tuple(tuple(row.values()) for row in rows)
    return Table("Architectures: claimed and measured", tuple(rows[0]), cells, NOTES)


def _numbers(found: dict[str, Result], exponents: dict[str, Exponents]) -> list[Table]:
    using = {mixer: result["using"] for mixer, result in found.items()}
    first, learning = next(iter(using.values())), next(iter(found.values()))["learning"][0]
    one_token = f"{first['batch']} sequences of width {first['d_model']} at once; medians over rounds"
    contexts, lengths = "tokens of context", "length of the sequences"
    return [
        _by_length(
            f"Decoding: microseconds of a token, by {contexts}",
            (1, *first["lengths"]),
            ((m, _microseconds([u["first"], *u["seconds"]]), exponents[m].using) for m, u in using.items()),
            f"{one_token}. The first column, after one token, shows the constant part; no exponent contains it.",
        ),
        _by_length(
            f"Decoding: state of one sequence, by {contexts}",
            first["lengths"],
            ((m, map(in_bytes, u["state_bytes"]), exponents[m].state) for m, u in using.items()),
            "A KV cache that is measured holds random numbers; all other states come from reading so many tokens.",
        ),
        _by_length(
            f"Training: microseconds of a token, by {lengths}",
            learning["lengths"],
            ((name, _microseconds(f["seconds"]), _work(f)) for name, f in _trained(found)),
            f"Forward and backward pass of {learning['tokens']:,} tokens of width {learning['d_model']} at every "
            "length. 0 is linear work, 1 is quadratic; projections, which are linear, pull quadratic work below 1.",
        ),
        _by_length(
            "Training: what one sequence keeps for its backward pass, by its length",
            learning["lengths"],
            (
                (name, map(in_bytes, f["kept_bytes"]), slope(f["lengths"], f["kept_bytes"]))
                for name, f in _trained(found)
            ),
        ),
    ]


def _by_length(
    title: str, lengths: Iterable[int], rows: Iterable[tuple[str, Iterable[str], Slope]], *notes: str
) -> Table:
    """Of each mixer a cell a length, and the exponent."""
    lines = tuple((name, *cells, str(exponent)) for name, cells, exponent in rows)
    return Table(title, ("mixer", *(f"{n:,}" for n in lengths), "exponent"), lines, notes)


def _microseconds(seconds: Sequence[Sequence[float]]) -> list[str]:
    return [f"{x * 1e6:.3g}" for x in _medians(seconds)]


def _work(learning: Result) -> Slope:
    return slope(learning["lengths"], _medians(learning["seconds"]))


def _figures(found: dict[str, Result]) -> list[Figure]:
    def panel(
        title: str, x: str, y: str, parts: Iterable[tuple[str, Result]], key: str, unit: float
    ) -> Panel:
        lines = tuple(_line(name, part["lengths"], part[key], unit) for name, part in parts)
        return Panel(title, x, y, lines, log_x=True, log_y=True)

    using, trained = [(mixer, result["using"]) for mixer, result in found.items()], _trained(found)
    context, length = "tokens of context", "tokens of a sequence"
    decoding = (
        panel("Time of a token", context, "microseconds", using, "seconds", 1e6),
        panel("State of one sequence", context, "MiB", using, "state_bytes", 2**-20),
    )
    training = (
        panel("Training time of a token", length, "microseconds", trained, "seconds", 1e6),
        panel("Kept for the backward pass", length, "MiB", trained, "kept_bytes", 2**-20),
    )
    return [Figure("decoding-over-length", decoding), Figure("training-over-length", training)]


def _findings(found: dict[str, Result], exponents: dict[str, Exponents]) -> list[str]:
    far = [
        f"{mixer}: the exponent of {what} is {seen}, theory says {theory:g}"
        for mixer, e in exponents.items()
        for what, seen in (("decoding time", e.using), ("the state", e.state))
        for theory in [e.using_theory]
        if not seen.within(NEAR, theory)
    ]
    sentences = [f"{sentence}." for sentence in far]
    if not far:
        sentences.append(
            f"All exponents of decoding time and of the state, of {', '.join(exponents)}, lie within {NEAR} of theory."
        )
    for mixer, e in exponents.items():
        sentences.append(
            f"{mixer}: time of a token grows with exponent {e.using} (theory {e.using_theory:g}), the state with {e.state}; "
            f"what training keeps with {_forms(e.kept)} (theory {_forms(e.kept_theory)})."
        )
    slowest = {mixer: alone(result["learning"][0]) for mixer, result in found.items()}
    for mixer, times in sorted(slowest.items(), key=lambda item: -item[1].median):
        if times.median >= 2:
            sentences.append(
                f"{mixer} ({MIXERS[mixer].along_time}): trained alone, one sequence takes {times} times longer a token than "
                "many side by side."
            )
    return sentences


def _trained(found: dict[str, Result]) -> list[tuple[str, Result]]:
    return [
        (f"{mixer}, {form['form']}" if form["form"] else mixer, form)
        for mixer, result in found.items()
        for form in result["learning"]
    ]


def _line(name: str, lengths: Sequence[int], seen: Sequence[Any], unit: float) -> Line:
    """Of numbers, or of those of several rounds."""
    if isinstance(seen[0], (int, float)):
        return Line(name, tuple(map(float, lengths)), tuple(x * unit for x in seen))
    return Line.of(name, lengths, [spread(x * unit for x in rounds) for rounds in seen])


def _medians(seconds: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(rounds) for rounds in seconds]


def _forms(values: Any) -> str:  # noqa: ANN401
    return "; ".join(f"{form}: {value}" if form else str(value) for form, value in values)
