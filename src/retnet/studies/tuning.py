"""The same tuning for all: every row trained once at each learning rate of a grid, the other seeds at its best."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from retnet.settings import At, Items, UserError
from retnet.studies.protocols import Job, Result, Results
from retnet.tables import MISSING, Table

# learning rates that are tried
Rates = Annotated[tuple[Annotated[float, At(above=0, most=1e3)], ...], Items()]


class Training(NamedTuple):
    """One training of a study."""

    row: Any  # what is trained; it has a label
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its job."""
        return f"{slug(self.row.label)}.lr-{self.rate:g}.seed-{self.seed}"


class TunedRows:
    """What measures share that train each of their rows on one grid.

    Attributes:
        rows: what is compared, each with a label.
        learning_rates: the grid.
        seeds: how many, from 0.
    """

    rows: tuple[Any, ...]
    learning_rates: tuple[float, ...]
    seeds: int

    def job(self, out: Path, training: Training) -> Job:
        """What does one training, in the folder `out` of the study."""
        raise NotImplementedError

    def loss(self, result: Result) -> float:
        """Of a result; the rate whose result has the lowest is kept."""
        raise NotImplementedError

    @property
    def runs(self) -> int:
        """Of each row: the grid, and the other seeds."""
        return len(self.learning_rates) + self.seeds - 1

    def count(self) -> int:
        """Jobs in all."""
        return len(self.rows) * self.runs

    def jobs(self, out: Path, results: Results, failed: Collection[str]) -> dict[str, Job]:
        """Seed 0 of all rows, rate by rate: a study that is cut short has each of them once. Then the other seeds."""
        found = [Training(row, rate, 0) for rate in self.learning_rates for row in self.rows]
        for row in self.rows:
            best = self._best(row, results, failed)
            if best is not None:
                found += [Training(row, best, seed) for seed in range(1, self.seeds)]
        return {training.name: self.job(out, training) for training in found}

    def found(self, results: Results) -> list[TunedRow]:
        """What there is of each row: a rate that has no result counts as failed."""
        return [self._found(row, results) for row in self.rows]

    def _found(self, row: Any, results: Results) -> TunedRow:  # noqa: ANN401
        names = {rate: Training(row, rate, 0).name for rate in self.learning_rates}
        rate = self._best(row, results, names.values())
        seeds = [] if rate is None else [Training(row, rate, seed).name for seed in range(self.seeds)]
        by_rate = {rate: results[name] for rate, name in names.items() if name in results}
        return TunedRow(row, rate, [results[name] for name in seeds if name in results], by_rate)

    def _best(self, row: Any, results: Results, failed: Collection[str]) -> float | None:  # noqa: ANN401
        """The rate of the lowest loss; None while a run that could still win is missing, or if all failed."""
        names = {rate: Training(row, rate, 0).name for rate in self.learning_rates}
        if any(name not in results and name not in failed for name in names.values()):
            return None
        losses = {rate: self.loss(results[name]) for rate, name in names.items() if name in results}
        return min(losses, key=lambda rate: losses[rate]) if losses else None


class TunedRow(NamedTuple):
    """One row of a study, as far as it has come."""

    row: Any
    rate: float | None  # that was kept; None while that is open
    seeds: list[Result]  # at that rate, one a seed
    by_rate: dict[float, Result]  # of the first seed

    @property
    def label(self) -> str:
        """In tables."""
        return str(self.row.label)

    def values(self, *keys: str) -> list[float]:
        """What results say under these keys, one inside the other, seed by seed."""
        found: list[Any] = self.seeds
        for key in keys:
            found = [result[key] for result in found]
        return found


def tuning_table(found: Iterable[TunedRow], shown: Callable[[Result], str], note: str) -> Table:
    """What the first seed came to at each learning rate."""
    found = list(found)
    rates = sorted({rate for row in found for rate in row.by_rate})
    rows = []
    for row in found:
        seen = {rate: shown(result) for rate, result in row.by_rate.items()}
        cells = (f"{seen[r]}{' *' * (r == row.rate)}" if r in seen else MISSING for r in rates)
        rows.append((row.label, *cells))
    return Table("Tuning", ("", *(f"rate {rate:g}" for rate in rates)), tuple(rows), (note,))


def at_end(row: TunedRow) -> list[str]:
    """A sentence where the rate that was kept is the lowest or the highest of those that were tried; else nothing."""
    grid = sorted(row.by_rate)
    if len(grid) < 2 or row.rate not in (grid[0], grid[-1]):
        return []
    end = "lowest" if row.rate == grid[0] else "highest"
    return [f"{row.label} was best at the {end} learning rate of the grid, so a better one may lie beyond."]


def over_seeds(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation as text; `MISSING` where there is no seed yet."""
    if not values:
        return MISSING
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def require_own_names(what: str, names: Sequence[str], *taken: str) -> None:
    """Refuses names that are empty, there twice, or taken.

    Raises:
        UserError: which.
    """
    if twice := {name for name in names if names.count(name) > 1 or name in ("", *taken)}:
        raise UserError(f"{what} must have names of their own, but there is {', '.join(sorted(twice))!r}")


def slug(label: str) -> str:
    """A label as a file name: ``"− swish gate"`` → ``"swish-gate"``."""
    return "-".join(re.findall(r"[a-z0-9]+", label.lower()))
