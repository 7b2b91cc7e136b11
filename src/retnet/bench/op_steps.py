"""One decoding step of the op alone (`retention_step`), beside the bandwidth of the memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from retnet.bench.implementations import LARGE, LOOP, OURS, HeadShape
from retnet.measure.clock import (
    Contender,
    Sample,
    Spread,
    Target,
    interleave,
    spread,
    stopwatch,
    times_faster,
)
from retnet.measure.graphs import captured
from retnet.measure.limits import memory_bandwidth
from retnet.ops import log_decays, retention_step
from retnet.ops.cpu import jit
from retnet.progress import Say

LAYERS = 12  # states that a small model steps through
SHORT = 12  # rounds of steps for each round of the op: the speed of a shared memory changes within seconds


class Step(NamedTuple):
    """One size of a step."""

    batch: int
    shape: HeadShape
    cold: bool  # states come from the memory, since they do not fit into caches; else they stay there

    @property
    def state_bytes(self) -> int:
        """Of all rows of the batch, fp32."""
        H, K, V = self.shape
        return 4 * self.batch * H * K * V


STEPS = (Step(1, LARGE, True), Step(8, LARGE, True), Step(1, HeadShape(4, 64, 128), False))


@dataclass
class StepRow:
    """One line of the result."""

    name: str
    step: Step
    samples: list[Sample] = field(default_factory=list)

    @property
    def of_bandwidth(self) -> Spread:
        """Bytes of the state, in and out, per second, as a fraction of what updating a large buffer reaches."""
        return spread(2 * self.step.state_bytes / s.seconds / s.limits["update"] for s in self.samples)

    def record(self, ours: StepRow) -> dict[str, Any]:
        """Plain data for a JSON file; `ours` is our row of the same size."""
        return {
            "name": self.name,
            "batch": self.step.batch,
            **self.step.shape._asdict(),
            "cold": self.step.cold,
            "moved_bytes": 2 * self.step.state_bytes,
            "seconds": vars(spread(s.seconds for s in self.samples)),
            "of_bandwidth": vars(self.of_bandwidth),
            "times_ours": vars(times_faster(ours.samples, self.samples)),
            "rounds": [s._asdict() for s in self.samples],
        }


def measure_steps(
    device: torch.device,
    rounds: int,
    megabytes: int,
    say: Say,
    until: float = math.inf,
    steps: Sequence[Step] = STEPS,
) -> list[StepRow]:
    """All sizes of a step, interleaved, in `SHORT` times so many rounds; cold states take turns over so much memory.

    On a GPU the steps are replayed as a CUDA graph. `until` is as in `interleave`.
    """
    names = [OURS, LOOP] if device.type == "cpu" and jit.compiler() is not None else [OURS]
    rows = [StepRow(name, step) for step in steps for name in names]
    contenders = [
        Contender(
            f"{row.name}, a step of {row.step.batch} × {row.step.shape}", _measure(row, device, megabytes)
        )
        for row in rows
    ]
    limits = {"update": memory_bandwidth(megabytes, device=device)["update"]}
    samples = interleave(contenders, limits, SHORT * rounds, say, until)
    for row, contender in zip(rows, contenders, strict=True):
        row.samples = samples[contender.name]
    return rows


def _measure(row: StepRow, device: torch.device, megabytes: int) -> Callable[[], float]:
    """One pass over all states a run: seconds of a single step."""
    B, (H, K, V) = row.step.batch, row.step.shape
    count = max(1, megabytes * 2**20 // row.step.state_bytes) if row.step.cold else LAYERS
    states = torch.zeros(count, B, H, K, V, device=device).unbind(0)
    q, k, v = (torch.randn(B, H, width, device=device) for width in (K, K, V))
    log_decay, backend = log_decays("paper", H).to(device), "auto" if row.name == OURS else "torch"

    def run() -> None:
        for state in states:
            retention_step(q, k, v, log_decay, state, backend=backend)

    timed = stopwatch(captured(run, device), device, units=count, budget=0.05)

    def measure() -> float:
        with torch.inference_mode():
            return timed()

    return measure


def step_targets(rows: list[StepRow], device: torch.device) -> list[Target]:
    """Near the memory's speed where the state is large, and cheap to call where it is small; a GPU: from batch 8."""
    found = []
    for row in rows:
        what = f"B {row.step.batch}, {row.step.shape}"
        if row.name != OURS:
            continue
        if row.step.cold and (device.type == "cpu" or row.step.batch >= 8):
            least = 0.75 if device.type == "cpu" else 0.80
            found.append(Target(f"step: bytes ÷ bandwidth, {what}", row.of_bandwidth, least=least))
        elif not row.step.cold and device.type == "cpu":
            microseconds = spread(1e6 * s.seconds for s in row.samples)
            found.append(Target(f"step: microseconds of a call, {what}", microseconds, most=15))
    return found
