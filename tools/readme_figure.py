"""`python -m tools.readme_figure`: the README's picture, time per token over context, from a benchmark's record."""

import argparse
import json
import sys
from pathlib import Path

from retnet.measure.figures import write_png
from retnet.measure.records import Record, lines_of
from retnet.measure.summary import Figure, Panel

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks/results/decode.amd-epyc-2c.json"
PICTURE = ROOT / "docs/images/decode.png"
NAMES = {"retnet": "this RetNet, its state", "llama": "a Llama of equal size, its KV cache"}


def main(arguments: list[str] | None = None) -> int:
    """Draws the picture anew; see `figure`."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.readme_figure", description="Draws the README's picture."
    )
    parser.add_argument(
        "record", nargs="?", type=Path, default=RECORD, help="written by `retnet bench decode`"
    )
    parser.add_argument("picture", nargs="?", type=Path, default=PICTURE, help="the PNG file to write")
    chosen = parser.parse_args(arguments)
    write_png(figure(json.loads(chosen.record.read_text(encoding="utf-8"))), chosen.picture)
    print(f"wrote {chosen.picture}")
    return 0


def figure(record: Record) -> Figure:
    """Milliseconds per token of one sequence over its context: ours, and what reads a cache that grows."""
    alone = [row for row in record["rows"] if row["batch"] == 1 and row["name"] in NAMES]
    named = [{**row, "name": NAMES[row["name"]]} for row in alone]
    lines = lines_of(named, ["name"], "context", "seconds_per_step", 1e3)
    host = record["host"]
    title = f"Decoding one sequence, {host['cpu']}, {host['threads']} threads, fp32"
    panel = Panel(title, "tokens of context", "milliseconds per token", lines, log_x=True, log_y=True)
    return Figure("decode", (panel,))


if __name__ == "__main__":
    sys.exit(main())
