"""The step ``ops``: every kernel beside the ceilings; the op beside its peers, as `retnet bench ops` measures it."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from retnet.bench import kernels, ops_summary
from retnet.bench.implementations import (
    FLA,
    INDEXED,
    NARROW,
    PARALLEL,
    SPLIT,
    WIDE,
    HeadShape,
    OpsBench,
    for_device,
)
from retnet.bench.ops import measure_ops
from retnet.bench.report import targets_table
from retnet.measure.summary import Figure, Summary
from retnet.progress import shown
from retnet.tables import Table
from tools.gpu_day import fla_tuning
from tools.gpu_day.notebook import Found
from tools.gpu_day.place import Place, Run

SHAPES = {
    "256-512": HeadShape(8, 256, 512),
    "128-256": HeadShape(8, 128, 256),
    "64-128": HeadShape(16, 64, 128),
}
SQUARES = {"128-128": HeadShape(8, 128, 128), "64-64": HeadShape(16, 64, 64)}
ALL = {**SHAPES, **SQUARES}
LENGTHS = (512, 2048, 4096, 8192, 32768, 131072)
AS_WRITTEN = (INDEXED, SPLIT, PARALLEL)  # no peers of a kernel; `retnet bench ops` measures them
WITH_FLA = "fla-"  # what the names of parts begin with that stand beside it
COMPILING = 0.7  # of the time of a part that the kernels of flash-linear-attention may take to compile
TINY = HeadShape(1, 16, 32)


def measured_kernels(place: Place) -> Found:
    """Each kernel at each head shape."""
    with shown() as say:
        if place.rehearsal:
            return kernels.measure_kernels(
                place.device, (TINY,), say, tokens=32, rounds=2, product_size=256, megabytes=1
            )
        until = time.monotonic() + 60 * place.minutes
        return kernels.measure_kernels(place.device, tuple(SHAPES.values()), say, until=until)


def measured_op(name: str, without: tuple[str, ...], place: Place) -> Found:
    """The op at one head shape, over lengths, beside some of its peers."""
    options: dict[str, Any] = {"without": without, "steps": False}
    if place.rehearsal:
        options |= {"shapes": (TINY,), "lengths": (128,), "tokens": 128, "rounds": 2, "product_size": 256}
        bench = OpsBench(**options)
    else:
        options |= {"shapes": (ALL[name],), "lengths": LENGTHS, "minutes": place.minutes}
        bench = for_device(place.device, **options)
    with shown() as say:
        return {"configuration": asdict(bench), **measure_ops(bench, say)}


def measured_fla(name: str, place: Place) -> Found:
    """The op at one head shape beside flash-linear-attention, which several processes compile and one tunes before."""
    begin = time.time()
    if not place.rehearsal:
        fla_tuning.compile_all(ALL[name], place.minutes * 60 * COMPILING)
        fla_tuning.tune(ALL[name])
    tuned = time.time() - begin
    left = replace(place, seconds=max(1.0, place.seconds - tuned))
    return {**measured_op(name, (*AS_WRITTEN, NARROW, WIDE), left), "tuned_s": tuned}


PARTS: dict[str, Run] = {
    "kernels": measured_kernels,
    **{name: partial(measured_op, name, (*AS_WRITTEN, FLA)) for name in ALL},
    **{WITH_FLA + name: partial(measured_fla, name) for name in ALL},
}


def summarise(parts: dict[str, Found]) -> Summary:
    """Tables and figures of all head shapes, and what the targets say."""
    tables: list[Table] = []
    figures, findings = [], []
    if found := parts.get("kernels"):
        of_kernels, bars = kernels.parts(found)
        tables += of_kernels
        figures.append(Figure("kernels", tuple(bars)))
    named = {name: found for name, found in parts.items() if name.removeprefix(WITH_FLA) in ALL}
    panels, targets = [], []
    for found in named.values():
        of_shape, drawn = ops_summary.parts(found)
        tables += of_shape
        panels += drawn
        targets += found["targets"]
        findings += [f"Left out: {reason}." for reason in found["left_out"]]
    if panels:
        figures.append(Figure("op", tuple(panels)))
        tables.append(targets_table("Targets of the op", targets))
        findings.append(f"Targets of the op: {sum(t['met'] for t in targets)} of {len(targets)} met.")
    if named and not any(row["name"].startswith(FLA) for found in named.values() for row in found["rows"]):
        findings.append(f"{FLA} was not measured, so nothing is said about it.")
    return Summary(tuple(tables), tuple(figures), tuple(findings))
