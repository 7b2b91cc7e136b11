"""Every section of docs/developing.md followed to the letter, each in a copy of the repository of its own."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.forks import OTHERS, shared

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/developing.md"
COPIED = ("src", "configs", "tests", "pyproject.toml", "README.md")


def sections() -> dict[str, list[tuple[str, str]]]:
    """Title → (language, text) of its code blocks, in order."""
    parts = re.split(r"^## (.*)\n", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]
    return {
        title: re.findall(r"```(\w+)\n(.*?)```", text, re.S)
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    }


def write(block: str, home: Path) -> list[Path]:
    """Makes the file that a block's first line names."""
    first, _, text = block.partition("\n")
    file = home / first.removeprefix("# ")
    assert not file.exists(), f"{first}: is there already"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return [file]


def patch(block: str, home: Path) -> list[Path]:
    """Changes the file that a block names, hunk by hunk; what a hunk starts from must stand there exactly once."""
    first, _, hunks = block.partition("\n")
    file = home / first.removeprefix("--- ")
    text = file.read_text(encoding="utf-8")
    for hunk in hunks.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        assert {line[0] for line in lines} <= set(" +-"), hunk
        old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert text.count(old) == 1, f"{first}: {text.count(old)} times there:\n{old}"
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")
    return [file]


def run(line: str, home: Path) -> None:
    """A command of `retnet`, or of `python -m pytest`, with the sources of the copy."""
    program, *words = shlex.split(line, comments=True)
    if program == "python":
        assert words[:2] == ["-m", "pytest"]
        words, call = words[2:], "pytest:console_main"
    else:
        assert program == "retnet"
        call = "retnet.cli:main"
    sources = [str(home / "src"), str(home)]
    done = shared(OTHERS).run(words, home, call=call, sources=sources, seconds=600)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def test_every_kind_of_addition_has_a_section():
    assert list(sections()) == ["A mixer", "A kernel", "A study", "A benchmark", "A verb"]
    for blocks in sections().values():
        assert {"diff", "bash"} <= {language for language, _ in blocks}


@pytest.mark.slow
@pytest.mark.parametrize("title", sections())
def test_a_section_followed_to_the_letter(title, tmp_path):
    home = tmp_path / "copy"
    for name in COPIED:
        if (source := ROOT / name).is_dir():
            shutil.copytree(source, home / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
        else:
            shutil.copy(source, home / name)
    changed = []
    for language, block in sections()[title]:
        if language == "bash":
            for line in block.splitlines():
                run(line, home)
        else:
            changed += (patch if language == "diff" else write)(block, home)
    sources = [str(file) for file in changed if file.suffix == ".py"]
    for words in (["check"], ["format", "--check"]):
        lint = [sys.executable, "-m", "ruff", *words, "--no-cache", *sources]
        done = subprocess.run(lint, cwd=home, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
