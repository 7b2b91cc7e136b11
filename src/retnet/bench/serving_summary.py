"""Tables and panels of a record of `retnet bench serve`."""

from __future__ import annotations

from retnet.measure.records import Cell, Record, grouped, lines_of, measured, said, seen, table_of
from retnet.measure.summary import Bars, Line, Panel
from retnet.tables import Table


def parts(record: Record) -> tuple[list[Table], list[Panel | Bars]]:
    """What `measure_serving` found."""
    rates = [
        _panel(record, context, "tokens_per_s", "tokens per second, all streams")
        for (context,) in grouped(record["rows"], "context")
    ]
    first = min((row["context"] for row in record["rows"]), default=0)
    waits = _panel(record, first, "between_tokens_p99", "seconds between tokens, 99 of 100")
    return [_points(record), _overhead(record), _chats(record)], [
        *rates,
        waits,
        _turns(record),
        _memory(record),
    ]


def _points(record: Record) -> Table:
    cells = {
        "server": said("name"),
        "weights": said("weights"),
        "context": said("context", ","),
        "streams": said("streams"),
        "tokens/s": measured("tokens_per_s", digits=1),
        "first token, s, p50 / p99": _two("first_token", 1.0, 3),
        "between tokens, ms, p50 / p99": _two("between_tokens", 1e3, 2),
        "memory, MB": lambda row: f"{row['rss_bytes'] / 1e6:,.0f}",
    }
    size, tokens = record["parameters"] / 1e6, record["configuration"]["tokens"]
    title = f"Servers, about {size:.1f} M parameters, {tokens} tokens a stream"
    return table_of(title, record["rows"], cells)


def _two(name: str, factor: float, digits: int) -> Cell:
    """Median and 99th percentile."""
    return lambda row: " / ".join(
        f"{row[f'{name}_p{share}']['median'] * factor:,.{digits}f}" for share in (50, 99)
    )


def _overhead(record: Record) -> Table:
    cells = {
        "weights": said("weights"),
        "streams": said("streams"),
        "server, ms a step": measured("served_seconds", 1e3, 3),
        "decoder, ms a step": measured("bare_seconds", 1e3, 3),
        "ratio": measured("ratio", digits=3),
    }
    return table_of("Server and engine beside the bare decoder", record["overhead"], cells)


def _chats(record: Record) -> Table:
    turns = record["configuration"]["turns"]
    cells = {
        "server": said("name"),
        "seconds of turn 2": lambda chat: f"{chat['turns'][1]['median']:.3f}",
        f"of turn {turns}": lambda chat: f"{chat['turns'][-1]['median']:.3f}",
        "ratio": measured("growth", digits=3),
    }
    return table_of(f"A chat of {turns} turns", record["chats"], cells)


def _panel(record: Record, context: int, key: str, label: str) -> Panel:
    rows = [row for row in record["rows"] if row["context"] == context]
    lines = lines_of(rows, ["name", "weights"], "streams", key)
    return Panel(f"Prompts of {context:,} tokens", "streams", label, lines, log_x=True, log_y=True)


def _turns(record: Record) -> Panel:
    lines = tuple(
        Line.of(
            f"{chat['name']}, fp32",
            range(1, len(chat["turns"]) + 1),
            [seen({"x": t}, "x") for t in chat["turns"]],
        )
        for chat in record["chats"]
    )
    return Panel("A chat", "turn", "seconds of a turn", lines, from_zero=True)


def _memory(record: Record) -> Panel:
    """Of the most streams that every context has."""
    rows = record["rows"]
    contexts = {row["context"] for row in rows}
    whole = [
        n
        for n in {r["streams"] for r in rows}
        if {r["context"] for r in rows if r["streams"] == n} == contexts
    ]
    most = max(whole, default=1)
    lines = tuple(
        Line(
            f"{name}, {weights}",
            tuple(float(row["context"]) for row in line),
            tuple(row["rss_bytes"] / 1e6 for row in line),
        )
        for (name, weights), line in grouped(
            [row for row in rows if row["streams"] == most], "name", "weights"
        ).items()
    )
    return Panel(
        f"Memory, {most} streams", "tokens of context", "MB resident, at most", lines, log_x=True, log_y=True
    )
