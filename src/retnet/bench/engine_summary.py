"""Tables and panels of a record of `retnet bench engine`."""

from __future__ import annotations

from retnet.measure.records import Record, measured, said, seen, table_of
from retnet.measure.summary import Bars, Panel
from retnet.tables import Table


def parts(record: Record) -> tuple[list[Table], list[Panel | Bars]]:
    """What `measure_engine` found."""
    rows = record["rows"]
    steps = table_of(
        "Steps of the engine, median (least..greatest) over rounds",
        rows,
        {
            "streams": said("rows"),
            "tokens are": said("sampling"),
            "ms a step": measured("seconds_per_step", 1e3),
            "tokens/s": lambda row: f"{row['rows'] / row['seconds_per_step']['median']:,.0f}",
            "÷ the decoder alone": measured("over_decoder", digits=3),
        },
    )
    settings = table_of(
        "What settings cost: seconds ÷ seconds without",
        [
            *({"setting": "exact=True", **row} for row in record["exact"]),
            *({"setting": "draft_tokens", **row} for row in record["drafts"]),
        ],
        {"setting": said("setting"), "of": said("what"), "ratio": measured("ratio", digits=3)},
    )
    edits = table_of(
        "A session after a restart: tokens reused, time to the first token",
        record["edits"],
        {
            "what": said("what"),
            "tokens": said("tokens", ","),
            "reused": said("reused", ","),
            "ms": lambda row: f"{1e3 * row['seconds']:.0f}",
            "ms, all read again": lambda row: f"{1e3 * row['seconds_of_reading_all']:.0f}",
            "bytes of the file": said("file_bytes", ","),
            "bytes of a state": said("state_bytes", ","),
        },
    )
    bars = Bars(
        "A step of the engine",
        "÷ a step of its decoder",
        tuple(f"{row['rows']} stream{'s'[: row['rows'] > 1]}, {row['sampling']}" for row in rows),
        tuple(seen(row, "over_decoder") for row in rows),
        limit=1.1,
    )
    return [steps, settings, edits], [bars]
