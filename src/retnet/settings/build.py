"""Plain data → frozen dataclasses, strictly: every key is known, every value has its type, every error names its place.

A field typed with a subclass of `Choice` holds one of several dataclasses, told apart by the key ``name``:
this is how ``[model.mixer]`` can be any row of the mixer table without this module knowing any mixer.
"""

# ruff: noqa: ANN401 (plain data and annotations are of any type)

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import tomli_w

from retnet.errors import UserError
from retnet.settings.checks import Checked

T = TypeVar("T")
_STEPS = re.compile(r"\.(\w+)|\[(\d+)\]")  # of a place as msgspec writes it: keys of tables, numbers of items
_SWITCHES = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(
    ("false", "no", "off", "0"), False
)

# evaluating annotations took nine tenths of making a ModelConfig
_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


class Choice(Checked):
    """Base of configurations of which one is chosen by its ``name`` key: a subclass is an option once it is imported."""

    @classmethod
    def options(cls) -> Mapping[str, type]:
        """Name → dataclass of everything that may stand here: the direct subclasses, by their ``name: Literal["…"]``."""
        return {typing.get_args(_hints(kind)["name"])[0]: kind for kind in cls.__subclasses__()}


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence that answers an unknown `word`: the closest known names, and all of them when they are few."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def build(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Makes a `cls` (a dataclass) from plain data.

    Args:
        cls: a frozen dataclass, possibly nested.
        data: what a TOML file holds.
        where: dotted prefix for error messages, such as ``"model"``.

    Raises:
        UserError: an unknown key (with the nearest known ones), a missing one, or a value of the wrong type.
    """
    _refuse_unknown_keys(cls, data, where)

    def choose(kind: type, value: Any) -> Any:
        if isinstance(kind, type) and issubclass(kind, Choice):
            return build(_chosen(kind, value, where), value)
        raise NotImplementedError(f"no way to build a {kind}")

    try:
        return msgspec.convert(data, cls, strict=True, dec_hook=choose)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, UserError):  # from `choose`, which knows the mistake but not its place
            _, found, place = str(error).rpartition(" - at `$.")
            place = place.rstrip("`") if found else ""
            raise UserError(f"{place}: {error.__cause__}" if place else str(error.__cause__)) from None
        raise UserError(_readable(str(error), cls, data, where)) from None


def dump(config: object) -> str:
    """The TOML text of a configuration, complete: loading it gives an equal object. Absent (None) values are left out."""
    return tomli_w.dumps(_plain(config))


def dump_changed(config: object) -> str:
    """The JSON text of what is not left at its default: the same text in versions to come that have more fields."""
    return json.dumps(_plain(config, whole=False), sort_keys=True)


def differences(old: object, new: object, place: str = "") -> Iterator[tuple[str, object, object]]:
    """Where two configurations differ: place, old value, new value; of a `Choice` of another kind its name alone."""
    if old == new:
        return
    one, other = _table(old), _table(new)
    alike = type(old) is type(new)
    if one is None or other is None or not (alike or isinstance(old, Choice)):
        yield place, old, new
        return
    for name in {**one, **other} if alike else ("name",):
        inside = f"{place}{name}" if name.startswith("[") or not place else f"{place}.{name}"
        yield from differences(one.get(name), other.get(name), inside)


def _table(value: object) -> Mapping[str, object] | None:
    """What a configuration holds by name, and a list of such by number; None of anything else."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (list, tuple)):
        tables = any(_table(item) is not None for item in value)
        return {f"[{number}]": item for number, item in enumerate(value)} if tables else None
    return vars(value) if dataclasses.is_dataclass(value) else None


def _refuse_unknown_keys(cls: Any, data: Any, where: str) -> None:
    if not isinstance(data, Mapping):
        raise UserError(f"{where or 'the configuration'} must be a table of settings, got {data!r}")
    hints = _hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}
    for key, value in data.items():
        place = f"{where}.{key}" if where else key
        if key not in fields:
            raise UserError(f"unknown setting {place!r}; {nearest(key, fields)}")
        for kind in _alternatives(fields[key]):
            if isinstance(kind, type) and issubclass(kind, Choice):
                _refuse_unknown_keys(_chosen(kind, value, place), value, place)
            elif dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
                _refuse_unknown_keys(kind, value, place)
            elif typing.get_origin(kind) is tuple and dataclasses.is_dataclass(typing.get_args(kind)[0]):
                for number, item in enumerate(value if isinstance(value, Sequence) else ()):
                    _refuse_unknown_keys(typing.get_args(kind)[0], item, f"{place}[{number}]")
            elif typing.get_origin(kind) is dict:
                _refuse_unknown_keys_of_each(typing.get_args(kind)[1], value, place)


