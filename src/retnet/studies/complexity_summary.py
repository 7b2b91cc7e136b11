"""What the measure ``complexity`` found: measured exponents beside the claimed ones."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
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
    columns = (
        "mixer",
        "paper's row",
        "parallel: paper",
        "along time",
        "one sequence alone",
        "cost per token: paper",
        "exponent",
        "state: exponent",
        "training memory: paper",
        "theory",
        "kept: exponent",
        "quality: paper",
    )
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
            (
                mixer,
                row or MISSING,
                parallel,
                along,
                lone,
                inference,
                using,
                state,
                memory,
                theory,
                kept,
                quality,
            )
        )
    return Table("Architectures: claimed and measured", columns, tuple(rows), NOTES)


def _numbers(found: dict[str, Result], exponents: dict[str, Exponents]) -> list[Table]:
    using = {mixer: result["using"] for mixer, result in found.items()}
    first, learning = next(iter(using.values())), next(iter(found.values()))["learning"][0]
    one_token = f"{first['batch']} sequences of width {first['d_model']} at once; medians over rounds"
    return [
        Table(
            "Decoding: microseconds of a token, by tokens of context",
            ("mixer", "1", *(f"{n:,}" for n in first["lengths"]), "exponent"),
            tuple(
                (mixer, *(f"{x * 1e6:.3g}" for x in _medians([u["first"], *u["seconds"]])), str(exponents[mixer].using))
                for mixer, u in using.items()
            ),
            (f"{one_token}. The first column, after one token, shows the constant part; no exponent contains it.",),
        ),
        Table(
            "Decoding: state of one sequence, by tokens of context",
            ("mixer", *(f"{n:,}" for n in first["lengths"]), "exponent"),
            tuple(
                (mixer, *(in_bytes(x) for x in u["state_bytes"]), str(exponents[mixer].state))
                for mixer, u in using.items()
            ),
            ("A KV cache that is measured holds random numbers; all other states come from reading so many tokens.",),
        ),
        Table(
            "Training: microseconds of a token, by length of the sequences",
            ("mixer", *(f"{n:,}" for n in learning["lengths"]), "exponent"),
            tuple(
                (name, *(f"{x * 1e6:.3g}" for x in _medians(f["seconds"])), _work(f))
                for name, f in _trained(found)
            ),
            (
                f"Forward and backward pass of {learning['tokens']:,} tokens of width {learning['d_model']} at every "
                "length. 0 is linear work, 1 is quadratic; projections, which are linear, pull quadratic work below 1.",
            ),
        ),
        Table(
            "Training: what one sequence keeps for its backward pass, by its length",
            ("mixer", *(f"{n:,}" for n in learning["lengths"]), "exponent"),
            tuple(
                (name, *(in_bytes(x) for x in f["kept_bytes"]), str(slope(f["lengths"], f["kept_bytes"])))
                for name, f in _trained(found)
            ),
        ),
    ]  # fmt: skip


def _work(learning: Result) -> str:
    return str(slope(learning["lengths"], _medians(learning["seconds"])))


def _figures(found: dict[str, Result]) -> list[Figure]:
    length = "tokens of context"

    def panel(title: str, y_label: str, lines: list[Line], x_label: str) -> Panel:
        return Panel(title, x_label, y_label, tuple(lines), log_x=True, log_y=True)

    using = [(mixer, result["using"]) for mixer, result in found.items()]
    decoding = [_line(m, u["lengths"], u["seconds"], 1e6) for m, u in using]
    states = [
        Line(m, tuple(map(float, u["lengths"])), tuple(x / 2**20 for x in u["state_bytes"])) for m, u in using
    ]
    training = [_line(name, f["lengths"], f["seconds"], 1e6) for name, f in _trained(found)]
    kept = [
        Line(name, tuple(map(float, f["lengths"])), tuple(x / 2**20 for x in f["kept_bytes"]))
        for name, f in _trained(found)
    ]
    return [
        Figure(
            "decoding-over-length",
            (
                panel("Time of a token", "microseconds", decoding, length),
                panel("State of one sequence", "MiB", states, length),
            ),
        ),
        Figure(
            "training-over-length",
            (
                panel("Training time of a token", "microseconds", training, "tokens of a sequence"),
                panel("Kept for the backward pass", "MiB", kept, "tokens of a sequence"),
            ),
        ),
    ]


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


def _line(name: str, lengths: Sequence[int], seconds: Sequence[Sequence[float]], unit: float) -> Line:
    seen = [spread(x * unit for x in rounds) for rounds in seconds]
    return Line.of(name, lengths, seen)


def _medians(seconds: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(rounds) for rounds in seconds]


def _forms(values: Any) -> str:  # noqa: ANN401
    return "; ".join(f"{form}: {value}" if form else str(value) for form, value in values)
