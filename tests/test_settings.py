"""Strict configurations: what is refused, how it is said, and that what is written is what is read."""

import dataclasses
import math
import re
import tomllib
import typing
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

import pytest

from retnet import settings
from retnet.data import DataConfig
from retnet.settings import (
    Checked,
    Choice,
    UserError,
    build,
    config_path,
    dump,
    dump_changed,
    load,
    merge,
    parse_overrides,
)
from retnet.studies.study import Study
from retnet.train.config import RunConfig, TrainConfig


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


def test_words_that_stand_beside_numbers_are_told_too():
    from retnet.mixers import RetentionConfig

    with pytest.raises(
        UserError, match="allowed: 'paper', 'experiments', 'alibi', 'none'; did you mean \"paper\""
    ):
        build(RetentionConfig, {"decay": "papper"})
    with pytest.raises(UserError, match=r"decay\[1\] 'x': Expected `float`, got `str`"):
        build(RetentionConfig, {"decay": [0.5, "x"]})


def test_what_was_changed_is_told_alike_by_versions_with_more_settings():
    """Fingerprints of models are made of it: sessions that were kept outlive a setting that is added."""
    from retnet.mixers import GatedRetentionConfig, RetentionConfig
    from retnet.model import ModelConfig

    @dataclass(frozen=True)
    class Later(ModelConfig):
        added: int = 3

    for options in (
        {},
        {"d_model": 64},
        {"layers": ("retention", "x"), "mixers": {"x": RetentionConfig(decay=0.5)}},
    ):
        now = dump_changed(ModelConfig(**options))
        assert now == dump_changed(Later(**options)) != dump_changed(Later(**options, added=4))
        assert now != dump_changed(ModelConfig(**{**options, "num_layers": 8}))
    told = {dump_changed(ModelConfig(mixer=mixer)) for mixer in (
        RetentionConfig(), RetentionConfig(scale=1.0), RetentionConfig(decay=0.5), GatedRetentionConfig()
    )}  # fmt: skip
    assert len(told) == 4


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
    assert parse_overrides(["--a.b", "-1", "--c.d=x y"]) == {"a.b": -1, "c.d": "x y"}


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
        load(Outer, path, {"inner.steps": 1})


def write(folder, **files):
    """Files of TOML by name; the path of the first."""
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return folder / f"{next(iter(files))}.toml"


def test_nested_tables_as_overrides(tmp_path):
    path = write(tmp_path, c='[inner]\nsteps = 3\nkind = "cosine"\n[shape]\nname = "circle"\nradius = 2.0\n')
    got = load(Outer, path, {"inner": {"steps": 4}, "shape": {"name": "square"}})
    assert (got.inner.steps, got.inner.kind, got.shape) == (4, "cosine", Square())
    assert load(Outer, path, {"shape.name": "square", "shape.side": 4}).shape == Square(side=4)


def test_a_file_is_laid_over_the_one_it_is_based_on(tmp_path):
    path = write(
        tmp_path,
        own='base = "middle.toml"\n[inner]\nsteps = 9\n[shape]\nname = "square"\n',
        middle='base = "low.toml"\n[inner]\nkind = "cosine"\n[shape]\nradius = 3.0\n',
        low='[inner]\nsteps = 1\nrate = 0.25\n[shape]\nname = "circle"\nradius = 2.0\n',
    )
    assert load(Outer, tmp_path / "middle.toml") == Outer(Inner(1, 0.25, "cosine"), Circle(radius=3.0))
    got = load(Outer, path, {"inner.limit": 2})
    assert got == Outer(Inner(9, 0.25, "cosine", limit=2), Square())  # another name replaces the whole table
    assert "base" not in dump(got)


