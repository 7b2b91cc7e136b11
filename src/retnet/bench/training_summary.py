"""Tables and panels of a record of `retnet bench train`."""

from __future__ import annotations

from retnet.measure.records import Record, lines_of, measured, said, seen, table_of
from retnet.measure.summary import Bars, Panel
from retnet.tables import Table


def parts(record: Record) -> tuple[list[Table], list[Panel | Bars]]:
    """What `measure_training` found."""
    length = record["op"]["shape"]["T"]
    op = record["op"]["rows"]
    bars = Bars(
        f"The op alone, T {length:,}",
        "milliseconds, forward + backward",
        tuple(row["name"] for row in op),
        tuple(seen(row, "seconds", 1e3) for row in op),
    )
    panels: list[Panel | Bars] = [
        _by_length(record, "Training steps", "tokens per second", "tokens_per_s"),
        _by_length(record, "Beside the machine's matrix products", "model flops ÷ fp32 products", "of_limit"),
        bars,
    ]
    return [_op(record), _steps(record)], panels


def _steps(record: Record) -> Table:
    cells = {
        "contender": said("name"),
        "T": said("length", ","),
        "batch": said("batch"),
        "tokens/s": measured("tokens_per_s", digits=0),
        "model flops ÷ fp32 products": measured("of_limit"),
        "÷ torch.mm": measured("of_torch_mm"),
    }
    return table_of("Training steps, median (least..greatest) over rounds", record["rows"], cells)


def _op(record: Record) -> Table:
    shape = " ".join(f"{name} {size}" for name, size in record["op"]["shape"].items())
    columns = ("contender", "ms", "÷ ours", "ms, memory kept", "÷ ours")
    rows = tuple(
        (
            pair[0]["name"],
            *(
                cell
                for row in pair
                for cell in (seen(row, "seconds", 1e3).written(1), seen(row, "times_ours").written())
            ),
        )
        for pair in zip(record["op"]["rows"], record["op"]["rows_with_kept_memory"], strict=True)
    )
    return Table(f"The op alone, forward + backward, {shape}", columns, rows)


def _by_length(record: Record, title: str, y_label: str, key: str) -> Panel:
    lines = lines_of(record["rows"], ["name"], "length", key)
    x_label = "tokens of a sequence (equal tokens a step)"
    return Panel(title, x_label, y_label, lines, log_x=True, from_zero=True)
