"""TOML → frozen dataclasses, strictly: every key is known, every value has its type, every error names its place.

A configuration is a tree of frozen dataclasses. `build` makes one from plain data, `load` from a file and
command-line overrides, `dump` writes it back so that loading the result gives the same object.

A field typed with a subclass of `Choice` holds one of several dataclasses, told apart by the key ``name``:
this is how ``[model.mixer]`` can be any row of the mixer table without this module knowing any mixer.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import tomli_w

from retnet.errors import UserError as UserError
from retnet.io import read_text

T = TypeVar("T")


class Choice:
    """Base of configurations of which one is chosen by its ``name`` key: a subclass is an option once it is imported."""

    @classmethod
    def options(cls) -> Mapping[str, type]:
        """Name → dataclass of everything that may stand here: the direct subclasses, by their ``name: Literal["…"]``."""
        return {
            typing.get_args(typing.get_type_hints(kind)["name"])[0]: kind for kind in cls.__subclasses__()
        }


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

    def choose(kind: type, value: Any) -> Any:  # noqa: ANN401
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


def read_toml(path: str | Path) -> dict[str, Any]:
    """What a TOML file holds, as plain data.

    Raises:
        UserError: the file cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(read_text(path, f"the configuration {path}"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def load(cls: type[T], path: str | Path, overrides: Mapping[str, Any] | None = None) -> T:
    """Reads a TOML file, applies overrides (dotted key → value; text is read as TOML, bare words allowed), builds `cls`.

    Raises:
        UserError: the file cannot be read, is not TOML, or does not fit `cls`.
    """
    data = read_toml(path)
    for key, value in (overrides or {}).items():
        _put(data, key, _value(value) if isinstance(value, str) else value)
    try:
        return build(cls, data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def dump(config: object) -> str:
    """The TOML text of a configuration, complete: loading it gives an equal object. Absent (None) values are left out."""
    return tomli_w.dumps(_plain(config))


def flatten(tables: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested tables as overrides for `load`: dotted key → value. A table with a ``name`` (a `Choice`) stays whole."""
    found: dict[str, Any] = {}
    for key, value in tables.items():
        place = f"{where}.{key}" if where else key
        whole = not isinstance(value, Mapping) or "name" in value
        found |= {place: value} if whole else flatten(value, place)
    return found


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """``["--train.steps", "10", "--model.d_model=64"]`` → ``{"train.steps": "10", "model.d_model": "64"}``.

    Raises:
        UserError: a word that is not of this form.
    """
    found: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key:
            raise UserError(f"unexpected argument {word!r}; settings are written --section.field VALUE")
        if not equals:
            if not rest:
                raise UserError(f"--{key} needs a value")
            value = rest.pop(0)
        found[key] = value
    return found


def config_path(name: str) -> Path:
    """The file of a configuration given as a path, or as a shipped name such as ``paper/6.7b``.

    Raises:
        UserError: neither a file nor a shipped name; answers with the nearest ones.
    """
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return path
    for home in _config_homes():
        shipped = home / f"{name.removeprefix('configs/').removesuffix('.toml')}.toml"
        if shipped.is_file():
            return shipped
    raise UserError(f"no configuration {name!r}: not a .toml file, and {nearest(name, shipped_configs())}")


def shipped_configs(*, studies: bool = False) -> list[str]:
    """Names of the configurations of runs that come with the project, such as ``paper/6.7b``; or those of studies."""
    homes = _config_homes()
    names = {str(file.relative_to(home).with_suffix("")) for home in homes for file in home.rglob("*.toml")}
    return sorted(name for name in names if name.startswith("studies/") == studies)


def _config_homes() -> list[Path]:
    package = Path(__file__).resolve().parent
    return [package / "configs", package.parents[1] / "configs"]  # installed, or in a checkout


def _refuse_unknown_keys(cls: Any, data: Any, where: str) -> None:  # noqa: ANN401
    if not isinstance(data, Mapping):
        raise UserError(f"{where or 'the configuration'} must be a table of settings, got {data!r}")
    hints = typing.get_type_hints(cls)
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


def _chosen(kind: type[Choice], value: Any, where: str) -> type:  # noqa: ANN401
    if not isinstance(value, Mapping) or "name" not in value:
        raise UserError(f"{where} must be a table with a 'name'; known: {', '.join(kind.options())}")
    options = kind.options()
    if value["name"] not in options:
        raise UserError(f"unknown {where}.name {value['name']!r}; {nearest(str(value['name']), options)}")
    return options[value["name"]]


def _alternatives(kind: Any) -> tuple[Any, ...]:  # noqa: ANN401
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _readable(message: str, cls: Any, data: Any, where: str) -> str:  # noqa: ANN401
    """msgspec says "… - at `$.train.steps`"; say the place first, the value that stands there, and what is allowed."""
    problem, _, place = message.partition(" - at `$")
    keys = [key for key in place.rstrip("`").lstrip(".").split(".") if key]
    kind, value = cls, data
    for key in keys:
        kind = typing.get_type_hints(kind).get(key) if dataclasses.is_dataclass(kind) else None
        value = value.get(key) if isinstance(value, Mapping) else value
    name = ".".join([where, *keys] if where else keys)
    allowed = [
        repr(a)
        for k in _alternatives(kind)
        if typing.get_origin(k) is typing.Literal
        for a in typing.get_args(k)
    ]
    shown = "" if isinstance(value, Mapping) else f" {value!r}"
    return f"{name or 'configuration'}{shown}: {problem}" + (
        f"; allowed: {', '.join(allowed)}" if allowed else ""
    )


def _put(data: dict[str, Any], key: str, value: Any) -> None:  # noqa: ANN401
    *path, last = key.split(".")
    for part in path:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise UserError(f"cannot set {key!r}: {part!r} is a value, not a table")
    data[last] = value


def _value(text: str) -> Any:  # noqa: ANN401
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string: --data.corpus stdlib


def _plain(value: Any) -> Any:  # noqa: ANN401
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: _plain(item) for name, item in pairs if item is not None}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
