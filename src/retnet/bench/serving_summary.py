"""Tables and panels of a record of `retnet bench serve`."""

from __future__ import annotations

from retnet.measure.records import Record, grouped, seen
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
    columns = (
        "server",
        "weights",
        "context",
        "streams",
        "tokens/s",
        "first token, s, p50 / p99",
        "between tokens, ms, p50 / p99",
        "memory, MB",
    )
    rows = tuple(
        (
            row["name"],
            row["weights"],
            f"{row['context']:,}",
            str(row["streams"]),
            seen(row, "tokens_per_s").written(1),
            _two(row, "first_token", 1.0, 3),
            _two(row, "between_tokens", 1e3, 2),
            f"{row['rss_bytes'] / 1e6:,.0f}",
        )
        for row in record["rows"]
    )
    size, tokens = record["parameters"] / 1e6, record["configuration"]["tokens"]
    title = f"Servers, about {size:.1f} M parameters, {tokens} tokens a stream"
    return Table(title, columns, rows)


def _two(row: Record, name: str, factor: float, digits: int) -> str:
    """Median and 99th percentile."""
    half, most = (row[f"{name}_p{share}"]["median"] * factor for share in (50, 99))
    return f"{half:,.{digits}f} / {most:,.{digits}f}"


def _overhead(record: Record) -> Table:
    columns = ("weights", "streams", "server, ms a step", "decoder, ms a step", "ratio")
    rows = tuple(
        (
            row["weights"],
            str(row["streams"]),
            seen(row, "served_seconds", 1e3).written(3),
            seen(row, "bare_seconds", 1e3).written(3),
            seen(row, "ratio").written(3),
        )
        for row in record["overhead"]
    )
    return Table("Server and engine beside the bare decoder", columns, rows)


def _chats(record: Record) -> Table:
    rows = tuple(
        (
            chat["name"],
            f"{chat['turns'][1]['median']:.3f}",
            f"{chat['turns'][-1]['median']:.3f}",
            seen(chat, "growth").written(3),
        )
        for chat in record["chats"]
    )
    turns = record["configuration"]["turns"]
    columns = ("server", "seconds of turn 2", f"of turn {turns}", "ratio")
    return Table(f"A chat of {turns} turns", columns, rows)


def _panel(record: Record, context: int, key: str, label: str) -> Panel:
    rows = [row for row in record["rows"] if row["context"] == context]
    lines = tuple(
        Line.of(f"{name}, {weights}", [row["streams"] for row in line], [seen(row, key) for row in line])
        for (name, weights), line in grouped(rows, "name", "weights").items()
    )
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
