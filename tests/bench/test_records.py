import json
from pathlib import Path

import pytest

from retnet.bench.report import summarise
from retnet.measure import records
from retnet.measure.summary import Bars

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_record_that_was_kept_can_be_shown(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    found = summarise(record)
    assert all(len(row) == len(table.columns) for table in found.tables for row in table.rows)
    *_, targets = found.tables
    assert [row[0] for row in targets.rows] == [target["what"] for target in record["targets"]]
    (figure,) = found.figures
    assert figure.name == records.stem(record) == path.stem
    drawn = [panel.names if isinstance(panel, Bars) else panel.lines for panel in figure.panels]
    assert drawn
    assert all(drawn)
    assert record["host"]["cpu"] in figure.title


def test_numbers_of_a_record_are_written_as_they_were_measured():
    path = next(RESULTS.glob("train.*.json"))
    record = json.loads(path.read_text(encoding="utf-8"))
    row = record["rows"][0]
    (steps,) = (table for table in summarise(record).tables if table.title.startswith("Training steps"))
    speed = row["tokens_per_s"]
    assert steps.rows[0][:4] == (
        row["name"],
        f"{row['length']:,}",
        str(row["batch"]),
        f"{speed['median']:,.0f} ({speed['low']:,.0f}..{speed['high']:,.0f})",
    )
