"""Scaling exponents: the slope of a cost's logarithm over the logarithm of the length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
ORDERS: Mapping[str, Callable[[float], float]] = {
    "1": lambda n: 1.0,
    "N": lambda n: n,
    "N log N": lambda n: n * math.log(n),
    "N²": lambda n: n * n,
}


class Slope(NamedTuple):
    """An exponent p of y ≈ c · xᵖ, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{_rounded(self.value)} ({_rounded(self.low)}..{_rounded(self.high)})"

    def within(self, distance: float, of: float) -> bool:
        """Whether the value is at most so far from what was expected."""
        return abs(self.value - of) <= distance


def slope(x: Sequence[float], y: Sequence[float]) -> Slope:
    """Ordinary least squares of ln y on ln x, nothing subtracted from y.

    The interval is that of Student's t with n − 2 degrees of freedom: it is wide where the points scatter, and also where
    they do not lie on a line, so that a curve does not pass for an exponent.

    Args:
        x: at least three different values above zero.
        y: as many values above zero.

    Raises:
        ValueError: fewer points, or one that has no logarithm.
    """
    if len(x) != len(y) or len(set(x)) < 3:
        raise ValueError(f"a slope with an interval needs 3 different x or more, got {len(set(x))}")
    if min(*x, *y) <= 0:
        raise ValueError("a value of zero or less has no logarithm")
    from scipy.stats import t

    a, b = (np.log(np.asarray(values, np.float64)) for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    value = float(a @ b / (a @ a))
    rest = b - value * a
    error = math.sqrt(float(rest @ rest / (len(x) - 2) / (a @ a)))
    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(x) - 2)) * error
    return Slope(value, value - reach, value + reach)


def expected(order: str, x: Sequence[float]) -> float:
    """The slope of an order of growth (a key of `ORDERS`) over these x: "N log N" has one that is not quite constant."""
    return slope(x, [ORDERS[order](v) for v in x]).value


def _rounded(x: float) -> str:
    return f"{x:.2f}".replace("-0.00", "0.00").replace("-", "−")
