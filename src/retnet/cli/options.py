"""Options of verbs made from the dataclasses they fill: names, types, ranges, defaults and help are said there alone.

Classes are read from their source, not imported: `retnet VERB --help` answers at once, without torch.
"""

# ruff: noqa: ANN401 (click's values and annotations are of any type)

from __future__ import annotations

import ast
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

import retnet
from retnet.errors import UserError
from retnet.io import expanded
from retnet.settings import PATH, At, Count

Function = TypeVar("Function", bound=Callable[..., Any])
_KNOWN = {"Annotated": typing.Annotated, "Literal": typing.Literal, "At": At, "Count": Count, "PATH": PATH}


class Field(NamedTuple):
    """A field of a dataclass, as its source says."""

    kind: Any  # its annotation
    default: Any
    help: str  # from the `Attributes:` of the docstring


class HomePath(click.Path):
    """The path of a file or folder, in which a leading ``~`` stands for a home, also behind ``--option=``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(_expanded(self, value, param, ctx), param, ctx)


class FiniteRange(click.FloatRange):
    """A range of numbers, in which NaN, for which no comparison holds, does not lie, and infinity neither."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number; allowed: {self._describe_range()}.", param, ctx)
        return number


class HomeText(click.ParamType[str]):
    """A name that may be a path: a leading ``~`` stands for a home."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(_expanded(self, value, param, ctx))


def _expanded(
    kind: click.ParamType[Any],
    value: Any,
    param: click.Parameter | None,
    ctx: click.Context | None,
) -> Any:
    """A path with its home; one that is empty, as of a variable that is not set, would be the current directory."""
    if value == "":
        kind.fail("it is empty; name a file or folder", param, ctx)
    return expanded(value) if isinstance(value, str) else value


def options(place: str, *names: str, unset: bool = False, **texts: str) -> Callable[[Function], Function]:
    """A decorator that gives a click command the fields of a dataclass as options, in this order.

    Args:
        place: of the class, such as ``"retnet.engine.sampling:Sampling"``.
        names: of the fields; ``top_k`` becomes ``--top-k``.
        unset: leave out defaults: an option that is not given is None, for whoever knows a better value.
        texts: help of fields whose own says too much or too little for a command line.
    """
    fields = read_fields(place)

    def decorate(function: Function) -> Function:
        for name in reversed(names):
            field = fields[name]
            function = _option(name, field._replace(help=texts.get(name, field.help)), unset)(function)
        return function

    return decorate


def opening(function: Function) -> Function:
    """The options of verbs that open a run: which checkpoint, where, in which type."""
    for option in (
        click.option("--dtype", help="float32, bfloat16 or float16. [default: as stored]"),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …"),
        click.option(
            "--checkpoint",
            help="Of a run: best, last or step-… [default: best, or last while there is no best]",
        ),
    ):
        function = option(function)
    return function


def numbers(text: str, option: str, least: int) -> list[int]:
    """Whole numbers of an option: ``"512, 1024"`` → [512, 1024], each once, in order of size.

    Raises:
        UserError: something that is no such number, or one that is too small.
    """
    try:
        found = sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise UserError(
            f"{option} is {text!r}; it must be whole numbers with commas between, such as 512,2048"
        ) from None
    if found[0] < least:
        raise UserError(f"{option} has {found[0]}; it must be at least {least}")
    return found


@functools.cache
def read_fields(place: str) -> dict[str, Field]:
    """The fields of a dataclass, read from the source of its module."""
    module, _, name = place.partition(":")
    file = Path(retnet.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    known = dict(_KNOWN)
    for node in tree.body:  # such as Share = Annotated[float, At(least=0, most=1)]
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            kind = _kind(node.value, known)
            if kind is not None:
                known[node.targets[0].id] = kind
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    help_of = _attributes(ast.get_docstring(body) or "")
    fields: dict[str, Field] = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            kind, key = _kind(node.annotation, known), node.target.id
            if kind is not None:
                default = None if node.value is None else _constant(node.value)
                fields[key] = Field(kind, default, help_of.get(key, ""))
    return fields


def _kind(node: ast.expr, known: dict[str, Any]) -> Any:
    """An annotation; None for one that no option could hold."""
    try:
        # our own source
        return eval(compile(ast.Expression(node), "annotation", "eval"), {"__builtins__": _BUILTINS}, known)
    except (NameError, TypeError, AttributeError):
        return None


_BUILTINS = {kind.__name__: kind for kind in (int, float, str, bool, tuple, dict)}


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _attributes(docstring: str) -> dict[str, str]:
    """The `Attributes:` of a docstring in Google's style, name → sentences."""
    _, _, section = inspect.cleandoc(docstring).partition("Attributes:\n")
    section = re.split(r"\n(?=\S)", section)[0]
    items = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", section, flags=re.M)
    # a sentence begins with a capital letter, a word to be typed stays as it is
    texts = {name: text if text.startswith("`") else text[:1].upper() + text[1:] for name, text in items}
    return {name: " ".join(text.replace("`", "").split()) for name, text in texts.items()}


def _option(name: str, field: Field, unset: bool) -> Callable[[Function], Function]:
    kind, several = _single(field.kind)
    settings: dict[str, Any] = {"help": field.help}
    if kind is bool and not unset:
        settings["is_flag"] = True
    else:
        settings |= {"type": _type(kind), "multiple": several}
        if not unset and not several and field.default is not None:
            settings |= {"default": field.default, "show_default": True}
    return click.option(f"--{name.replace('_', '-')}", name, **settings)


def _single(kind: Any) -> tuple[Any, bool]:
    """The kind of one value, and whether there may be several."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        parts = [part for part in typing.get_args(kind) if part is not type(None)]
        several = any(typing.get_origin(part) is tuple for part in parts)
        return parts[0], several
    return kind, False


def _type(kind: Any) -> Any:
    marks = typing.get_args(kind)[1:] if typing.get_origin(kind) is typing.Annotated else ()
    plain = typing.get_args(kind)[0] if marks else kind
    if typing.get_origin(plain) is typing.Literal:
        return click.Choice([str(word) for word in typing.get_args(plain)])
    if PATH in marks:
        return HomeText()
    limits = next((mark for mark in marks if isinstance(mark, At)), None)
    if plain not in (int, float) or limits is None:
        return plain
    low, high = max(limits.least, limits.above), min(limits.most, limits.below)
    ranged: Any = click.IntRange if plain is int else FiniteRange
    bounds = {name: _limit(x) for name, x in (("min", low), ("max", high))}
    return ranged(**bounds, min_open=limits.above > limits.least, max_open=limits.below < limits.most)


def _limit(x: float) -> float | None:
    """A limit as it is shown: 0, not 0.0; none where there is none."""
    if not math.isfinite(x):
        return None
    return int(x) if x == int(x) else x
