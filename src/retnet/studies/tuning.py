"""The same tuning for all: every row trained once at each learning rate of a grid, the other seeds at its best."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from retnet.studies.protocols import Result, Results


class Training(NamedTuple):
    """One training of a study."""

    row: str  # its label
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its job."""
        return f"{slug(self.row)}.lr-{self.rate:g}.seed-{self.seed}"


class TuningGrid(NamedTuple):
    """Which trainings a study has.

    Attributes:
        rows: labels of what is compared.
        rates: the grid of learning rates.
        seeds: how many, from 0.
        loss: of a result; the rate whose result has the lowest is kept.
    """

    rows: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: int
    loss: Callable[[Result], float]

    def size(self) -> int:
        """The grid for each row, and the other seeds."""
        return len(self.rows) * (len(self.rates) + self.seeds - 1)

    def trainings(self, results: Results, failed: Collection[str]) -> dict[str, Training]:
        """Seed 0 of all rows, rate by rate: a study that is cut short has each of them once. Then the other seeds."""
        found = [Training(row, rate, 0) for rate in self.rates for row in self.rows]
        for row in self.rows:
            best = self.best(row, results, failed)
            if best is not None:
                found += [Training(row, best, seed) for seed in range(1, self.seeds)]
        return {training.name: training for training in found}

    def best(self, row: str, results: Results, failed: Collection[str]) -> float | None:
        """The rate of the lowest loss; None while a run that could still win is missing, or if all failed."""
        names = {rate: Training(row, rate, 0).name for rate in self.rates}
        if any(name not in results and name not in failed for name in names.values()):
            return None
        losses = {rate: self.loss(results[name]) for rate, name in names.items() if name in results}
        return min(losses, key=lambda rate: losses[rate]) if losses else None

    def found(self, row: str, results: Results) -> Tuned:
        """What there is of a row: a rate that has no result counts as failed."""
        tuned = {rate: results.get(Training(row, rate, 0).name) for rate in self.rates}
        rate = self.best(row, results, [Training(row, each, 0).name for each in self.rates])
        names = [] if rate is None else [Training(row, rate, seed).name for seed in range(self.seeds)]
        seeds = [results[name] for name in names if name in results]
        return Tuned(rate, seeds, {rate: result for rate, result in tuned.items() if result})


class Tuned(NamedTuple):
    """Results of one row."""

    rate: float | None  # that was kept; None while that is open
    seeds: list[Result]  # at that rate, one a seed
    by_rate: dict[float, Result]  # of the first seed


def at_end(label: str, rate: float | None, rates: Iterable[float]) -> list[str]:
    """A sentence where the rate that was kept is the lowest or the highest of those that were tried; else nothing."""
    grid = sorted(rates)
    if len(grid) < 2 or rate not in (grid[0], grid[-1]):
        return []
    end = "lowest" if rate == grid[0] else "highest"
    return [f"{label} was best at the {end} learning rate of the grid, so a better one may lie beyond."]


def slug(label: str) -> str:
    """A label as a file name: ``"− swish gate"`` → ``"swish-gate"``."""
    return "-".join(re.findall(r"[a-z0-9]+", label.lower()))
