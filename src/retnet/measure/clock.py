"""Timing on noisy machines: interleaved rounds, limits measured beside every contender, medians of ratios.

A machine that is shared or heats up changes its speed within minutes, so two times taken apart cannot be compared. Here
every round runs every contender once and measures the physical limits right before and right after each. What is
reported is the median over rounds of a ratio formed inside a round, with the least and the greatest ratio seen.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from retnet.progress import Say

CPU = torch.device("cpu")
Limits = Mapping[str, Callable[[], float]]  # name → measures a rate, per second
ENOUGH = 3  # rounds that a median can be taken of, whatever time they take


class Contender(NamedTuple):
    """Something whose time is measured."""

    name: str
    # does it once, however often that is inside, and returns seconds per unit of work
    measure: Callable[[], float]


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

    def times(self, factor: float) -> Spread:
        """The same in another unit."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)

    def written(self, digits: int = 2) -> str:
        """As text with so many digits after the point."""
        median, low, high = (f"{x:,.{digits}f}" for x in (self.median, self.low, self.high))
        return f"{median} ({low}..{high})"


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


class Budget:
    """Time that a benchmark may take, shared out among its parts; what one of them leaves over, the next ones have."""

    def __init__(self, minutes: float | None, within: Budget | None = None) -> None:
        end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._end: float = end if within is None else min(end, within._end)

    def deadline(self, share: float = 1.0) -> float:
        """When a part has to end that may take this share of what is left (see `interleave`)."""
        now = time.monotonic()
        return now + share * max(0.0, self._end - now)


def interleave(
    contenders: Sequence[Contender], limits: Limits, rounds: int, say: Say, until: float = math.inf
) -> dict[str, list[Sample]]:
    """Name → one sample a round, in the order of the rounds.

    Every contender first runs once unmeasured. Odd rounds go through the contenders backwards, and every two rounds begin
    with the next one, so that none always follows the same other and each stands at every place.

    Args:
        contenders: what is measured, each under a name of its own.
        limits: what is measured on both sides of each of them.
        rounds: how many.
        say: where progress goes.
        until: on the clock of `time.monotonic`; once there are `ENOUGH` rounds, none begins that would end later.
    """
    for number, contender in enumerate(contenders):
        say(f"warming up: {contender.name}", number / len(contenders) / (rounds + 1))
        contender.measure()
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in contenders}
    begin = time.monotonic()
    for number in range(rounds):
        now = time.monotonic()
        if number >= ENOUGH and now + (now - begin) / number > until:
            break
        before = {name: measure() for name, measure in limits.items()}
        first = number // 2 % max(1, len(contenders))
        order = [*contenders[first:], *contenders[:first]]
        for place, contender in enumerate(reversed(order) if number % 2 else order):
            done = (1 + number + place / len(contenders)) / (rounds + 1)
            say(f"round {number + 1} of {rounds}: {contender.name}", done)
            seconds = contender.measure()
            after = {name: measure() for name, measure in limits.items()}
            beside = {name: (before[name] + after[name]) / 2 for name in limits}
            samples[contender.name].append(Sample(seconds, beside))
            before = after
    return samples


def rounds_made(parts: Mapping[str, Mapping[str, Sequence[Sample]]]) -> dict[str, int]:
    """Part of a benchmark → how many rounds it had, of what `interleave` returned."""
    return {part: max(map(len, samples.values())) for part, samples in parts.items() if samples}


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


def least_seconds(run: Callable[[], object], times: int, device: torch.device = CPU) -> float:
    """Seconds of the fastest of so many calls; those of a GPU are waited for."""
    seconds = []
    for _ in range(times):
        wait(device)
        begin = time.perf_counter()
        run()
        wait(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def wait(device: torch.device) -> None:
    """Until everything queued on a GPU is done; a CPU has nothing queued."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def stopwatch(
    run: Callable[[], object], device: torch.device, units: float = 1.0, budget: float = 0.15
) -> Callable[[], float]:
    """Measures seconds of a call ÷ `units`: the median of as many calls as the budget, in seconds, holds, at most 20.

    How many that is, the first measurement finds out (the one that `interleave` does not count). On a GPU, calls that
    are shorter than 10 ms are timed several at once.
    """
    times, queued = 0, 1

    def all_queued() -> None:
        for _ in range(queued):
            run()
        wait(device)

    def measure() -> float:
        nonlocal times, queued
        wait(device)
        seconds = median_seconds(all_queued, times or 1, warmup=int(times > 1), budget=budget) / queued
        if not times:
            queued = 1 if device.type == "cpu" else max(1, min(50, int(0.01 / seconds)))
            times = max(1, min(20, int(budget / seconds / queued)))
        return seconds / units

    return measure
