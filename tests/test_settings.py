"""Strict configurations: what is refused, how it is said, and that what is written is what is read."""

import tomllib
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from retnet import settings
from retnet.settings import Choice, UserError, build, config_path, dump, load, parse_overrides


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


def test_defaults_and_nesting():
    assert build(Outer, {}) == Outer()
    made = build(
        Outer, {"inner": {"steps": 7, "rate": 1, "names": ["x", "y"]}, "shape": {"name": "square", "side": 2}}
    )
    assert made == Outer(Inner(7, 1.0, names=("x", "y")), Square(side=2))


@pytest.mark.parametrize(
    "config",
    [
        Outer(),
        Outer(Inner(9, 1e-4, "cosine", ("p", "q"), 5), Square(side=3)),
        Outer(shape=Circle(radius=2.5)),
    ],
)
def test_what_is_dumped_loads_equal(config, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(dump(config))
    assert load(Outer, path) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"iner": {}}, "unknown setting 'iner'; did you mean 'inner'\\? known: inner, shape"),
        ({"inner": {"step": 1}}, "unknown setting 'inner.step'; did you mean 'steps'"),
        ({"inner": {"zzz": 1}}, "unknown setting 'inner.zzz'; known: steps, rate, kind, names, limit"),
        ({"inner": {"steps": "three"}}, "inner.steps 'three': Expected `int`, got `str`"),
        ({"inner": {"steps": 1.5}}, "inner.steps 1.5: Expected `int`, got `float`"),
        ({"inner": {"kind": "lin"}}, "inner.kind 'lin': .*; allowed: 'linear', 'cosine'"),
        ({"inner": 3}, "inner 3: Expected `object`, got `int`"),
        ({"shape": {"side": 1}}, "shape must be a table with a 'name'; known: circle, square"),
        ({"shape": {"name": "squares"}}, "unknown shape.name 'squares'; did you mean 'square'"),
        ({"shape": {"name": "circle", "side": 1}}, "unknown setting 'shape.side'; .*known: name, radius"),
        ({"shape": {"name": "square", "side": "x"}}, "shape: side 'x': Expected `int`"),
        ({"shape": {"name": "square", "side": 0}}, "shape: side is 0; it must be at least 1"),
    ],
)
def test_mistakes_name_place_value_and_what_is_allowed(data, message):
    with pytest.raises(UserError, match=message):
        build(Outer, data)


def test_overrides(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[inner]\nsteps = 1\n")
    words = [
        "--inner.steps",
        "5",
        "--inner.kind=cosine",
        "--inner.names",
        '["a", "b"]',
        "--shape.name",
        "square",
    ]
    got = load(Outer, path, parse_overrides(words))
    assert got == Outer(Inner(5, kind="cosine", names=("a", "b")), Square())
    assert parse_overrides(["--a.b", "-1"]) == {"a.b": "-1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps", "5"], "unexpected argument 'steps'; settings are written --section.field VALUE"),
        (["--steps", "5"], "unexpected argument '--steps'"),
        (["--inner.steps"], "--inner.steps needs a value"),
    ],
)
def test_malformed_overrides(words, message):
    with pytest.raises(UserError, match=message):
        parse_overrides(words)


def test_an_override_through_a_value(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("inner = 3\n")
    with pytest.raises(UserError, match=r"cannot set 'inner.steps': 'inner' is a value"):
        load(Outer, path, {"inner.steps": "1"})


def test_nested_tables_as_overrides(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[inner]\nsteps = 3\nkind = "cosine"\n[shape]\nname = "circle"\n')
    tables = {"inner": {"steps": 4}, "shape": {"name": "square"}}
    assert settings.flatten(tables) == {"inner.steps": 4, "shape": {"name": "square"}}
    got = load(Outer, path, settings.flatten(tables))
    assert (got.inner.steps, got.inner.kind, got.shape) == (4, "cosine", Square())


@dataclass(frozen=True)
class Several:
    items: tuple[Inner, ...] = ()
    table: dict[str, Any] = field(default_factory=dict)


def test_tables_in_a_list_are_strict_too():
    with pytest.raises(UserError, match=r"unknown setting 'items\[1\].stepz'; did you mean 'steps'"):
        build(Several, {"items": [{"steps": 1}, {"stepz": 2}]})
    got = build(Several, {"items": [{"steps": 1}], "table": {"a": {"b": [1, 2]}}})
    assert build(Several, tomllib.loads(dump(got))) == got


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the configuration .*No such file"):
        load(Outer, tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[inner\n")
    with pytest.raises(UserError, match=r"broken.toml is not valid TOML"):
        load(Outer, broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"broken.toml is not UTF-8 text: it begins .* UTF-16"):
        load(Outer, broken)
    broken.write_text("[inner]\nstepz = 3\n")
    with pytest.raises(UserError, match=r"broken.toml: unknown setting 'inner.stepz'"):
        load(Outer, broken)


def test_shipped_configurations_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_path("paper/6.7b").name == "6.7b.toml"
    assert config_path("configs/demo.toml").is_file()  # as typed in a checkout, from anywhere
    with pytest.raises(UserError, match=r"no configuration 'paper/6.8b'.*did you mean 'paper/6.7b'"):
        config_path("paper/6.8b")
    own = tmp_path / "own.toml"
    own.write_text("")
    assert config_path(str(own)) == own
    assert "smoke" in settings.shipped_configs()