def test_several_bases_and_lists_told_apart_by_label(tmp_path):
    row = '[[table.rows]]\nlabel = "{}"\nx = {}\n'
    (tmp_path / "sub").mkdir()
    path = write(
        tmp_path,
        top='base = ["sub/a.toml", "b.toml"]\n' + row.format("two", 20) + "y = 5\n" + row.format("new", 3),
        common="[table]\nz = 1\nu = 1\n",
        b='base = "common.toml"\n[table]\nv = 2\n',
    )
    write(
        tmp_path / "sub",
        a='base = "../common.toml"\n[table]\nz = 2\n' + row.format("one", 1) + row.format("two", 2),
    )
    # what both bases share is read once, and so does not take back what the first of them changed
    assert load(Several, path).table == {
        "z": 2, "u": 1, "v": 2,
        "rows": [{"label": "one", "x": 1}, {"label": "two", "x": 20, "y": 5}, {"label": "new", "x": 3}],
    }  # fmt: skip
    assert merge({"a": [1, 2], "b": [{"x": 1}]}, {"a": [3], "b": []}) == {"a": [3], "b": []}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": 'base = "b.toml"', "b": 'base = "c.toml"', "c": 'base = "a.toml"'},
         r"c.toml is based on itself: .*/a.toml → .*/b.toml → .*/c.toml → .*/a.toml$"),
        ({"a": 'base = "a.toml"'}, r"a.toml is based on itself: .*a.toml → .*a.toml$"),
        ({"a": 'base = "laptop/3n"'}, r"a.toml: no base 'laptop/3n': did you mean 'laptop/3m'"),
        ({"a": 'base = "b.toml"'}, r"a.toml: no base 'b.toml': there is no file .*b.toml"),
        ({"a": "base = 3"}, r"a.toml: base is 3; it must be a shipped configuration or the path"),
        ({"a": "[inner]\nstepz = 1"}, r"a.toml: unknown setting 'inner.stepz'; did you mean 'steps'"),
        ({"a": 'base = "b.toml"\n[inner]\nsteps = 2', "b": "[inner]\nstepz = 1"},
         r"^\S*b.toml: unknown setting 'inner.stepz'"),
        ({"a": 'base = "b.toml"\n[inner]\nstepz = 1', "b": "[inner]\nsteps = 1"},
         r"^\S*a.toml: unknown setting 'inner.stepz'"),
        ({"a": 'base = "b.toml"\n[inner]\nsteps = 2', "b": '[inner]\nkind = "lin"'}, r"^\S*b.toml: inner.kind 'lin'"),
        ({"a": 'base = "b.toml"\n[inner.steps]\nx = 2', "b": "[inner]\nsteps = 1"},
         r"^\S*a.toml: cannot set 'inner.steps.x': 'inner.steps' is a value, not a table"),
    ],
)  # fmt: skip
def test_what_bases_can_get_wrong(files, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load(Outer, write(tmp_path, **files))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("inner.steps", "1e3", "inner.steps 1000.0: Expected `int`, got `float`; did you mean 1000?"),
        ("inner.steps", "1,000", "inner.steps '1,000': Expected `int`, got `str`; did you mean 1000?"),
        ("inner.stepz", "3", "unknown setting 'inner.stepz'; did you mean 'steps'? known: "),
        ("inner.kind", "Cosine", "; allowed: 'linear', 'cosine'; did you mean \"cosine\"?"),
        ("inner.names", "3", 'did you mean "3"?'),
        ("switch.on", "False", "switch.on 'False': Expected `bool`, got `str`; did you mean false?"),
        ("switch.on", "0", "did you mean false?"),
        ("switch.on", "maybe", "switch.on 'maybe': Expected `bool`, got `str`"),
    ],
)
def test_the_command_line_is_blamed_for_what_it_says(key, value, message, tmp_path):
    path = write(tmp_path, c='[inner]\nkind = "cosine"\n')
    with pytest.raises(UserError) as caught:
        load(Switched, path, parse_overrides([f"--{key}", value]))
    assert str(caught.value).startswith("command line: ")
    assert message in str(caught.value)


def test_a_file_is_blamed_for_what_it_says_beside_a_command_line(tmp_path):
    path = write(tmp_path, c='[inner]\nkind = "lin"\n')
    with pytest.raises(UserError, match=r"^\S*c.toml: inner.kind 'lin'"):
        load(Outer, path, {"inner.steps": 3})


@dataclass(frozen=True)
class Switch:
    on: bool = True


@dataclass(frozen=True)
class Switched(Outer):
    switch: Switch = field(default_factory=Switch)


@dataclass(frozen=True)
class Several:
    items: tuple[Inner, ...] = ()
    grid: tuple[tuple[int, ...], ...] = ()
    table: dict[str, Any] = field(default_factory=dict)


def test_tables_in_a_list_are_strict_too():
    with pytest.raises(UserError, match=r"unknown setting 'items\[1\].stepz'; did you mean 'steps'"):
        build(Several, {"items": [{"steps": 1}, {"stepz": 2}]})
    with pytest.raises(UserError, match=r"^items\[1\]\.steps 'x': Expected `int`"):
        build(Several, {"items": [{"steps": 1}, {"steps": "x"}]})
    with pytest.raises(UserError, match=r"^grid\[1\]\[0\] '7': Expected `int`.*; did you mean 7\?"):
        build(Several, {"grid": [[1], ["7", 2]]})
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
    assert not [
        name for name in settings.shipped_configs(studies=True) if "/_" in name
    ]  # others are based on them
    own.unlink()
    own.symlink_to(tmp_path / "gone.toml")
    with pytest.raises(
        UserError, match=r"no configuration '.*own.toml' \(it is a link to .*gone.toml\): not a .toml file"
    ):
        config_path(str(own))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.toml").write_text("")
    assert config_path("~/mine.toml") == tmp_path / "mine.toml"
    (tmp_path / "MINE.TOML").write_text("")
    assert config_path("~/MINE.TOML") == tmp_path / "MINE.TOML"


