"""Configurations to build, dump, lay over each other and compare."""

from dataclasses import dataclass, field
from typing import Any, Literal

from retnet.settings import Choice, UserError


class Shape(Choice):
    """Something to choose; its subclasses are the options."""


@dataclass(frozen=True)
class Circle(Shape):
    name: Literal["circle"] = "circle"
    radius: float = 1.0


@dataclass(frozen=True)
class Square(Shape):
    name: Literal["square"] = "square"
    side: int = 1

    def __post_init__(self):
        if self.side < 1:
            raise UserError(f"side is {self.side}; it must be at least 1")


@dataclass(frozen=True)
class Inner:
    steps: int = 3
    rate: float = 0.5
    kind: Literal["linear", "cosine"] = "linear"
    names: str | tuple[str, ...] = "a"
    limit: int | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    shape: Shape = field(default_factory=Circle)


@dataclass(frozen=True)
class Several:
    items: tuple[Inner, ...] = ()
    grid: tuple[tuple[int, ...], ...] = ()
    words: tuple[str, ...] | None = None
    widths: float | tuple[float, ...] = 1.0
    table: dict[str, Any] = field(default_factory=dict)
