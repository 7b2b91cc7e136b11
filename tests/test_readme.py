"""What README and CONTRIBUTING say of the tree is what stands there: files, rooms, layers, extras, the picture."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from tools import readme_figure

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TOLD = ("ops", "engine", "mixers")  # rooms whose files have a line each


def listing(title: str) -> list[str]:
    """The lines of the first code block under a heading of the README."""
    section = README.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    return re.search(r"```\n(.*?)```", section, re.S)[1].splitlines()


def test_every_page_of_docs_is_linked():
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert pages == set(re.findall(r"\]\((docs/[\w-]+\.md)\)", README.rstrip().splitlines()[-1]))


def test_every_file_of_ops_engine_and_mixers_has_its_line():
    told, folder = [], ""
    for line in listing("One line per file"):
        name, _, what = line.strip().partition(" ")
        assert what.strip(), f"{name} has no words"
        if line.startswith("src/"):
            folder = name
        else:
            told.append(folder + name)
    there = [
        str(file.relative_to(ROOT))
        for room in TOLD
        for file in (ROOT / "src/retnet" / room).rglob("*.py")
        if file.name != "__init__.py"
    ]
    missing, gone = sorted(set(there) - set(told)), sorted(set(told) - set(there))
    assert not missing, f"README.md, 'One line per file': add a line for {missing}"
    assert not gone, f"README.md, 'One line per file': take out the line of {gone}"
    assert len(told) == len(set(told))


def test_every_room_has_its_line():
    heads = [re.split(r" {2,}", line.strip())[0] for line in listing("One line per room")]
    told = {name for head in heads for name in head.split()}
    there = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / "src/retnet").iterdir()
        if not path.name.startswith("__") and path.suffix != ".typed"
    }
    there -= {"infer.py"}  # a former name
    assert there <= told, f"README.md, 'One line per room': add {sorted(there - told)}"


def test_the_house_is_what_import_linter_checks():
    layers = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told = re.search(r"```\n(.*?)```", contributing, re.S)[1].splitlines()
    assert told == [layer.replace("retnet.", "") for layer in layers]


def test_every_extra_is_told():
    told = re.findall(r"^\| `(\w+)` \|", README.split("## Installing", 1)[1].split("\n## ", 1)[0], re.M)
    assert sorted(told) == sorted(PROJECT["project"]["optional-dependencies"])


def test_the_picture_shows_the_record():
    record = json.loads(readme_figure.RECORD.read_text(encoding="utf-8"))
    (panel,) = readme_figure.figure(record).panels
    assert [line.name for line in panel.lines] == list(readme_figure.NAMES.values())
    assert all(len(line.x) >= 3 for line in panel.lines)
    ours, cache = panel.lines
    first = next(row for row in record["rows"] if (row["name"], row["batch"]) == ("retnet", 1))
    assert ours.y[0] == pytest.approx(1e3 * first["seconds_per_step"]["median"])
    assert ours.x[0] == first["context"]
    assert cache.y[-1] > cache.y[0]
    assert readme_figure.PICTURE.stat().st_size <= 60_000


@pytest.mark.slow
def test_the_picture_is_drawn_anew(tmp_path, capsys):
    readme_figure.main([str(readme_figure.RECORD), str(tmp_path / "new.png")])
    assert (tmp_path / "new.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote" in capsys.readouterr().out
