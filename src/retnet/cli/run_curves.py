"""Curves of runs: training loss and validation, as a figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from retnet.errors import UserError
from retnet.measure.summary import Figure, Line, Panel
from retnet.settings import build
from retnet.train.config import TrainConfig
from retnet.train.run_summary import BITS, RunSummary, read_metrics

PANELS = (("Training", "loss", "loss, nats per token"), ("Validation", BITS, "bits per byte"))


def curves(runs: Sequence[tuple[str, RunSummary]], points: int) -> Figure:
    """Loss and validation of runs with their names, over steps, or over tokens where steps have different sizes.

    Where a curve has more points than can be seen, each is the mean of several, between the least and the greatest.
    """
    schedules = [_schedule(run) for _, run in runs]
    sizes = {(c.tokens_per_step, c.ramp_steps, c.ramp_from) if c else None for c in schedules}
    by_tokens = len(sizes) > 1 and None not in sizes
    lines = [read_metrics(run.path) for _, run in runs]
    panels = []
    for title, key, label in PANELS:
        drawn = []
        for (name, _), schedule, read in zip(runs, schedules, lines, strict=True):
            place: Callable[[int], float] = schedule.tokens_before if by_tokens and schedule else float
            known = [(place(line["step"]), line[key]) for line in read if key in line]
            drawn.append(_line(name, known, points))
        panels.append(Panel(title, "tokens" if by_tokens else "steps", label, tuple(drawn)))
    return Figure("runs", tuple(panels))


def _schedule(run: RunSummary) -> TrainConfig | None:
    """Its [train]; None where that is of another version, or damaged."""
    section: dict[str, Any] = {
        name.removeprefix("train."): value
        for name, value in run.settings.items()
        if name.startswith("train.")
    }
    try:
        return build(TrainConfig, section) if section else None
    except UserError:
        return None


def _line(name: str, known: Sequence[tuple[float, float]], points: int) -> Line:
    size = -(-len(known) // points) or 1
    groups = [known[at : at + size] for at in range(0, len(known), size)]
    x = tuple(statistics.fmean(x for x, _ in group) if size > 1 else group[0][0] for group in groups)
    values = [[y for _, y in group] for group in groups]
    low, high = (tuple(map(end, values)) if size > 1 else () for end in (min, max))
    return Line(name, x, tuple(map(statistics.fmean, values)), low, high)