def _refuse_unknown_keys_of_each(kind: Any, data: Any, where: str) -> None:
    """For a table of tables whose names are the user's own."""
    if not isinstance(kind, type) or not issubclass(kind, Choice) or data is None:
        return
    if not isinstance(data, Mapping):
        raise UserError(f"{where} must be a table of tables, got {data!r}")
    for name, item in data.items():
        _refuse_unknown_keys(_chosen(kind, item, f"{where}.{name}"), item, f"{where}.{name}")


def _chosen(kind: type[Choice], value: Any, where: str) -> type:
    if not isinstance(value, Mapping) or "name" not in value:
        raise UserError(f"{where} must be a table with a 'name'; known: {', '.join(kind.options())}")
    options = kind.options()
    if value["name"] not in options:
        raise UserError(f"unknown {where}.name {value['name']!r}; {nearest(str(value['name']), options)}")
    return options[value["name"]]


def _alternatives(kind: Any) -> tuple[Any, ...]:
    unions = (types.UnionType, typing.Union)  # which of them `|` makes depends on what stands beside it
    return typing.get_args(kind) if typing.get_origin(kind) in unions else (kind,)


def _readable(message: str, cls: Any, data: Any, where: str) -> str:
    """msgspec says "… - at `$.train.steps`"; say the place first, the value that stands there, and what is allowed."""
    problem, _, place = message.partition(" - at `$")
    kind, value = cls, data
    for key, number in _STEPS.findall(place):
        if key:
            kind = _hints(kind).get(key) if dataclasses.is_dataclass(kind) else None
            value = value.get(key) if isinstance(value, Mapping) else value
        elif isinstance(value, Sequence):
            tuples = [k for k in _alternatives(kind) if typing.get_origin(k) is tuple]
            kind, value = typing.get_args(tuples[0])[0] if tuples else None, value[int(number)]
    name = (where + place.rstrip("`")).lstrip(".")
    shown = "" if isinstance(value, Mapping) else f" {value!r}"
    words = _words(kind)
    allowed = f"; allowed: {', '.join(map(repr, words))}" if words else ""
    listed = _as_list(kind, value)
    spelled = None if listed else _respelled(kind, value, words)
    hint = f"; a list is written {listed}, on a command line in single quotes" if listed else ""
    hint = hint if spelled is None else f"; did you mean {spelled}?"
    return f"{name or 'configuration'}{shown}: {problem}{allowed}{hint}"


def _words(kind: Any) -> list[Any]:
    """The values of a Literal, or of those of a union."""
    literals = [k for k in _alternatives(kind) if typing.get_origin(k) is typing.Literal]
    return [word for k in literals for word in typing.get_args(k)]


def _as_list(kind: Any, value: Any) -> str:
    """A value that is none as the list that belongs there; empty where none does, or the value may stand for itself."""
    kinds = [k for k in _alternatives(kind) if k is not types.NoneType]
    lists = [k for k in kinds if typing.get_origin(k) is tuple]
    single = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if not lists or not single or (lists != kinds and "," not in str(value)):
        return ""
    if dataclasses.is_dataclass(typing.get_args(lists[0])[0]):
        return "[{…}, …]"
    items: Any = [item.strip(" '\"") for item in str(value).strip("[]() ").split(",")]
    with contextlib.suppress(msgspec.ValidationError):
        items = msgspec.convert(items, lists[0], strict=False)
    return json.dumps(items, ensure_ascii=False)


def _respelled(kind: Any, value: Any, words: Sequence[Any]) -> str | None:
    """The nearest value of the right type, as TOML writes it: 'False' → false, 1e3 → 1000, '1,000' → 1000."""
    tries: list[Any] = []
    if isinstance(value, str):
        tries = difflib.get_close_matches(value.lower(), map(str, words), n=1)
        tries += [_SWITCHES[value.lower()]] if value.lower() in _SWITCHES else []
        with contextlib.suppress(ValueError):
            tries.append(float(value.replace(",", "").replace("_", "")))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        tries = [_SWITCHES.get(f"{value}"), f"{value}"]
    tries += [int(n) for n in (*tries, value) if isinstance(n, float) and n.is_integer()]
    for candidate in tries:
        with contextlib.suppress(msgspec.ValidationError, TypeError):
            return tomli_w.dumps({"x": msgspec.convert(candidate, kind, strict=True)}).strip()[4:]
    return None


def _plain(value: Any, whole: bool = True) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = (
            (f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if whole or _set(value, f)
        )
        return {name: _plain(item, whole) for name, item in pairs if item is not None or not whole}
    if isinstance(value, Mapping):
        return {name: _plain(item, whole) for name, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item, whole) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _set(config: Any, field: dataclasses.Field[Any]) -> bool:
    """Whether a field is not at its default; the name of a table's kind, and what is a table itself, always count."""
    value = getattr(config, field.name)
    return field.name == "name" or dataclasses.is_dataclass(value) or value != field.default
