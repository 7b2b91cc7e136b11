"""Validation of settings, said where a field is declared: ranges of numbers, and which texts are paths."""

# ruff: noqa: ANN401 (values and annotations are of any type)

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any

from retnet.errors import UserError
from retnet.io import expanded

LARGEST = 1e18  # of a float whose field names no limit: its square still is a number in fp32
WHOLE = 1 << 63  # of an integer, not included


class _Path:
    """Says that a text is the path of a file or folder, in which a leading ``~`` stands for a home."""


PATH = _Path()


@dataclass(frozen=True)
class At:
    """The range of a number: ``Annotated[float, At(least=0, below=1)]``. NaN is in no range.

    Attributes:
        least: the smallest that is allowed.
        above: allowed is what is greater.
        most: the greatest that is allowed.
        below: allowed is what is smaller.
    """

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: Any) -> bool:
        return bool(
            self.least <= value <= self.most
            and (self.above < value or self.above == -math.inf)
            and (value < self.below or self.below == math.inf)
        )

    def __str__(self) -> str:
        words = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {limit:g}" for word, limit in words.items() if math.isfinite(limit))


Count = Annotated[int, At(least=1)]  # of things there must be one of at least


@dataclass(frozen=True)
class Items:
    """How many items a list has at least, and where they begin to rise, if they must: ``Items(3, rising_from=1)``."""

    least: int = 1
    rising_from: int | None = None

    def fault(self, items: Sequence[Any]) -> str:
        """What is wrong with a list, as the end of a sentence that its name begins; empty where nothing is."""
        begin, few = self.rising_from, len(items) < self.least
        wanted = f"give at least {'one' if self.least == 1 else self.least}"
        if begin is not None and (few or [*items] != sorted(set(items)) or items[0] < begin):
            return f"is {list(items)}; {wanted}, from {begin} on, that rise"
        return f"is {list(items) or 'empty'}; {wanted}" if few else ""


class Checked:
    """Base of the dataclasses that hold settings: their numbers are numbers, and in range, however they are made.

    Floats are finite, and at most `LARGEST` in size unless their field says otherwise with `At`; lists have as many items
    as `Items` says; fields marked `PATH` have their ``~`` expanded; lists become tuples, so that settings can be hashed. A
    subclass that compares fields calls ``super().__post_init__()`` first.
    """

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, kind in _kinds(cls).items():
            value = getattr(self, name)
            for fault in _faults(kind, value):
                raise UserError(f"{name} {fault}")
            object.__setattr__(self, name, _expanded(kind, value))


@functools.cache
def _kinds(cls: Any) -> dict[str, Any]:
    """Name → annotation, its marks included, of the fields of a dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _faults(kind: Any, value: Any, ranges: tuple[At, ...] = ()) -> Iterator[str]:
    """What is wrong with the numbers of a value, as the end of a sentence that its name begins."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    # would be taken for the current directory
    if origin is typing.Annotated and PATH in inner[1:] and value == "":
        yield "is empty; it must name something"
    elif origin is typing.Annotated:
        yield from _faults(inner[0], value, tuple(mark for mark in inner[1:] if isinstance(mark, At)))
        if isinstance(value, (tuple, list)):
            yield from filter(None, (mark.fault(value) for mark in inner[1:] if isinstance(mark, Items)))
    elif origin in (types.UnionType, typing.Union):
        others = [each for each in inner if each is not types.NoneType]
        for each in others:
            if len(others) == 1 or typing.get_origin(each) is not tuple or isinstance(value, (tuple, list)):
                yield from _faults(each, value, ranges)
    elif origin is tuple and inner[-1] is Ellipsis and isinstance(value, (str, bytes, Real)):
        yield f"is {value!r}; it must be a list"  # a text would be taken for the list of its letters
    elif origin is tuple and inner[-1] is Ellipsis and isinstance(value, (tuple, list)):
        for item in value:
            yield from (f"has an item that {fault}" for fault in _faults(inner[0], item))
    elif kind in (int, float) and value is not None and not isinstance(value, (str, tuple, list)):
        yield from _number_faults(kind, value, ranges)


def _number_faults(kind: type, value: Any, ranges: tuple[At, ...]) -> Iterator[str]:
    real, whole = isinstance(value, Real) and not isinstance(value, bool), isinstance(value, Integral)
    if not real:
        yield f"is {value!r}; it must be a number"
    elif kind is int and not whole:
        yield f"is {value}; it must be a whole number"
    elif any(value not in limits for limits in ranges):
        yield f"is {value}; it must be {' and '.join(map(str, ranges))}"
    elif kind is int and not -WHOLE <= value < WHOLE:
        yield f"is {value}; it must fit in 64 bits"
    elif kind is float and not abs(value) <= (math.inf if ranges and _bounded(ranges) else LARGEST):
        yield f"is {value}; it must be a finite number, of at most {LARGEST:g}"


def _bounded(ranges: tuple[At, ...]) -> bool:
    return any(math.isfinite(limits.most) or math.isfinite(limits.below) for limits in ranges)


def _expanded(kind: Any, value: Any) -> Any:
    """A value with the ``~`` of its paths expanded, and tuples for lists."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated and PATH in inner[1:]:
        return expanded(value) if isinstance(value, str) else value
    if origin is typing.Annotated:
        return _expanded(inner[0], value)
    if origin in (types.UnionType, typing.Union):
        return functools.reduce(lambda held, each: _expanded(each, held), inner, value)
    if origin is tuple and isinstance(value, (tuple, list)) and inner[-1] is Ellipsis:
        return tuple(_expanded(inner[0], item) for item in value)
    if origin is dict and isinstance(value, dict):
        return {name: _expanded(inner[1], item) for name, item in value.items()}
    return value
