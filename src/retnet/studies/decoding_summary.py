"""What the measure ``decoding`` found: RetNet beside a Transformer with a KV cache, and beside the paper's ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from retnet.measure.clock import Spread, spread
from retnet.measure.memory import in_bytes
from retnet.measure.summary import Figure, Line, Panel, Summary
from retnet.paper import INFERENCE
from retnet.studies.protocols import Result
from retnet.tables import MISSING, Table

OURS, PEER = "RetNet", "Transformer"
MARK = 8192  # the paper's length
NOTES = (
    "Times: the Transformer's ÷ RetNet's, formed round by round in one process; median (least..greatest). Above 1, RetNet "
    "is better.",
    "The paper: 6.7B parameters on a GPU, whose weights dwarf the caches; here models are small, so caches weigh more "
    "against weights.",
    "Caches have the stated length and hold random numbers; RetNet's states come from reading so many random tokens.",
    "The Transformer is this library's own block around softmax attention, of equal size; `retnet bench decode` measures "
    "Hugging Face's Llama.",
)


class Speeds(NamedTuple):
    """Seconds of a step by (model, length, batch), round by round; cells that were left out are missing."""

    cells: Mapping[tuple[str, int, int], Sequence[float]]

    def lengths(self) -> list[int]:
        """All lengths, rising."""
        return sorted({length for _, length, _ in self.cells})

    def batches(self, name: str, length: int) -> list[int]:
        """Those measured there, rising."""
        return sorted(batch for model, n, batch in self.cells if (model, n) == (name, length))

    def times(self, length: int, batch: int, peer_batch: int | None = None) -> Spread | None:
        """The Transformer's seconds of a token ÷ RetNet's, None where one was not measured."""
        ours = self.cells.get((OURS, length, batch))
        peers = self.cells.get((PEER, length, peer_batch or batch))
        if not ours or not peers:
            return None
        share = batch / (peer_batch or batch)
        return spread(share * b / a for a, b in zip(ours, peers, strict=True))

    def most(self, length: int) -> tuple[int, int] | None:
        """The largest batches of both that were measured: all that the budget allows."""
        ours, peers = self.batches(OURS, length), self.batches(PEER, length)
        return (ours[-1], peers[-1]) if ours and peers else None

    def throughput(self, name: str, length: int, batch: int) -> Spread:
        """Tokens per second, all sequences together."""
        return spread(batch / seconds for seconds in self.cells[name, length, batch])


def summarise(speed: Result | None, memories: Mapping[str, Result], batch: int, budget_gib: float) -> Summary:
    """Tables and figures of what was measured.

    Args:
        speed: of both models; None: missing.
        memories: model → its memory, as far as measured.
        batch: for memory and throughput over length.
        budget_gib: that weights and states were allowed.
    """
    cells = {(r["model"], r["length"], r["batch"]): r["seconds"] for r in speed["rows"]} if speed else {}
    speeds = Speeds(cells)
    tables, figures = [], []
    if speed or len(memories) == 2:
        tables.append(_ratios(speeds, memories, batch, budget_gib))
    if memories:
        tables.append(_memory(memories))
        figures.append(_memory_figure(memories))
    if speed:
        tables.append(_latency(speeds, speed))
        figures += [_throughput_figure(speeds, batch, budget_gib), _latency_figure(speeds)]
    return Summary(tuple(tables), tuple(figures), tuple(_findings(speeds, memories, batch)))


def _ratios(speeds: Speeds, memories: Mapping[str, Result], batch: int, budget_gib: float) -> Table:
    less = _less_memory(memories)
    lengths = sorted({*speeds.lengths(), *less})
    batches = sorted({b for _, _, b in speeds.cells})
    columns = (
        "tokens of context",
        "memory",
        "throughput in equal memory",
        *(f"latency, batch {b}" for b in batches),
    )
    rows = []
    for length in lengths:
        most = speeds.most(length)
        best = speeds.times(length, *most) if most else None
        throughput = f"{best}, batches {most[0]} and {most[1]}" if most else MISSING
        memory = f"{less[length]:.3g}" if length in less else MISSING
        latency = [str(t) if (t := speeds.times(length, b)) else MISSING for b in batches]
        rows.append((f"{length:,}", memory, throughput, *latency))
    paper = ("paper, 6.7B at 8k", *(f"{INFERENCE[k]:g}" for k in ("memory", "throughput")))
    rows.append((*paper, *[f"{INFERENCE['latency']:g}" if b == batches[-1] else "" for b in batches]))
    notes = (
        f"Memory: weights and states, batch {batch}. Throughput in equal memory: each model with the largest batch "
        f"measured for which its weights and states fit {budget_gib:g} GiB. Latency: seconds of a step at equal batch.",
        *NOTES,
    )
    return Table("How many times better RetNet is than the Transformer", columns, tuple(rows), notes)  # fmt: skip


def _less_memory(memories: Mapping[str, Result]) -> dict[int, float]:
    if len(memories) < 2:
        return {}
    totals = {
        name: {r["length"]: found["weight_bytes"] + r["state_bytes"] for r in found["rows"]}
        for name, found in memories.items()
    }
    return {n: totals[PEER][n] / totals[OURS][n] for n in totals[OURS] if n in totals[PEER]}


def _memory(memories: Mapping[str, Result]) -> Table:
    lengths = sorted({row["length"] for found in memories.values() for row in found["rows"]})
    rows = []
    for name, found in memories.items():
        by_length = {row["length"]: row for row in found["rows"]}
        for key, what in (("state_bytes", "state"), ("held_bytes", "held by the process")):
            cells = [in_bytes(by_length[n][key]) if n in by_length else MISSING for n in lengths]
            weights = in_bytes(found["weight_bytes"]) if key == "state_bytes" else ""
            rows.append((f"{name}: {what}", weights, *cells))
    batch = next(iter(memories.values()))["batch"]
    notes = (
        f"Batch {batch}. Weights and state: bytes of their tensors. Held: what a process of its own holds for weights, "
        "state and whatever else decoding needs, beyond what it held before there was a model.",
    )
    return Table(
        "Memory by tokens of context", ("", "weights", *(f"{n:,}" for n in lengths)), tuple(rows), notes
    )


def _latency(speeds: Speeds, speed: Result) -> Table:
    lengths = speeds.lengths()
    rows = []
    for name, batch in sorted({(name, batch) for name, _, batch in speeds.cells}):
        seen = [speeds.cells.get((name, n, batch)) for n in lengths]
        cells = [str(spread(x * 1e3 for x in s)) if s else MISSING for s in seen]
        rows.append((f"{name}, batch {batch}", *cells))
    sizes = ", ".join(f"{name} {count:,}" for name, count in speed["parameters"].items())
    notes = (
        f"Median of a round's steps; median over rounds (least..greatest). Parameters: {sizes}. {MISSING}: weights and "
        "caches would not fit the budget.",
    )
    columns = ("", *(f"{n:,}" for n in lengths))
    return Table("Milliseconds of a step, by tokens of context", columns, tuple(rows), notes)


def _memory_figure(memories: Mapping[str, Result]) -> Figure:
    lines = []
    for name, found in memories.items():
        x = tuple(float(row["length"]) for row in found["rows"])
        weights = found["weight_bytes"]
        lines += [
            Line(
                f"{name}: weights and state",
                x,
                tuple((weights + r["state_bytes"]) / 2**20 for r in found["rows"]),
            ),
            Line(
                f"{name}: held by the process",
                x,
                tuple(r["held_bytes"] / 2**20 for r in found["rows"]),
                dashed=True,
            ),
            Line(f"{name}: weights", x, tuple(weights / 2**20 for _ in x), dashed=True),
        ]
    panel = Panel("Memory", "tokens of context", "MiB", tuple(lines), log_x=True, log_y=True)
    return Figure("memory-over-length", (panel,))  # fmt: skip


def _throughput_figure(speeds: Speeds, batch: int, budget_gib: float) -> Figure:
    lines = []
    for name in (OURS, PEER):
        fixed = [(n, batch) for n in speeds.lengths() if batch in speeds.batches(name, n)]
        most = [(n, b[-1]) for n in speeds.lengths() if (b := speeds.batches(name, n))]
        lines += [
            _line(f"{name}, batch {batch}", speeds, name, fixed),
            _line(f"{name}, all that fits {budget_gib:g} GiB", speeds, name, most),
        ]
    panel = Panel(
        "Throughput", "tokens of context", "tokens per second", tuple(lines), log_x=True, log_y=True
    )
    return Figure("throughput-over-length", (panel,))


def _line(label: str, speeds: Speeds, name: str, cells: Sequence[tuple[int, int]]) -> Line:
    seen = [speeds.throughput(name, length, batch) for length, batch in cells]
    return Line.of(label, [length for length, _ in cells], seen)


def _latency_figure(speeds: Speeds) -> Figure:
    lines = []
    for name in (OURS, PEER):
        for length in _few(speeds.lengths()):
            batches = speeds.batches(name, length)
            seen = [spread(s * 1e3 for s in speeds.cells[name, length, b]) for b in batches]
            if seen:
                lines.append(Line.of(f"{name}, {length:,} tokens", batches, seen))
    panel = Panel(
        "Latency", "sequences at once", "milliseconds of a step", tuple(lines), log_x=True, log_y=True
    )
    return Figure("latency-over-batch", (panel,))


def _few(lengths: Sequence[int]) -> list[int]:
    """The first, the paper's (or the middle one) and the last."""
    middle = MARK if MARK in lengths else lengths[len(lengths) // 2]
    return sorted({lengths[0], middle, lengths[-1]})


def _findings(speeds: Speeds, memories: Mapping[str, Result], batch: int) -> list[str]:
    found, less = [], _less_memory(memories)
    for length in sorted({*speeds.lengths(), *less}):
        if length < MARK:
            continue
        parts = []
        if length in less:
            parts.append(f"{less[length]:.3g} times less memory (weights and states, batch {batch})")
        if most := speeds.most(length):
            parts.append(f"{speeds.times(length, *most)} times the throughput in equal memory")
        if both := [b for b in speeds.batches(PEER, length) if b in speeds.batches(OURS, length)]:
            latency = speeds.times(length, both[-1])
            parts.append(f"a latency {latency} times lower at batch {both[-1]}")
        beside = ""
        if length == MARK:
            beside = " (the paper, 6.7B: {memory:g}, {throughput:g}, {latency:g})".format(**INFERENCE)
        found.append(f"At {length:,} tokens RetNet has {', '.join(parts)}{beside}.")
    for name in (OURS, PEER):
        lengths = [n for n in speeds.lengths() if batch in speeds.batches(name, n)]
        if len(lengths) > 1:
            pair = [speeds.cells[name, n, batch] for n in (lengths[0], lengths[-1])]
            grown = spread(b / a for a, b in zip(*pair, strict=True))
            found.append(
                f"{name}: a step takes {grown} times as long at {lengths[-1]:,} tokens as at {lengths[0]:,}, batch {batch}."
            )
    return found or ["Nothing that could be compared has been measured."]
