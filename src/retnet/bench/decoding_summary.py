"""Tables and panels of a record of `retnet bench decode`."""

from __future__ import annotations

from retnet.measure.records import Record, grouped, lines_of, measured, said, seen, table_of
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
    cells = {
        "contender": said("name"),
        "batch": said("batch"),
        "context": said("context", ","),
        "ms per step": measured("seconds_per_step", 1e3),
        "floor, ms": measured("floor_seconds", 1e3),
        "time ÷ floor": measured("over_floor"),
    }
    return table_of("One token a sequence, median (least..greatest) over rounds", record["rows"], cells)


def _batches(batches: Record) -> Table:
    cells = {
        "parameters": _millions,
        "weights": said("weights"),
        "rows": said("batch"),
        "ms per step": measured("seconds_per_step", 1e3),
        "tokens/s": measured("tokens_per_s", digits=0),
        "time ÷ floor": measured("over_floor"),
        "products ÷ torch.mm": measured("products_of_torch_mm"),
    }
    title = "Steps of many rows, and the rate of their products ÷ that of torch.mm"
    return table_of(title, batches["rows"], cells)


def _millions(row: Record) -> str:
    return f"{row['parameters'] / 1e6:.0f} M"


def _rates(batches: Record) -> Panel:
    rows = [{**row, "size": _millions(row)} for row in batches["rows"]]
    lines = lines_of(rows, ["size", "weights"], "batch", "tokens_per_s")
    return Panel("Decoding many sequences", "rows", "tokens per second", lines, log_x=True, log_y=True)


def _throughput(throughput: Record) -> Table:
    peer = throughput["llama_cpp"]["versions"].get("xllamacpp")
    title = f"Tokens per second, batch 1, about {throughput['parameters'] / 1e6:.1f} M parameters"
    cells = {
        "contender": said("name"),
        "weights": said("weights"),
        "work": lambda row: f"{'write after' if row['work'] == 'write' else 'read'} {row['tokens']:,}",
        "tokens/s": measured("tokens_per_s", digits=0),
        "time ÷ ours": measured("times_ours"),
    }
    title += f"; llama.cpp of xllamacpp {peer}" if peer else ""
    return table_of(title, throughput["rows"], cells)


def _long(long: Record) -> Table:
    title = f"One generation of {long['tokens']:,} tokens, {long['parameters'] / 1e6:.1f} M parameters"
    cells = {
        "at token": said("token", ","),
        "ms per token": lambda mark: f"{mark['seconds_per_token'] * 1e3:.3f}",
        "÷ at token 100": measured("ratio_to_first", digits=3),
        "resident memory, MB": lambda mark: f"{mark['rss_bytes'] / 1e6:,.1f}",
    }
    return table_of(title, long["marks"], cells)


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
    lines = lines_of(rows, ["name", "weights"], "tokens", "tokens_per_s")
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
