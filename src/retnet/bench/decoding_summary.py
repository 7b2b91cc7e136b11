"""Tables and panels of a record of `retnet bench decode`."""

from __future__ import annotations

from retnet.measure.records import Record, grouped, seen
from retnet.measure.summary import Bars, Line, Panel
from retnet.tables import Table


def parts(record: Record) -> tuple[list[Table], list[Panel | Bars]]:
    """What `measure_decoding` found; throughput and one long generation as far as they were measured."""
    tables: list[Table] = [_steps(record)]
    panels: list[Panel | Bars] = [_step_times(record)]
    if batches := record.get("batches"):
        tables.append(_batches(batches))
        panels.append(_rates(batches))
    if throughput := record.get("throughput"):
        tables.append(_throughput(throughput))
        panels.append(_written(throughput))
    if long := record.get("long"):
        tables.append(_long(long))
        panels.append(_long_times(long))
    return tables, panels


def _steps(record: Record) -> Table:
    columns = ("contender", "batch", "context", "ms per step", "floor, ms", "time ÷ floor")
    rows = tuple(
        (
            row["name"],
            str(row["batch"]),
            f"{row['context']:,}",
            seen(row, "seconds_per_step", 1e3).written(),
            seen(row, "floor_seconds", 1e3).written(),
            seen(row, "over_floor").written(),
        )
        for row in record["rows"]
    )
    return Table("One token a sequence, median (least..greatest) over rounds", columns, rows)


def _batches(batches: Record) -> Table:
    columns = (
        "parameters",
        "weights",
        "rows",
        "ms per step",
        "tokens/s",
        "time ÷ floor",
        "products ÷ torch.mm",
    )
    rows = tuple(
        (
            f"{row['parameters'] / 1e6:.0f} M",
            row["weights"],
            str(row["batch"]),
            seen(row, "seconds_per_step", 1e3).written(),
            seen(row, "tokens_per_s").written(0),
            seen(row, "over_floor").written(),
            seen(row, "products_of_torch_mm").written(),
        )
        for row in batches["rows"]
    )
    return Table("Steps of many rows, and the rate of their products ÷ that of torch.mm", columns, rows)


def _rates(batches: Record) -> Panel:
    lines = tuple(
        Line.of(
            f"{parameters / 1e6:.0f} M, {weights}",
            [row["batch"] for row in rows],
            [seen(row, "tokens_per_s") for row in rows],
        )
        for (parameters, weights), rows in grouped(batches["rows"], "parameters", "weights").items()
    )
    return Panel("Decoding many sequences", "rows", "tokens per second", lines, log_x=True, log_y=True)


def _throughput(throughput: Record) -> Table:
    peer = throughput["llama_cpp"]["versions"].get("xllamacpp")
    title = f"Tokens per second, batch 1, about {throughput['parameters'] / 1e6:.1f} M parameters"
    rows = tuple(
        (
            row["name"],
            row["weights"],
            f"write after {row['tokens']:,}" if row["work"] == "write" else f"read {row['tokens']:,}",
            seen(row, "tokens_per_s").written(0),
            seen(row, "times_ours").written(),
        )
        for row in throughput["rows"]
    )
    columns = ("contender", "weights", "work", "tokens/s", "time ÷ ours")
    return Table(title + (f"; llama.cpp of xllamacpp {peer}" if peer else ""), columns, rows)


def _long(long: Record) -> Table:
    title = f"One generation of {long['tokens']:,} tokens, {long['parameters'] / 1e6:.1f} M parameters"
    rows = tuple(
        (
            f"{mark['token']:,}",
            f"{mark['seconds_per_token'] * 1e3:.3f}",
            seen(mark, "ratio_to_first").written(3),
            f"{mark['rss_bytes'] / 1e6:,.1f}",
        )
        for mark in long["marks"]
    )
    return Table(title, ("at token", "ms per token", "÷ at token 100", "resident memory, MB"), rows)


def _step_times(record: Record) -> Panel:
    lines = []
    for (name, batch), rows in grouped(record["rows"], "name", "batch").items():
        contexts = [row["context"] for row in rows]
        label = f"{name}, batch {batch}"
        lines.append(Line.of(label, contexts, [seen(row, "seconds_per_step", 1e3) for row in rows]))
        if batch == 1:
            floors = tuple(row["floor_seconds"]["median"] * 1e3 for row in rows)
            lines.append(Line(f"{label}: memory floor", tuple(map(float, contexts)), floors, dashed=True))
    title = "Decoding, one token a sequence"
    return Panel(title, "tokens of context", "milliseconds per step", tuple(lines), log_x=True, log_y=True)


def _written(throughput: Record) -> Panel:
    """Tokens written per second after each context."""
    rows = [row for row in throughput["rows"] if row["work"] == "write"]
    lines = tuple(
        Line.of(
            f"{name}, {weights}", [row["tokens"] for row in line], [seen(row, "tokens_per_s") for row in line]
        )
        for (name, weights), line in grouped(rows, "name", "weights").items()
    )
    title = f"Writing one sequence, {throughput['parameters'] / 1e6:.0f} M parameters"
    return Panel(title, "tokens of context", "tokens per second", lines, log_x=True, from_zero=True)


def _long_times(long: Record) -> Panel:
    marks = long["marks"]
    tokens = [mark["token"] for mark in marks]
    memory = tuple(mark["rss_bytes"] / marks[0]["rss_bytes"] for mark in marks)
    lines = (
        Line.of("time per token", tokens, [seen(mark, "ratio_to_first") for mark in marks]),
        Line("resident memory", tuple(map(float, tokens)), memory),
    )
    title = f"One generation, {long['parameters'] / 1e6:.1f} M parameters"
    return Panel(
        title, "tokens generated", f"relative to token {tokens[0]}", lines, log_x=True, from_zero=True
    )
