"""Plain data to configurations: what is refused, how it is said, and that what is written is what is read."""

import tomllib
from dataclasses import dataclass

import pytest

from retnet.settings import UserError, build, differences, dump, dump_changed, load
from tests.settings.shapes import Circle, Inner, Outer, Several, Square


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


def test_tables_in_a_list_are_strict_too():
    with pytest.raises(UserError, match=r"unknown setting 'items\[1\].stepz'; did you mean 'steps'"):
        build(Several, {"items": [{"steps": 1}, {"stepz": 2}]})
    with pytest.raises(UserError, match=r"^items\[1\]\.steps 'x': Expected `int`"):
        build(Several, {"items": [{"steps": 1}, {"steps": "x"}]})
    with pytest.raises(UserError, match=r"^grid\[1\]\[0\] '7': Expected `int`.*; did you mean 7\?"):
        build(Several, {"grid": [[1], ["7", 2]]})
    got = build(Several, {"items": [{"steps": 1}], "table": {"a": {"b": [1, 2]}}})
    assert build(Several, tomllib.loads(dump(got))) == got


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


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"words": "a, b"}, '["a", "b"]'),
        ({"words": "[a,'b']"}, '["a", "b"]'),  # what a shell leaves of ["a",'b'] without quotes
        ({"words": "a"}, '["a"]'),
        ({"widths": "1,2.5"}, "[1.0, 2.5]"),
        ({"widths": "x"}, ""),  # a number is as likely
        ({"items": 3}, "[{…}, …]"),
    ],
)
def test_what_should_be_a_list_is_shown_as_one(data, said):
    with pytest.raises(UserError, match=r"Expected `.*array") as caught:
        build(Several, data)
    hint = f"; a list is written {said}, on a command line in single quotes"
    assert str(caught.value).endswith(hint) if said else "list" not in str(caught.value)


def test_of_two_configurations_only_what_differs_is_told():
    one = Several((Inner(1), Inner(2)), table={"a": {"b": 1, "c": 2}})
    other = Several((Inner(1), Inner(3), Inner(4)), table={"a": {"b": 1, "c": 3}, "d": 4})
    assert list(differences(one, other)) == [
        ("items[1].steps", 2, 3),
        ("items[2]", None, Inner(4)),
        ("table.a.c", 2, 3),
        ("table.d", None, 4),
    ]
    assert list(differences(Outer(), Outer(shape=Square()))) == [("shape.name", "circle", "square")]
    assert not list(differences(one, one))
