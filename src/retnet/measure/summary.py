"""A summary of results as plain data: tables, figures (panels of lines) and findings, for any renderer."""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Figure:
    """Panels side by side under one name, which is also the name of the file it is drawn to."""

    name: str
    panels: tuple[Panel, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """All that a study or a benchmark has to say. `findings` are sentences computed from the results, the soberest first."""

    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    findings: tuple[str, ...] = field(default=())
