"""Means over documents with their uncertainty, and losses by length of context; all in constant memory."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A ratio of sums over documents.

    Attributes:
        value: Σy / Σx; NaN of nothing.
        standard_error: None for fewer than two documents.
        low: lower end of the 95 % confidence interval; None for fewer than two documents.
        high: its upper end.
    """

    value: float
    standard_error: float | None
    low: float | None
    high: float | None

    def times(self, factor: float) -> Estimate:
        """The same in another unit."""
        return Estimate(self.value * factor, *(None if x is None else x * factor for x in self[1:]))


class Bucket(NamedTuple):
    """Tokens predicted from `least` to `greatest` tokens of context, and their mean loss."""

    least: int
    greatest: int
    tokens: int
    nats_per_token: float


class Ratio:
    """Σy / Σx over documents, such as nats per token.

    Documents are what was sampled; the tokens inside one are not independent. The standard error is that of the ratio
    estimator, clustered by document: √(D/(D−1) · Σ(y_d − R·x_d)²) / Σx, R = Σy/Σx (Cochran, Sampling Techniques, §6.4,
    infinite population). The interval is that of Student's t with D − 1 degrees of freedom.
    """

    def __init__(self) -> None:
        self.documents = 0
        self.y = self.x = 0.0
        self._yy = self._xy = self._xx = 0.0

    def add(self, y: float, x: float) -> None:
        """One document."""
        self.documents += 1
        self.y += y
        self.x += x
        self._yy += y * y
        self._xy += x * y
        self._xx += x * x

    def estimate(self) -> Estimate:
        """The ratio so far."""
        if not self.x:
            return Estimate(math.nan, None, None, None)
        ratio, count = self.y / self.x, self.documents
        if count < 2:
            return Estimate(ratio, None, None, None)
        from scipy.stats import t

        squares = max(self._yy - 2 * ratio * self._xy + ratio * ratio * self._xx, 0.0)
        error = math.sqrt(count / (count - 1) * squares) / self.x
        reach = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
        return Estimate(ratio, error, ratio - reach, ratio + reach)


class ByContext:
    """Mean losses by the number of tokens they were predicted from, in buckets: 1, 2, 3–4, 5–8, 9–16 and so on."""

    def __init__(self) -> None:
        self._nats = np.zeros(64)
        self._tokens = np.zeros(64, np.int64)

    def add(self, losses: NDArray[np.float64], first: int) -> None:
        """Successive losses; `first` is the context of the first of them, at least 1."""
        context = np.arange(first, first + len(losses))
        bucket = np.frexp(context - 1)[1]  # bits of context − 1, exact
        self._nats += np.bincount(bucket, losses, minlength=64)
        self._tokens += np.bincount(bucket, minlength=64)

    def rows(self) -> list[Bucket]:
        """The buckets that have any tokens."""
        return [
            Bucket(
                2 ** (b - 1) + 1 if b else 1,
                2**b,
                int(self._tokens[b]),
                float(self._nats[b] / self._tokens[b]),
            )
            for b in np.flatnonzero(self._tokens).tolist()
        ]
