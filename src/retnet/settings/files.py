"""Where settings come from: TOML files, the files they are based on, and the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from retnet.errors import UserError, dangling
from retnet.io import expanded, read_text
from retnet.settings.build import build, nearest

T = TypeVar("T")
BASE = "base"  # the key of a file that names the one it is based on
COMMAND_LINE = "command line"
NOT_GIVEN = "missing required field"  # msgspec's words


class Layer(NamedTuple):
    """What holds after one of the places settings come from was laid over those before it."""

    source: str
    data: dict[str, Any]


def read_toml(path: str | Path) -> dict[str, Any]:
    """What one TOML file holds, as plain data.

    Raises:
        UserError: the file cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(read_text(path, f"the configuration {path}"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def load(
    cls: type[T], path: str | Path, overrides: Mapping[str, Any] | None = None, *, source: str = COMMAND_LINE
) -> T:
    """Reads a TOML file over those it is based on, lays overrides over it, and builds a `cls`.

    A file may say ``base = "NAME"``, a shipped configuration, or ``base = "PATH.toml"``, relative to itself: its own
    settings are laid over that one's, as `merge` says. A list names several, later ones over earlier ones.

    Args:
        cls: a frozen dataclass.
        path: of the file.
        overrides: dotted key → value; a table is laid over what is there.
        source: of the overrides, in messages.

    Raises:
        UserError: a file cannot be read, is not TOML, is based on itself, or does not fit `cls`; names the place that
            is to blame: a file, or the source of the overrides.
    """
    layers = _layers(Path(path))
    if overrides:
        layers.append(Layer(source, _laid(layers[-1].data, _nested(overrides, source), source)))
    try:
        return build(cls, layers[-1].data)
    except UserError as error:
        raise UserError(f"{_to_blame(cls, layers, str(error))}: {error}") from None


def merge(under: Mapping[str, Any], over: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Lays settings over others: tables are merged, table by table; everything else is replaced.

    A table with another ``name`` (a `Choice`) replaces the whole of the one below. Where both hold lists of tables with
    a ``label`` each, those of equal label are merged, and new ones follow.

    Raises:
        UserError: a table would be laid over a value.
    """
    merged = dict(under)
    for key, value in over.items():
        below, place = under.get(key), f"{where}.{key}" if where else key
        if isinstance(value, Mapping) and below is not None:
            if not isinstance(below, Mapping):
                inside = f"{place}.{next(iter(value), '*')}"
                raise UserError(f"cannot set {inside!r}: {place!r} is a value, not a table")
            other = value.get("name", below.get("name")) != below.get("name", value.get("name"))
            merged[key] = dict(value) if other else merge(below, value, place)
        elif below is not None and _labelled(value) and _labelled(below):
            rows = {row["label"]: row for row in below}
            for row in value:
                rows[row["label"]] = merge(rows.get(row["label"], {}), row, f"{place}[{row['label']!r}]")
            merged[key] = list(rows.values())
        else:
            merged[key] = value
    return merged


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """``["--train.steps", "10", "--data.corpus=stdlib"]`` → ``{"train.steps": 10, "data.corpus": "stdlib"}``.

    Values are read as TOML, where bare words are allowed.

    Raises:
        UserError: a word that is not of this form.
    """
    found: dict[str, Any] = {}
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
        found[key] = _value(value)
    return found


def config_path(name: str) -> Path:
    """The file of a configuration given as a path, or as a shipped name such as ``paper/6.7b``.

    Raises:
        UserError: neither a file nor a shipped name; answers with the nearest ones.
    """
    path = Path(expanded(name))
    if path.suffix.lower() == ".toml" and path.is_file():
        return path
    if (shipped := _shipped(name)) is not None:
        return shipped
    if (path / "config.toml").is_file():
        raise UserError(f"{name} is a run; its configuration is {path / 'config.toml'}")
    raise UserError(
        f"no configuration {name!r}{dangling(path)}: not a .toml file, and {nearest(name, shipped_configs())}"
    )


def shipped_configs(*, studies: bool = False) -> list[str]:
    """Names of the configurations of runs that come with the project, such as ``paper/6.7b``; or those of studies.

    Files whose name begins with ``_`` are left out: others are based on them.
    """
    homes = _config_homes()
    files = {file.relative_to(home) for home in homes for file in home.rglob("*.toml")}
    names = {str(file.with_suffix("")) for file in files if not file.name.startswith("_")}
    return sorted(name for name in names if name.startswith("studies/") == studies)


def _shipped(name: str) -> Path | None:
    for home in _config_homes():
        # not with_suffix: names have dots
        path = home / f"{name.removeprefix('configs/').removesuffix('.toml')}.toml"
        if path.is_file():
            return path
    return None


def _config_homes() -> list[Path]:
    package = Path(__file__).resolve().parents[1]
    return [package / "configs", package.parents[1] / "configs"]  # installed, or in a checkout


def _layers(path: Path) -> list[Layer]:
    """A file laid over those it is based on, the lowest first."""
    layers: list[Layer] = []
    for file, data in _chain(path, ()).items():
        source = str(path if file == path.resolve() else file)
        layers.append(Layer(source, _laid(layers[-1].data if layers else {}, data, source)))
    return layers


def _chain(path: Path, above: tuple[Path, ...]) -> dict[Path, dict[str, Any]]:
    """What a file and those it is based on say themselves, the lowest first, each once."""
    file, data = path.resolve(), read_toml(path)
    bases = data.pop(BASE, [])
    chain: dict[Path, dict[str, Any]] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        other = _base(path, base).resolve()
        around = (*above, file)
        if other in around:
            circle = [*around[around.index(other) :], other]
            raise UserError(f"{path} is based on itself: {' → '.join(map(_short, circle))}")
        for place, table in _chain(other, around).items():
            chain.setdefault(place, table)
    return {**chain, file: data}


def _base(path: Path, base: object) -> Path:
    """The file that `path` names as a base of its own."""
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{path}: base is {base!r}; it must be a shipped configuration or the path of a .toml file, or a list of them"
        )
    beside = path.parent / expanded(base)  # an absolute one stays itself
    if base.lower().endswith(".toml") and beside.is_file():
        return beside
    if (shipped := _shipped(base)) is not None:
        return shipped
    place = f"there is no file {beside}{dangling(beside)}, and " if base.endswith(".toml") else ""
    raise UserError(f"{path}: no base {base!r}: {place}{nearest(base, shipped_configs())}")


def _short(path: Path) -> str:
    """A shipped file's name, another's path."""
    home = next((home for home in _config_homes() if path.is_relative_to(home)), None)
    return str(path) if home is None else str(path.relative_to(home)).removesuffix(".toml")


def _laid(under: dict[str, Any], over: Mapping[str, Any], source: str) -> dict[str, Any]:
    try:
        return merge(under, over)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _to_blame(cls: type, layers: Sequence[Layer], message: str) -> str:
    """The source of the first layer from which on the mistake is there; what is missing is missing from the last file."""
    if NOT_GIVEN in message:
        return [layer.source for layer in layers if layer.source != COMMAND_LINE][-1]
    for layer, below in zip(layers[::-1], layers[-2::-1], strict=False):
        try:
            build(cls, below.data)
        except UserError as error:
            if str(error) == message:
                continue
        return layer.source
    return layers[0].source


def _labelled(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(row, Mapping) and "label" in row for row in value)


def _nested(overrides: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Dotted keys as tables in tables."""
    tables: dict[str, Any] = {}
    for key, value in overrides.items():
        *path, last = key.split(".")
        table: dict[str, Any] = {last: value}
        for part in reversed(path):
            table = {part: table}
        tables = _laid(tables, table, source)
    return tables


def _value(text: str) -> Any:  # noqa: ANN401
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string: --data.corpus stdlib
