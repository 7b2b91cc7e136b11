"""Tables and panels of a record of `retnet bench engine`."""

from __future__ import annotations

from retnet.measure.records import Record, seen
from retnet.measure.summary import Bars, Panel
from retnet.tables import Table


def parts(record: Record) -> tuple[list[Table], list[Panel | Bars]]:
    """What `measure_engine` found."""
    rows = record["rows"]
    steps = Table(
        "Steps of the engine, median (least..greatest) over rounds",
        ("streams", "tokens are", "ms a step", "tokens/s", "÷ the decoder alone"),
        tuple(
            (
                str(row["rows"]),
                row["sampling"],
                seen(row, "seconds_per_step", 1e3).written(),
                f"{row['rows'] / row['seconds_per_step']['median']:,.0f}",
                seen(row, "over_decoder").written(3),
            )
            for row in rows
        ),
    )
    settings = Table(
        "What settings cost: seconds ÷ seconds without",
        ("setting", "of", "ratio"),
        (
            *(("exact=True", row["what"], seen(row, "ratio").written(3)) for row in record["exact"]),
            *(("draft_tokens", row["what"], seen(row, "ratio").written(3)) for row in record["drafts"]),
        ),
    )
    edits = Table(
        "A session after a restart: tokens reused, time to the first token",
        ("what", "tokens", "reused", "ms", "ms, all read again", "bytes of the file", "bytes of a state"),
        tuple(
            (
                row["what"],
                f"{row['tokens']:,}",
                f"{row['reused']:,}",
                f"{1e3 * row['seconds']:.0f}",
                f"{1e3 * row['seconds_of_reading_all']:.0f}",
                f"{row['file_bytes']:,}",
                f"{row['state_bytes']:,}",
            )
            for row in record["edits"]
        ),
    )
    bars = Bars(
        "A step of the engine",
        "÷ a step of its decoder",
        tuple(f"{row['rows']} stream{'s'[: row['rows'] > 1]}, {row['sampling']}" for row in rows),
        tuple(seen(row, "over_decoder") for row in rows),
        limit=1.1,
    )
    return [steps, settings, edits], [bars]
