"""The step ``decode``: the op's step and whole models as CUDA graphs, beside a Llama with its KV cache."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial

from retnet.bench import graph_decoding
from retnet.bench.graph_decoding import GraphBench, measure_graphs
from retnet.bench.implementations import OURS, HeadShape
from retnet.bench.op_steps import Step, measure_steps
from retnet.measure.clock import spread
from retnet.measure.records import lines_of, measured, said, seen, table_of
from retnet.measure.summary import Figure, Panel, Summary
from retnet.mixers import RetentionConfig
from retnet.model import ModelConfig
from retnet.progress import shown
from retnet.tables import Table
from tools.gpu_day.notebook import Found
from tools.gpu_day.ops import SHAPES, TINY
from tools.gpu_day.place import Place, Run
from tools.gpu_day.train import sizes

BATCHES = (1, 8, 64, 256)
LABELS = ("1.3B", "350M")
WANTED = 0.8  # of the bandwidth, from `FROM` rows on
FROM = 8


def steps(place: Place) -> Found:
    """The step of the op, at every batch and head shape; its states take turns, so that they come from memory."""
    shapes = (TINY,) if place.rehearsal else tuple(SHAPES.values())
    wanted = [
        Step(batch, shape, True) for shape in shapes for batch in ((1, 2) if place.rehearsal else BATCHES)
    ]
    rounds, megabytes = (1, 1) if place.rehearsal else (2, 1024)
    with shown() as say:
        until = time.monotonic() + 60 * place.minutes
        found = measure_steps(place.device, rounds, megabytes, say, until, wanted)
    ours = {row.step: row for row in found if row.name == OURS}
    updates = [s.limits["update"] for row in found for s in row.samples]
    return {
        "update_bytes_per_s": vars(spread(updates)),
        "steps": [row.record(ours[row.step]) for row in found if row.name == OURS],
    }


def model(label: str, place: Place) -> Found:
    """A whole model beside a Llama of its size."""
    if place.rehearsal:
        tiny = ModelConfig(vocab_size=97, d_model=64, num_layers=2, mixer=RetentionConfig(num_heads=2))
        bench = GraphBench(
            tiny, batches=(1, 2), contexts=(32, 64), rounds=2, steps=2, device="cpu", buffer_megabytes=1
        )
    else:
        bench = GraphBench(sizes()[label], batches=BATCHES, device=str(place.device))
    said = {"configuration": {**asdict(bench), "label": label}}
    with shown() as say:
        until = time.monotonic() + 60 * place.minutes

        def note(found: Found) -> None:
            place.note({**said, **found})

        return {**said, **measure_graphs(bench, say, until, note)}


PARTS: dict[str, Run] = {"steps": steps, **{label: partial(model, label) for label in LABELS}}


def summarise(parts: dict[str, Found]) -> Summary:
    """Shares of bandwidth, tokens per second, and how many times faster than the Llama at each context."""
    tables: list[Table] = []
    figures, findings = [], []
    if found := parts.get("steps"):
        tables.append(_table(found))
        figures.append(Figure("steps", (_panel(found),)))
        far = [row for row in found["steps"] if row["batch"] >= FROM]
        if far:
            least = min(far, key=lambda row: row["of_bandwidth"]["median"])
            findings.append(
                f"The step reaches {seen(least, 'of_bandwidth').written()} of the bandwidth at worst from batch {FROM} on "
                f"(batch {least['batch']}, {_shape(least)}); {WANTED:g} is wanted."
            )
    for label in LABELS:
        if label in parts:
            of_model, panels = graph_decoding.parts(parts[label], label)
            tables += of_model
            figures.append(Figure(f"decode-{label}", tuple(panels)))
            findings += [
                f"{label}, batch {row['batch']}: {seen(row, 'times_ours').written()} times the tokens/s of the Llama with "
                f"{row['context']:,} tokens in its cache, both as CUDA graphs."
                for row in parts[label]["rows"]
                if row["name"] == graph_decoding.STATIC
            ]
    return Summary(tuple(tables), tuple(figures), tuple(findings))


def _shape(row: Found) -> str:
    return str(HeadShape(row["heads"], row["key_dim"], row["value_dim"]))


def _table(found: Found) -> Table:
    cells = {
        "heads": _shape,
        "batch": said("batch"),
        "µs": measured("seconds", 1e6, 1),
        "bytes ÷ update bandwidth": measured("of_bandwidth"),
    }
    return table_of("A step of the op as a CUDA graph, states from memory", found["steps"], cells)


def _panel(found: Found) -> Panel:
    rows = [{**row, "shape": _shape(row)} for row in found["steps"]]
    lines = lines_of(rows, ["shape"], "batch", "of_bandwidth")
    return Panel("A step of decoding", "sequences", "bytes ÷ bandwidth", lines, log_x=True, from_zero=True)
