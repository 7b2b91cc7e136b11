"""The step ``train``: the paper's table of training cost, by the study ``training-cost`` at scale ``gpu``."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial

from retnet.measure.summary import Summary
from retnet.model import ModelConfig
from retnet.paper import TRAINING_COST
from retnet.settings import build
from retnet.studies.protocols import Result
from retnet.studies.study import load_study
from retnet.studies.study_files import find_study
from retnet.studies.training import ModelSize, TrainingGrid, TrainingMeasure, speed
from retnet.studies.training_summary import FLASH, OURS, PLAIN, faster
from retnet.studies.training_summary import summarise as summary_of
from retnet.tables import MISSING, Table
from tools.gpu_day.notebook import Found
from tools.gpu_day.place import Place, Run, usable

LABELS = ("1.3B", "350M")
COMPILED = "-compiled"
PAPER_LENGTH = 8192
TINY_MODEL = {
    "vocab_size": 64,
    "d_model": 64,
    "num_layers": 1,
    "mixer": {"name": "retention", "num_heads": 2},
}
TINY = {
    "sizes": [{"label": "tiny", "model": TINY_MODEL}],
    "lengths": [32, 64],
    "tokens": 64,
    "head_width": 32,
    "rounds": 2,
    "device": "cpu",
    "memory": "step",
    "activation_checkpointing": True,
}


def grid() -> TrainingGrid:
    """What the study measures."""
    measure = load_study(find_study("training-cost", "gpu")).measure
    assert isinstance(measure, TrainingMeasure)
    return measure.steps


def sizes() -> dict[str, ModelConfig]:
    """Label → model."""
    return {size.label: size.model for size in grid().sizes}


def cost(label: str, compiled: bool, place: Place) -> Found:
    """One size: seconds and memory of a step of RetNet and both Transformers, noted length by length.

    The length that the paper's table is of comes first; compiled, it is the only one.
    """
    steps = build(TrainingGrid, TINY) if place.rehearsal else grid()
    size = steps.sizes[0] if place.rehearsal else steps.size(label)
    steps = replace(steps, sizes=(size,), compile=compiled, device=str(place.device))
    first = PAPER_LENGTH if PAPER_LENGTH in steps.lengths else steps.lengths[-1]
    others = () if compiled else tuple(length for length in steps.lengths if length != first)
    found: Found = {"size": ModelSize(label, size.model).label, "lengths": [], "tokens": steps.tokens}
    for length in (first, *others):
        found = _with(found, length, speed(replace(steps, lengths=(length,)), size, lambda part: None))
        place.note(found)
        gc.collect()  # a model of 1.3 B parameters, its gradients and moments
        usable(place.device)
    return found


def _with(found: Found, length: int, more: Result) -> Found:
    """What was found, and what was at another length."""
    return {
        **found,
        **more,
        "lengths": sorted([*found["lengths"], length]),
        "interleaved": found.get("interleaved", True) and more["interleaved"],
        "parameters": found.get("parameters", {}) | more["parameters"],
        **{key: [*found.get(key, []), *more[key]] for key in ("rows", "skipped")},
    }


PARTS: dict[str, Run] = {
    **{label: partial(cost, label, False) for label in LABELS},
    **{label + COMPILED: partial(cost, label, True) for label in LABELS},
}


def summarise(parts: dict[str, Found]) -> Summary:
    """The ratios beside the published ones; the study's own tables, eager and compiled."""
    tables: list[Table] = []
    figures, findings = [], []
    for name, found in parts.items():
        label, how = found["size"], _how(name)
        shown = summary_of([label], found["lengths"], found["tokens"], {label: found}, {})
        tables += [replace(shown.tables[0], title=f"{shown.tables[0].title}, {how}")]
        figures += [replace(figure, name=f"{figure.name}-{how}") for figure in shown.figures]
        findings += [
            f"{sentence[:-1]} ({how})." for sentence in shown.findings if "the paper's" not in sentence
        ]
    if parts:
        published = summary_of([], [], 1, {}, {}).tables[-1]
        tables = [_ratios(parts), *tables, published]
    return Summary(tuple(tables), tuple(figures), tuple(findings))


def _ratios(parts: dict[str, Found]) -> Table:
    """How many times the tokens/s of each Transformer, and how many times less memory; the paper's beside."""
    rows = []
    for name, found in parts.items():
        length = PAPER_LENGTH if PAPER_LENGTH in found["lengths"] else found["lengths"][-1]
        peaks = {row["kind"]: row.get("peak_bytes") for row in found["rows"] if row["length"] == length}
        published = TRAINING_COST.get(found["size"])
        for number, than in enumerate((PLAIN, FLASH)):
            speed, (ours, theirs) = faster(found, than, length), (peaks.get(OURS), peaks.get(than))
            memory, words = published or ((), ())
            rows.append(
                (
                    f"{found['size']}, {_how(name)}",
                    than,
                    str(speed or MISSING),
                    f"{words[2] / words[number]:.2f}" if words else MISSING,
                    f"{theirs / ours:.2f}" if ours and theirs else MISSING,
                    f"{memory[number] / memory[2]:.2f}" if memory else MISSING,
                )
            )
    columns = ("size", "beside", "tokens/s: RetNet ÷ it", "the paper's", "memory: it ÷ RetNet", "the paper's")
    return Table(f"Ratios at {PAPER_LENGTH:,} tokens a sequence", columns, tuple(rows))


def _how(name: str) -> str:
    return "compiled" if name.endswith(COMPILED) else "eager"
