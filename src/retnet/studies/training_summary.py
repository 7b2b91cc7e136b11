"""What the measure ``training`` found: memory and throughput of training over length, beside the paper's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from retnet.measure.clock import Spread, spread
from retnet.measure.memory import in_bytes
from retnet.measure.summary import Figure, Line, Panel, Summary
from retnet.paper import TRAINED, TRAINING_COST
from retnet.studies.protocols import Result
from retnet.tables import MISSING, Table

PLAIN, FLASH, OURS = TRAINED
Speeds = Mapping[str, Result]  # size → result
Memories = Mapping[tuple[str, str, int], Result]  # (size, model, length) → result
NOTES = (
    "One step: forward, cross entropy, backward, AdamW, on random tokens. Times are of interleaved rounds in one process, "
    "medians; ratios are formed round by round, median (least..greatest).",
    "Both Transformers are one model: plain attention holds a matrix of scores of all tokens against all, FlashAttention "
    "(torch's) does not.",
)
APART = (
    "Memory: the most that a process of its own held during two steps, beyond what it held before there was a model: "
    "weights, gradients, AdamW's moments, what the backward pass needs, scratch memory."
)
BESIDE = (
    "Memory: the most that a step takes of the GPU, as torch's allocator counts it: weights, gradients, AdamW's moments, "
    "what the backward pass needs, scratch memory."
)


def summarise(
    sizes: Sequence[str], lengths: Sequence[int], tokens: int, speeds: Speeds, memories: Memories
) -> Summary:
    """Tables and figures of the sizes that were measured.

    Args:
        sizes: labels, in order.
        lengths: of sequences.
        tokens: of a step.
        speeds: size → seconds of steps of all models.
        memories: (size, model, length) → the most memory, or why it was not tried.
    """
    memories = {
        **memories,
        **{
            (size, row["kind"], row["length"]): row
            for size, found in speeds.items()
            for row in found["rows"]
            if "peak_bytes" in row
        },
    }
    tables = [_table(size, lengths, tokens, speeds.get(size), memories) for size in sizes]
    figures = [_figure(size, lengths, tokens, speeds.get(size), memories) for size in sizes]
    findings = [
        sentence for size in sizes for sentence in _findings(size, lengths, speeds.get(size), memories)
    ]
    return Summary((*tables, _published()), tuple(figures), tuple(findings or ["Nothing has been measured."]))


def _seconds(speed: Result | None, model: str, length: int) -> list[float] | None:
    rows = speed["rows"] if speed else []
    return next((r["seconds"] for r in rows if (r["kind"], r["length"]) == (model, length)), None)


def faster(speed: Result | None, than: str, length: int) -> Spread | None:
    """How many times the tokens per second of another model RetNet makes."""
    ours, other = _seconds(speed, OURS, length), _seconds(speed, than, length)
    return spread(b / a for a, b in zip(ours, other, strict=True)) if ours and other else None


def _peak(memories: Memories, size: str, model: str, length: int) -> int | None:
    peak: int | None = memories.get((size, model, length), {}).get("peak_bytes")
    return peak


def _table(size: str, lengths: Sequence[int], tokens: int, speed: Result | None, memories: Memories) -> Table:
    columns = (
        "tokens of a sequence",
        *(f"tokens/s: RetNet ÷ {than}" for than in (PLAIN, FLASH)),
        *(f"tokens/s: {model}" for model in TRAINED),
        *(f"memory: {model}" for model in TRAINED),
    )
    rows = []
    for length in lengths:
        peaks = [_peak(memories, size, model, length) for model in TRAINED]
        times = [_seconds(speed, model, length) for model in TRAINED]
        rows.append(
            (
                f"{length:,}",
                *(str(faster(speed, than, length) or MISSING) for than in (PLAIN, FLASH)),
                *(
                    f"{spread(tokens / t for t in seconds).median:,.0f}" if seconds else MISSING
                    for seconds in times
                ),
                *(MISSING if peak is None else in_bytes(peak) for peak in peaks),
            )
        )
    parameters = f" Parameters: {_parameters(speed)}." if speed else ""
    notes = (
        f"{tokens:,} tokens a step at every length.{parameters}",
        *NOTES,
        *_how(speed),
        *_left_out(size, speed, memories),
    )
    return Table(f"Training cost, {size}", columns, tuple(rows), notes)


def _how(speed: Result | None) -> list[str]:
    """How the steps were made, and where their memory was counted."""
    found = speed or {}
    beside = any("peak_bytes" in row for row in found.get("rows", ()))
    recomputed = found.get("activation_checkpointing", False)
    said = [BESIDE if beside else APART]
    said.append(
        "Activation checkpointing: blocks are computed again in the backward pass, of all models alike."
        if recomputed
        else "Nothing is recomputed in the backward pass but what FlashAttention and retention do themselves."
    )
    if found.get("compile"):
        said.append("Blocks are compiled with torch.compile.")
    if not found.get("interleaved", True):
        said.append(
            "There was not enough memory for both models at once, so they were measured one after the other."
        )
    return said


def _parameters(speed: Result) -> str:
    return ", ".join(f"{model} {count:,}" for model, count in speed["parameters"].items())


def _left_out(size: str, speed: Result | None, memories: Memories) -> list[str]:
    found = [*(speed or {}).get("skipped", [])]
    found += [m["skipped"] for (label, _, _), m in memories.items() if label == size and "skipped" in m]
    return [f"Not tried: {reason}." for reason in found]


def _published() -> Table:
    columns = (
        "size",
        *(f"words/s: RetNet ÷ {than}" for than in (PLAIN, FLASH)),
        *(f"words/s: {model}" for model in TRAINED),
        *(f"GB: {model}" for model in TRAINED),
    )
    rows = tuple(
        (
            size,
            *(f"{speed[2] / speed[n]:.2f}" for n in (0, 1)),
            *(f"{x:,.1f}" for x in speed),
            *(f"{x:.1f}" for x in memory),
        )
        for size, (memory, speed) in TRAINING_COST.items()
    )
    return Table("Published: A100-80GB, sequences of 8,192, chunks of 512", columns, rows)


def _figure(
    size: str, lengths: Sequence[int], tokens: int, speed: Result | None, memories: Memories
) -> Figure:
    memory, throughput = [], []
    for model in TRAINED:
        peaks = [(n, peak / 2**30) for n in lengths if (peak := _peak(memories, size, model, n)) is not None]
        memory.append(Line(model, tuple(float(n) for n, _ in peaks), tuple(y for _, y in peaks)))
        seen = [
            (n, spread(tokens / t for t in seconds))
            for n in lengths
            if (seconds := _seconds(speed, model, n))
        ]
        throughput.append(Line.of(model, [n for n, _ in seen], [s for _, s in seen]))
    x = "tokens of a sequence"
    return Figure(
        f"training-cost-{size}",
        (
            Panel(f"Memory, {size}", x, "GiB", tuple(memory), log_x=True),
            Panel(f"Throughput, {size}", x, "tokens per second", tuple(throughput), log_x=True),
        ),
    )


def _findings(size: str, lengths: Sequence[int], speed: Result | None, memories: Memories) -> list[str]:
    sentences = []
    for than in (PLAIN, FLASH):
        both = [n for n in lengths if faster(speed, than, n)]
        if both:
            sentences.append(
                f"{size}: at {both[-1]:,} tokens RetNet trains {faster(speed, than, both[-1])} times as fast as the {than}."
            )
        held = [n for n in lengths if _peak(memories, size, OURS, n) and _peak(memories, size, than, n)]
        if held:
            share = (_peak(memories, size, OURS, held[-1]) or 0) / (
                _peak(memories, size, than, held[-1]) or 1
            )
            sentences.append(
                f"{size}: at {held[-1]:,} tokens RetNet takes {share:.2f} of the memory of the {than}."
            )
    for model in TRAINED:
        times = [n for n in lengths if _seconds(speed, model, n)]
        if len(times) > 1:
            pair = [_seconds(speed, model, n) or [] for n in (times[0], times[-1])]
            kept = spread(a / b for a, b in zip(*pair, strict=True))
            sentences.append(
                f"{size}: the {model} keeps {kept} of its tokens/s from {times[0]:,} to {times[-1]:,} tokens."
            )
    if left := _left_out(size, speed, memories):
        sentences.append(
            f"{size}: {len(left)} measurements were not tried, for memory; the table says which."
        )
    if size in TRAINING_COST:
        _, (plain, flash, ours) = TRAINING_COST[size]
        sentences.append(
            f"{size}: the paper's RetNet trains {ours / plain:.2f} and {ours / flash:.2f} times as fast as its "
            "Transformers without and with FlashAttention."
        )
    return sentences