def config_classes():
    """Every dataclass of settings there is: those of a run, its mixers, studies, sampling and benchmarks."""
    for module in (
        "bench.decoding",
        "bench.training",
        "bench.implementations",
        "engine",
        "mixers",
        "train.config",
    ):
        import_module(f"retnet.{module}")
    assert issubclass(Study, Checked)  # its module imports every measure
    waiting = [Checked]
    while waiting:
        waiting += (kind := waiting.pop()).__subclasses__()
        if dataclasses.is_dataclass(kind) and kind.__module__.startswith("retnet."):
            yield kind


def test_no_number_of_any_configuration_is_nan_infinite_or_absurd():
    seen = set()
    for kind in config_classes():
        hints = typing.get_type_hints(kind)
        for name in (each.name for each in dataclasses.fields(kind)):
            if float not in (hints[name], *typing.get_args(hints[name])):
                continue
            seen.add(f"{kind.__name__}.{name}")
            several = typing.get_origin(hints[name]) is tuple
            for number in (math.nan, math.inf, -math.inf, 1e36):
                blank = object.__new__(kind)
                for other in dataclasses.fields(kind):
                    object.__setattr__(blank, other.name, None)
                object.__setattr__(blank, name, (number,) if several else number)
                with pytest.raises(UserError, match=rf"^{name} .*is {re.escape(str(number))}; it must be "):
                    Checked.__post_init__(blank)
    assert {
        "TrainConfig.learning_rate", "ModelConfig.norm_eps", "RetentionConfig.decay", "Sampling.top_p",
        "QualityMeasure.learning_rates", "Study.hours", "OpsBench.peer_work", "HyenaConfig.slow_decay",
    } <= seen  # fmt: skip


def test_every_dataclass_that_a_file_can_say_is_checked():
    waiting, seen = [RunConfig, Study], set()
    while waiting:
        kind = waiting.pop()
        if kind in seen or not kind.__module__.startswith("retnet."):  # other tests define some
            continue
        seen.add(kind)
        assert issubclass(kind, Checked), kind
        for hint in typing.get_type_hints(kind).values():
            for each in (hint, *typing.get_args(hint)):
                if isinstance(each, type) and issubclass(each, Choice):
                    waiting += each.options().values()
                elif dataclasses.is_dataclass(each):
                    waiting.append(each)
    assert len(seen) > 18


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(learning_rate=math.nan), "learning_rate is nan; it must be at least 0 and at most 1000"),
        (lambda: TrainConfig(beta1=1.0), "beta1 is 1.0; it must be at least 0 and below 1"),
        (lambda: TrainConfig(clip=1e36), "clip is 1e+36; it must be a finite number, of at most 1e+18"),
        (lambda: TrainConfig(steps=2.5), "steps is 2.5; it must be a whole number"),
        (lambda: TrainConfig(steps=True), "steps is True; it must be a number"),
        (lambda: TrainConfig(seed=1 << 64), f"seed is {1 << 64}; it must fit in 64 bits"),
        (lambda: TrainConfig(threads=0), "threads is 0; it must be at least 1"),
        (lambda: build(TrainConfig, {"clip": math.inf}), "clip is inf; it must be a finite number"),
        (lambda: build(RunConfig, {"model": {"norm_eps": math.nan}}), "model: norm_eps is nan; it must be at least 0"),
        (lambda: build(RunConfig, {"model": {"mixer": {"name": "retention", "decay": [0.5, math.nan]}}}),
         "decay has an item that is nan; it must be a finite number"),
    ],
)  # fmt: skip
def test_numbers_are_numbers_however_they_come(make, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    "settings",
    [{"data.cache": ""}, {"data.corpus": ""}, {"data.corpus": ["a", ""]}, {"train.start_from": ""}],
)
def test_an_empty_path_is_not_the_current_directory(settings):
    (name,) = settings
    section, _, field = name.partition(".")
    with pytest.raises(UserError, match=rf"{field} (is|has an item that is) empty; it must name something"):
        build(RunConfig, {section: {field: settings[name]}})


def test_a_home_is_expanded_where_a_setting_is_a_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = build(
        RunConfig, {"data": {"corpus": ["~/a", "package:x"], "cache": "~/c", "tokenizer": "bytes"}}
    ).data
    assert (data.corpus, data.cache, data.tokenizer) == (
        (f"{tmp_path}/a", "package:x"),
        f"{tmp_path}/c",
        "bytes",
    )
    assert DataConfig(validation="~").validation == str(tmp_path)
    assert DataConfig(text_field="~/x").text_field == "~/x"  # no path
