"""What `pip install .` brings, without any extra, is enough to train and generate: all other packages are hidden here."""

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# Runs command lines, one after the other, where the packages named by the first argument cannot be found.
HIDING = """
import json, sys
hidden, finders = set(sys.argv.pop(1).split(",")), list(sys.meta_path)
class Finder:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            return None
        found = (finder.find_spec(name, path, target) for finder in finders)
        return next((spec for spec in found if spec), None)
sys.meta_path[:] = [Finder]
from retnet.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    print("status", status, file=sys.stderr)
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(names: list[str]) -> set[str]:
    """Distributions that these requirements bring, directly or not, as far as they are installed."""
    found, open_ = set(), [Requirement(name) for name in names]
    while open_:
        requirement = open_.pop()
        if normal(requirement.name) in found:
            continue
        found.add(normal(requirement.name))
        try:
            inner = [Requirement(text) for text in metadata.requires(requirement.name) or ()]
        except metadata.PackageNotFoundError:
            continue
        extras = ("", *requirement.extras)
        open_ += [r for r in inner if not r.marker or any(r.marker.evaluate({"extra": e}) for e in extras)]
    return found


@pytest.fixture(scope="module")
def hidden() -> list[str]:
    """Import names of all installed packages that no dependency brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    kept = required(project["dependencies"]) | {"retnet"}
    names = metadata.packages_distributions()
    found = [name for name, owners in names.items() if not kept & set(map(normal, owners))]
    assert {"numba", "transformers", "matplotlib", "pytest", "scipy"} <= set(found)
    assert not {"torch", "numpy", "rich"} & set(found)
    return found


def retnet(hidden: list[str], home: Path, *commands: list[str]) -> list[tuple[str, int]]:
    """What each of them said on standard error, and its status."""
    done = subprocess.run(
        [sys.executable, "-c", HIDING, ",".join(hidden), json.dumps(commands)],
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = re.split(r"^status (\d+)\n", done.stderr, flags=re.M)
    return list(zip(said[::2], map(int, said[1::2]), strict=False))


@pytest.mark.slow
def test_trains_and_generates_without_extras(hidden, tmp_path):
    sizes = ["--train.steps", "2", "--train.batch_size", "2", "--train.eval_tokens", "500"]
    train = ["train", "smoke", "--run-dir", "r", *sizes]
    ended = retnet(hidden, tmp_path, train, ["generate", "r", "--prompt", "def ", "--max-tokens", "5"])
    assert [status for _, status in ended] == [0, 0], ended


@pytest.mark.slow
def test_what_is_missing_is_said_with_the_extra_that_brings_it(hidden, tmp_path):
    missing = {
        "bench": ["bench", "ops", "--quick", "--out", "records"],
        "study": ["study", "complexity", "--out", "study"],
        "eval": ["eval", "perplexity", "r"],
        "serve": ["serve", "r"],
    }
    ended = retnet(hidden, tmp_path, *missing.values())
    for extra, (said, status) in zip(missing, ended, strict=True):
        assert status == 2, said
        assert f"pip install 'retnet[{extra}]'" in said
        assert "Traceback" not in said
    assert not list(tmp_path.iterdir())  # it was said before anything was done
