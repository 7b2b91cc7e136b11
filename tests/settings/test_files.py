"""Files, those they are based on, and command lines, laid over each other; each is blamed for what it says."""

from dataclasses import dataclass, field

import pytest

from retnet import settings
from retnet.settings import UserError, config_path, dump, load, merge, parse_overrides
from tests.settings.shapes import Circle, Inner, Outer, Several, Square


@dataclass(frozen=True)
class Switch:
    on: bool = True


@dataclass(frozen=True)
class Switched(Outer):
    switch: Switch = field(default_factory=Switch)


def write(folder, **files):
    """Files of TOML by name; the path of the first."""
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return folder / f"{next(iter(files))}.toml"


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
