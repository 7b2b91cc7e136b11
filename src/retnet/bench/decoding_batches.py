"""Decoding of batches of 1 to 64 rows: a step beside the memory's floor, its products beside torch.mm."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from retnet.engine import choose_decoder, quantise
from retnet.measure.clock import Budget, Contender, Sample, Spread, Target, interleave, median_seconds, spread
from retnet.measure.limits import memory_bandwidth
from retnet.model import LanguageModel, ModelConfig
from retnet.nn import Int8Linear, Linear
from retnet.ops import product
from retnet.progress import Say
from retnet.settings import Checked, Count

FORMATS = ("fp32", "int8")
WARMUP = 2
SECONDS = 0.25  # of one sample, three steps at least
SHORT = 0.04  # the same in the short rounds
NOTES = (
    "a step of a batch: one token for each of so many sequences, whose states lie in slots in no order; random weights",
    "floor: bytes of weights ÷ read bandwidth + 2 × bytes of states ÷ update bandwidth, each measured beside the sample. "
    "With many rows the products take longer than that",
    "products: all products of a step with so many rows, one call each, ours as the layers call them, torch.mm with fp32 "
    "weights into memory that is there",
    "time per token ÷ that of fewer rows: the speed of a shared memory changes within seconds, so steps of all numbers of "
    "rows also take turns in many short rounds; a ratio is formed inside a round, and its median reported",
)


@dataclass(frozen=True)
class BatchBench(Checked):
    """What `measure_batches` measures."""

    models: tuple[ModelConfig, ...]
    rows: tuple[Count, ...] = (1, 2, 4, 8, 16, 32, 64)
    rounds: Count = 7
    short_rounds: Count = 24  # in which numbers of rows are compared with each other
    buffer_megabytes: Count = 256  # that bandwidth is measured with


@dataclass
class BatchRow:
    """One line of the result."""

    parameters: int
    weights: str  # one of FORMATS
    batch: int
    read: int  # bytes of weights
    updated: int  # bytes of states, counted once
    step: Callable[[], object] = field(repr=False)
    ours: Callable[[], float] = field(repr=False)  # seconds of its products
    theirs: Callable[[], float] = field(repr=False)  # seconds of torch.mm
    samples: list[Sample] = field(default_factory=list)
    short: list[Sample] = field(default_factory=list)  # of the short rounds
    products: list[tuple[float, float]] = field(default_factory=list)  # ours, torch.mm

    @property
    def name(self) -> str:
        """What it is, in words."""
        return f"{self.parameters / 1e6:.0f} M parameters, {self.weights}, {self.batch} rows"

    @property
    def over_floor(self) -> Spread:
        """Time ÷ floor, round by round."""
        return spread(s.seconds / self.floor(s) for s in self.samples)

    @property
    def rate_of_torch(self) -> Spread:
        """Rate of our products ÷ that of torch.mm, round by round."""
        return spread(theirs / ours for ours, theirs in self.products)

    def floor(self, sample: Sample) -> float:
        """Seconds of the memory's traffic."""
        return self.read / sample.limits["read"] + 2 * self.updated / sample.limits["update"]

    def record(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {
            "parameters": self.parameters,
            "weights": self.weights,
            "batch": self.batch,
            "read_bytes": self.read,
            "updated_bytes": self.updated,
            "seconds_per_step": vars(spread(s.seconds for s in self.samples)),
            "tokens_per_s": vars(spread(self.batch / s.seconds for s in self.samples)),
            "over_floor": vars(self.over_floor),
            "products_seconds": vars(spread(ours for ours, _ in self.products)),
            "products_of_torch_mm": vars(self.rate_of_torch),
            "rounds": [s._asdict() for s in self.samples],
            "short_rounds": [s.seconds for s in self.short],
        }


def measure_batches(bench: BatchBench, say: Say, budget: Budget) -> dict[str, Any]:
    """All models in both formats at all numbers of rows, interleaved model by model; plain data for the record."""
    found: list[BatchRow] = []
    for number, config in enumerate(bench.models):
        rows = _rows(LanguageModel(config).eval(), bench)
        limits = memory_bandwidth(bench.buffer_megabytes, rows[0].read)
        contenders = [Contender(row.name, partial(_measure, row)) for row in rows]
        share = 0.5 / (len(bench.models) - number)
        samples = interleave(contenders, limits, bench.rounds, say, budget.deadline(0.7 * share))
        brief = [Contender(row.name, partial(_timed, row.step, SHORT)) for row in rows]
        short = interleave(brief, {}, bench.short_rounds, say, budget.deadline(0.4 * share))
        for row in rows:
            row.samples, row.short = samples[row.name], short[row.name]
            row.products = row.products[-len(row.samples) :]  # without the one that warmed up
        found += rows
    return {
        "notes": NOTES,
        "rounds": min(len(row.samples) for row in found),
        "short_rounds": min(len(row.short) for row in found),
        "rows": [row.record() for row in found],
        "targets": [target.record() for target in targets(found)],
    }


def targets(rows: Sequence[BatchRow]) -> list[Target]:
    """One row near the floor, no number of rows slower per token than fewer, products of the most near torch.mm's rate."""
    found = []
    for (parameters, weights), group in itertools.groupby(rows, lambda row: (row.parameters, row.weights)):
        steps = list(group)
        where = f"{parameters / 1e6:.0f} M parameters, {weights}"
        found.append(Target(f"{where}: time ÷ floor, {steps[0].batch} row", steps[0].over_floor, most=1.3))
        growth = [
            (
                spread(
                    b.seconds / more.batch / (a.seconds / few.batch)
                    for a, b in zip(few.short, more.short, strict=True)
                ),
                more,
            )
            for few, more in itertools.pairwise(steps)
        ]
        worst, at = max(growth, key=lambda pair: pair[0].median)
        found.append(
            Target(
                f"{where}: time per token ÷ that of fewer rows, the worst ({at.batch} rows)", worst, most=1.0
            )
        )
        last = steps[-1]
        found.append(
            Target(
                f"{where}: products of {last.batch} rows ÷ rate of torch.mm", last.rate_of_torch, least=0.7
            )
        )
    return found


def _measure(row: BatchRow) -> float:
    seconds = _timed(row.step)
    row.products.append((row.ours(), row.theirs()))
    return seconds


def _rows(model: LanguageModel, bench: BatchBench) -> list[BatchRow]:
    found = []
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
    parameters = sum(p.numel() for p in model.parameters())
    for weights, ours in zip(FORMATS, (model, quantise(model)), strict=True):
        decoder, order = choose_decoder(ours, max(bench.rows)), torch.randperm(max(bench.rows))
        decoder.reset(torch.arange(decoder.slots))
        state = sum(part.nbytes for layer in ours.init_state(1) for part in layer)
        held = [layer for layer in ours.modules() if isinstance(layer, Linear | Int8Linear)]
        read = sum(w.nbytes for layer in held for w in (*layer.parameters(), *layer.buffers()))
        for batch in bench.rows:
            step = partial(decoder.step, torch.zeros(batch, dtype=torch.long), order[:batch].clone())
            inputs = [torch.randn(batch, layer.in_features) for layer in layers]
            run = (
                step,
                partial(_timed, partial(_products, held, inputs)),
                partial(_timed, _torch_products(layers, inputs)),
            )
            found.append(BatchRow(parameters, weights, batch, read, batch * state, *run))
    return found


def _timed(run: Callable[[], object], seconds: float = SECONDS) -> float:
    with torch.inference_mode():
        return median_seconds(run, 100, warmup=WARMUP, budget=seconds)


def _products(layers: Sequence[nn.Module], inputs: Sequence[Tensor]) -> None:
    for layer, x in zip(layers, inputs, strict=True):
        if isinstance(layer, Int8Linear):
            product(x, layer.codes, layer.scale)
        elif isinstance(layer, Linear):
            product(x, layer.weight)


def _torch_products(layers: Sequence[Linear], inputs: Sequence[Tensor]) -> Callable[[], None]:
    weights = [layer.weight.detach().t() for layer in layers]
    outputs = [torch.empty(len(x), weight.shape[1]) for x, weight in zip(inputs, weights, strict=True)]

    def run() -> None:
        for x, weight, out in zip(inputs, weights, outputs, strict=True):
            torch.mm(x, weight, out=out)

    return run
