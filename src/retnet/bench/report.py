"""Reports of benchmark records: tables, one picture of all panels, and how fast the machine was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console

from retnet import host
from retnet.bench import decoding_summary, engine_summary, ops_summary, serving_summary, training_summary
from retnet.measure import records
from retnet.measure.records import Record, measured, said, seen, stem, table_of
from retnet.measure.summary import Figure, Summary
from retnet.tables import Table, print_tables

MEMORY = "malloc keeps freed memory (retnet.host.keep_freed_memory), for all contenders alike, unless said"
PARTS = {
    "train": training_summary.parts,
    "decode": decoding_summary.parts,
    "engine": engine_summary.parts,
    "ops": ops_summary.parts,
    "serve": serving_summary.parts,
}


def complete(name: str, configuration: Mapping[str, Any], measured: Mapping[str, Any]) -> Record:
    """The record of a benchmark: what was measured, and where, when and with what."""
    peers = host.versions("transformers")
    return records.complete(name, configuration, {"peers": peers, "memory": MEMORY, **measured})


def summarise(record: Record) -> Summary:
    """Tables and the figure of a record, finished by `complete`."""
    tables, panels = PARTS[record["name"].removesuffix("-quick")](record)
    about = record["host"]
    title = (
        f"{about['cpu']}, {about['threads']} threads, torch {about['versions']['torch']}, {record['date'][:10]}: "
        "medians over rounds, bars from the least to the greatest"
    )
    rounds = "; ".join(f"{part} {made}" for part, made in record.get("rounds", {}).items())
    limits = "; ".join(
        f"{name} {seen(record['limits'], name, 1e-9).written(1)} G" for name in record["limits"]
    )
    return Summary(
        (*tables, _targets(record)),
        (Figure(stem(record), tuple(panels), title=title),),
        (
            *record.get("throughput", {}).get("llama_cpp", {}).get("not_measured", ()),
            *record.get("not_measured", ()),
            *([f"rounds: {rounds}"] if rounds else []),
            *([f"limits, median (least..greatest): {limits}"] if limits else []),
        ),
    )


def show(summary: Summary, console: Console) -> None:
    """Prints the tables of a record."""
    print_tables(summary.tables, console)
    click.echo()
    for sentence in summary.findings:
        click.echo(sentence)


def _targets(record: Record) -> Table:
    quick = " (meaningless after a quick run)" if record["configuration"]["quick"] else ""
    return targets_table(f"Targets{quick}", record["targets"])


def targets_table(title: str, targets: list[Record]) -> Table:
    """What was wanted, what was seen, and whether that is met."""
    cells = {"what": said("what"), "wanted": said("wanted"), "seen": measured("seen", digits=3)}
    return table_of(title, targets, {**cells, "met": lambda target: "yes" if target["met"] else "NO"})
