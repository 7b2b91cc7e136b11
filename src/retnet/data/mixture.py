"""Weighted mixture of corpora: from which of them each row of training comes, as a function of the row's number.

Rows are dealt out as evenly as whole numbers allow (Bresenham's line, one corpus against the rest, then the next): in any
stretch every corpus has its share to within a few rows, and exactly at the end of each period of the weights. How many
rows of a corpus stand before a row is a formula, so nothing is remembered, and a phase with other weights goes on in each
corpus where the one before stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from retnet.data.config import DataConfig


class Phase(NamedTuple):
    """From which row on which weights hold; one weight for each corpus, of any sum above 0, none below 0."""

    row: int
    weights: Sequence[float]


class Mixture:
    """The rows of training, dealt out to corpora.

    Args:
        phases: in the order of their rows; the first begins at row 0.
    """

    def __init__(self, phases: Iterable[Phase] = (Phase(0, (1.0,)),)) -> None:
        given = list(phases)
        self._begins = [phase.row for phase in given]
        if self._begins[:1] != [0] or any(a > b for a, b in pairwise(self._begins)):
            raise ValueError(f"phases must begin at row 0 and follow each other, got rows {self._begins}")
        self._weights = [_whole(phase.weights) for phase in given]
        if len({len(weights) for weights in self._weights}) != 1:
            raise ValueError("all phases must have as many weights")
        self.num_corpora = len(self._weights[0])
        taken = (
            [0] * self.num_corpora,
            *(_dealt(b - a, w) for (a, b), w in zip(pairwise(self._begins), self._weights, strict=False)),
        )
        self._taken = list(
            accumulate(taken, lambda all_, more: [a + b for a, b in zip(all_, more, strict=True)])
        )

    @classmethod
    def of(cls, config: DataConfig, first_row: Callable[[int], int]) -> Mixture | None:
        """That of a configuration; None where it has no weights. `first_row` says with which row a step begins."""
        if config.weights is None:
            return None
        later = (Phase(first_row(phase.step), phase.weights) for phase in config.phases or ())
        return cls([Phase(0, config.weights), *later])

    def uses(self, corpus: int) -> bool:
        """Whether any row is from a corpus."""
        return any(weights[corpus] for weights in self._weights)

    def before(self, row: int) -> list[int]:
        """How many of the rows before this one each corpus has."""
        phase = self._phase(row)
        dealt = _dealt(row - self._begins[phase], self._weights[phase])
        return [a + b for a, b in zip(self._taken[phase], dealt, strict=True)]

    def places(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Where the rows from `first` on come from.

        Returns:
            int64 [count], the corpus of each; uint64 [count], how many rows of it stand before.
        """
        if self.num_corpora == 1:
            return np.zeros(count, np.int64), np.arange(first, first + count, dtype=np.uint64)
        corpora, numbers = np.empty(count, np.int64), np.empty(count, np.uint64)
        here = self.before(first)
        for place in range(count):
            after = self.before(first + place + 1)
            corpora[place] = corpus = next(
                i for i, (a, b) in enumerate(zip(here, after, strict=True)) if b > a
            )
            numbers[place] = here[corpus]
            here = after
        return corpora, numbers

    def _phase(self, row: int) -> int:
        return next(i for i in reversed(range(len(self._begins))) if self._begins[i] <= row)


def _whole(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the same proportion, of weights as they are written: 0.7 is 7 of 10."""
    exact = [Fraction(str(weight)) for weight in weights]
    if not exact or min(exact) < 0 or not sum(exact):
        raise ValueError(f"weights must be at least 0, one of them above, got {list(weights)}")
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    shared = math.gcd(*whole)
    return [weight // shared for weight in whole]


def _dealt(rows: int, weights: Sequence[int]) -> list[int]:
    """How many of the first `rows` rows each corpus has; one more row is one more of one corpus."""
    found, rest = [], sum(weights)
    for weight in weights:
        mine = (rows * weight + rest // 2) // rest if rest else 0
        found.append(mine)
        rows, rest = rows - mine, rest - weight
    return found
