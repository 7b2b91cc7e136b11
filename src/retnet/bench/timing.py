"""Measuring on noisy machines: interleaved rounds, limits measured beside every contender, medians of ratios.

A machine that is shared or heats up changes its speed within minutes, so two times taken apart cannot be compared. Here
every round runs every contender once and measures the physical limits right before and right after each. What is
reported is the median over rounds of a ratio formed inside a round, with the least and the greatest ratio seen.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from retnet.host import product_rate

Limits = Mapping[str, Callable[[], float]]  # name → measures a rate, per second
Say = Callable[[str], None]  # where progress goes


class Contender(NamedTuple):
    """Something whose time is measured."""

    name: str
    measure: Callable[
        [], float
    ]  # does it once, however often that is inside, and returns seconds per unit of work


class Sample(NamedTuple):
    """What one round saw of one contender."""

    seconds: float  # per unit of work
    limits: dict[str, float]  # rates per second, each the mean of those measured right before and right after


@dataclass(frozen=True)
class Spread:
    """A number measured in several rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}..{self.high:.3g})"


@dataclass(frozen=True)
class Target:
    """What a number should be; bounds are inclusive, None is no bound."""

    what: str
    seen: Spread
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool:
        """Whether the median lies within the bounds."""
        median = self.seen.median
        return (self.least is None or median >= self.least) and (self.most is None or median <= self.most)

    @property
    def wanted(self) -> str:
        """The bounds as text, such as ``"≥ 0.8"``."""
        parts = [(sign, x) for sign, x in (("≥", self.least), ("≤", self.most)) if x is not None]
        return " and ".join(f"{sign} {x:g}" for sign, x in parts)

    def record(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {"what": self.what, "wanted": self.wanted, "seen": vars(self.seen), "met": self.met}


def spread(values: Iterable[float]) -> Spread:
    """Median, least and greatest of at least one value."""
    values = list(values)
    return Spread(statistics.median(values), min(values), max(values))


def times_faster(ours: Sequence[Sample], other: Sequence[Sample]) -> Spread:
    """How many times the seconds of `ours` those of `other` are, formed round by round; above 1, ours is faster."""
    return spread(b.seconds / a.seconds for a, b in zip(ours, other, strict=True))


def interleave(
    contenders: Sequence[Contender], limits: Limits, rounds: int, say: Say
) -> dict[str, list[Sample]]:
    """Name → one sample a round, in the order of the rounds.

    Every contender first runs once unmeasured. Odd rounds go through the contenders backwards, and every two rounds begin
    with the next one, so that none always follows the same other and each stands at every place.
    """
    for contender in contenders:
        say(f"warming up: {contender.name}")
        contender.measure()
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        before = {name: measure() for name, measure in limits.items()}
        first = number // 2 % max(1, len(contenders))
        order = [*contenders[first:], *contenders[:first]]
        for contender in reversed(order) if number % 2 else order:
            say(f"round {number + 1} of {rounds}: {contender.name}")
            seconds = contender.measure()
            after = {name: measure() for name, measure in limits.items()}
            beside = {name: (before[name] + after[name]) / 2 for name in limits}
            samples[contender.name].append(Sample(seconds, beside))
            before = after
    return samples


def median_seconds(run: Callable[[], object], times: int, *, warmup: int = 1, budget: float = 2.0) -> float:
    """Median seconds of a call.

    Args:
        run: what is timed.
        times: calls at most.
        warmup: calls before them that do not count.
        budget: seconds after which no further call begins; three are always made (or `times`, if fewer).
    """
    for _ in range(warmup):
        run()
    seconds: list[float] = []
    while len(seconds) < times and (len(seconds) < 3 or sum(seconds) < budget):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def matrix_products(size: int = 1536) -> Limits:
    """Square fp32 matrix products of this size, flops per second, each the best of four, on all threads of torch.

    ``torch_mm``: by the library behind `torch.mm`; ``onednn``: by oneDNN, where torch has it. Which one is faster depends
    on the maker of the CPU; the limit of the machine is the faster.
    """
    limits: dict[str, Callable[[], float]] = {
        "torch_mm": lambda: product_rate(torch.float32, size, rounds=3),
    }
    if torch.backends.mkldnn.is_available():
        a, b = torch.ones(size, size), torch.ones(size, size)
        product = partial(torch.ops.mkldnn._linear_pointwise, a, b, None, "none", [], "")
        limits["onednn"] = lambda: 2 * size**3 / min(_seconds(product) for _ in range(4))
    return limits


def memory_bandwidth(megabytes: int = 256, read_bytes: int | None = None) -> Limits:
    """Bytes per second between memory and the cores, all threads of torch.

    ``read``: over a buffer of `read_bytes` (default: that of ``update``), by the fastest of four readers of torch: its sum,
    its sum as integers, its norm, its product with itself. Which of them is fastest changes with the size and the machine.
    A buffer of the size of what is judged has the same share of it in the caches. ``update``: multiplying a buffer of so
    many megabytes in place, where reading and writing both count. Each is the best of three passes, so a limit is rather
    too high than too low.
    """
    buffer = torch.ones(megabytes * 2**20 // 4)
    source = buffer if read_bytes is None else torch.ones(max(2, read_bytes // 8 * 2))
    whole = source.view(torch.int64)

    def best(*passes: Callable[[], object]) -> float:
        return min(_seconds(run) for run in passes for _ in range(3))

    return {
        "read": lambda: source.nbytes / best(source.sum, whole.sum, source.norm, lambda: source.dot(source)),
        "update": lambda: 2 * buffer.nbytes / best(lambda: buffer.mul_(1.0)),
    }


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
