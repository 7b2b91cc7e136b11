"""Tables and panels of a record of `retnet bench ops`."""

from __future__ import annotations

from retnet.measure.records import Record, grouped, lines_of, measured, said, seen, table_of
from retnet.measure.summary import Bars, Panel
from retnet.tables import MISSING, Table

SHAPE = ("heads", "key_dim", "value_dim")
BOTH = "forward + backward"


def parts(record: Record) -> tuple[list[Table], list[Panel | Bars]]:
    """What `measure_ops` found."""
    panels: list[Panel | Bars] = [*_times(record), _rates(record)]
    tables = _tables(record)
    if record["steps"]:
        panels.append(_step_bars(record))
        tables.append(_step_table(record))
    return tables, panels


def _tables(record: Record) -> list[Table]:
    """One for each head shape; a line holds the medians of one contender at one length, forward and with backward."""
    columns = (
        "contender",
        "T",
        "B",
        "forward, ms",
        "÷ ours",
        "+ backward, ms",
        "÷ ours",
        "÷ torch.mm",
        "÷ fastest",
    )
    tables = []
    for (H, K, V), of_shape in grouped(record["rows"], *SHAPE).items():
        rows = []
        for (length, batch, name), line in grouped(of_shape, "length", "batch", "name").items():
            modes = {row["mode"]: row for row in line}
            forward, both = _medians(modes.get("forward")), _medians(modes.get(BOTH))
            rows.append((name, f"{length:,}", str(batch), *forward[:2], *both))
        title = f"The op, H {H}, K {K}, V {V}, medians; flops of forward + backward ÷ matrix products"
        tables.append(Table(title, columns, tuple(rows), _not_measured(record, (H, K, V))))
    return tables


def _not_measured(record: Record, shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Sentences; older records do not say."""
    of_shape = [row for row in record.get("not_measured", ()) if tuple(row[key] for key in SHAPE) == shape]
    return tuple(
        f"Not measured: {name}, {' and '.join(row['mode'] for row in rows)}, T "
        f"{', '.join(f'{n:,}' for n in rows[0]['lengths'])}: {why}."
        for (name, why, _), rows in grouped(
            [{**row, "which": tuple(row["lengths"])} for row in of_shape], "name", "why", "which"
        ).items()
    )


def _medians(row: Record | None) -> tuple[str, ...]:
    """ms of a call, times as long as ours, flops ÷ rate of torch.mm, ÷ that of the fastest library."""
    scales = {"seconds": 1e3, "times_ours": 1.0, "of_torch_mm": 1.0, "of_limit": 1.0}
    return tuple(
        f"{row[key]['median'] * scale:,.2f}" if row and row[key] else MISSING for key, scale in scales.items()
    )


def _step_table(record: Record) -> Table:
    of_bandwidth = measured("of_bandwidth")
    cells = {
        "contender": said("name"),
        **dict(zip("BHKV", map(said, ("batch", *SHAPE)), strict=True)),
        "µs": measured("seconds", 1e6, 1),
        "÷ ours": measured("times_ours"),
        "bytes ÷ update bandwidth": lambda row: of_bandwidth(row) if row["cold"] else "in the caches",
    }
    return table_of("A step of decoding, median (least..greatest) over rounds", record["steps"], cells)


def _times(record: Record) -> list[Panel]:
    """Forward + backward of every contender by length, for each head shape."""
    both = [row for row in record["rows"] if row["mode"] == BOTH]
    panels = []
    for shape, of_shape in grouped(both, *SHAPE).items():
        lines = lines_of(of_shape, ["name"], "length", "seconds_per_token", 1e6)
        title = "Forward + backward, H {}, K {}, V {}".format(*shape)
        panels.append(
            Panel(title, "tokens of a sequence", "microseconds per token", lines, log_x=True, log_y=True)
        )
    return panels


def _rates(record: Record) -> Panel:
    """Ours beside the matrix products, by length."""
    ours = [row for row in record["rows"] if row["name"] == record["rows"][0]["name"]]
    label = "H {}, K {}, V {}, {}"
    lines = lines_of(ours, [*SHAPE, "mode"], "length", "of_torch_mm", label=label)
    title, y_label = "Our op beside the machine's matrix products", "flops ÷ products by torch.mm"
    return Panel(title, "tokens of a sequence", y_label, lines, log_x=True, from_zero=True)


def _step_bars(record: Record) -> Bars:
    rows = [row for row in record["steps"] if row["cold"]]
    return Bars(
        "A step of decoding, H {heads}, K {key_dim}, V {value_dim}".format(**rows[0]),
        "bytes of the state, in and out ÷ bandwidth of an update",
        tuple(f"{row['name']}, B {row['batch']}" for row in rows),
        tuple(seen(row, "of_bandwidth") for row in rows),
        limit=1.0,
    )
