"""A summary of results as plain data: tables, figures (panels of lines or bars) and findings, for any renderer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from retnet.measure.clock import Spread
from retnet.tables import Table


@dataclass(frozen=True)
class Line:
    """One line of a figure: points in the order of x, each with the least and the greatest y seen, where known."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    dashed: bool = False  # published, modelled, or otherwise not measured here

    @classmethod
    def of(cls, name: str, x: Sequence[float], seen: Sequence[Spread], dashed: bool = False) -> Line:
        """The line through medians, from the least to the greatest."""
        y, low, high = (tuple(getattr(s, key) for s in seen) for key in ("median", "low", "high"))
        return cls(name, tuple(map(float, x)), y, low, high, dashed)

    @classmethod
    def means(cls, name: str, x: Sequence[float], values: Sequence[Sequence[float]]) -> Line:
        """The line through the means of several values at each x, from the least to the greatest."""
        ends = tuple(map(min, values)), tuple(map(max, values))
        return cls(name, tuple(map(float, x)), tuple(map(statistics.mean, values)), *ends)


@dataclass(frozen=True)
class Panel:
    """One pair of axes with lines."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False  # whether y begins there


@dataclass(frozen=True)
class Bars:
    """One pair of axes with horizontal bars, from above, each with a name, its number and its spread.

    Attributes:
        title: of the panel.
        x_label: what the lengths of the bars are.
        names: one each.
        seen: one each.
        limit: where a dotted line stands; None: nowhere.
    """

    title: str
    x_label: str
    names: tuple[str, ...]
    seen: tuple[Spread, ...]
    limit: float | None = None


@dataclass(frozen=True)
class Figure:
    """Panels side by side under one name, which is also the name of the file it is drawn to."""

    name: str
    panels: tuple[Panel | Bars, ...]
    notes: tuple[str, ...] = ()
    title: str = ""  # above all panels of a picture


@dataclass(frozen=True)
class Summary:
    """All that a study or a benchmark has to say. `findings` are sentences computed from the results, the soberest first."""

    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    findings: tuple[str, ...] = ()
