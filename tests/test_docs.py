"""Every example in README.md and docs/ runs: Python blocks as they stand, `retnet` commands in one directory, in order.

Of benchmarks the words alone are checked: `tests/cli/test_bench.py` runs each of them, as small as a test can.
"""

import configparser
import glob
import itertools
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from retnet.cli import bench, serve

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLLOWED = ROOT / "docs/developing.md"  # changes the library: tests/test_developing.py follows it in a copy
SERVING = ROOT / "docs/serving.md"
RETNET = [sys.executable, "-c", "from retnet.cli import main; main()"]
# The same commands at sizes that a test can run.
SMALL = [
    "--train.steps",
    "2",
    "--train.batch_size",
    "2",
    "--train.seq_len",
    "64",
    "--train.eval_tokens",
    "500",
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def commands() -> list[list[str]]:
    """The `retnet` lines of all bash blocks, in the order of the pages, each once."""
    pages = [page for page in PAGES if page != FOLLOWED]
    lines = [line for page in pages for block in blocks(page, "bash") for line in block.splitlines()]
    found = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("retnet ")]
    return list(map(list, dict.fromkeys(map(tuple, found))))


def run(words: list[str], cwd: Path) -> str:
    done = subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def retnet(forks):
    """Runs the words of a command, or with `code` a text of Python, in a directory: it must end well."""

    def run(words: list[str], cwd: Path, **how) -> None:
        done = forks.run(words, cwd, seconds=300, **how)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"

    return run


@pytest.fixture(scope="module")
def workplace(retnet, tmp_path_factory) -> Path:
    """A directory with a reader's own texts and a finished run, as the pages assume."""
    home = tmp_path_factory.mktemp("reader")
    (home / "my-texts").mkdir()
    for i in range(20):
        text = f"Chapter {i}. It was a dark and stormy night, and the rain fell in torrents.\n" * 20
        (home / "my-texts" / f"{i}.txt").write_text(text)
    retnet(["train", "smoke", "--run-dir", "runs/demo", *SMALL], home)
    return home


def test_pages_have_examples():
    assert len(commands()) >= 15
    assert len(blocks(ROOT / "README.md", "python")) == 3


@pytest.mark.slow
def test_commands(retnet, workplace):
    for line in commands():
        if line[0] in ("serve", "bench"):
            continue  # the one does not end: see test_serving; the others: test_benchmarks_are_called_as_they_take_it
        as_a_shell = [glob.glob(word, root_dir=workplace) or [word] for word in line]
        words = list(itertools.chain.from_iterable(as_a_shell))
        retnet(words + (SMALL if words[0] == "train" else []), workplace)


def test_benchmarks_are_called_as_they_take_it():
    benchmarks = [words[1:] for words in commands() if words[0] == "bench"]
    assert {name for name, *_ in benchmarks} <= set(bench.command.commands)
    for name, *words in benchmarks:
        bench.command.commands[name].make_context(name, words)
    assert len(benchmarks) >= 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python") and p != FOLLOWED], ids=lambda p: p.name
)
def test_python(page, retnet, workplace):
    if not (workplace / "runs/smoke").exists():
        retnet(["train", "smoke", "--run-dir", "runs/smoke", *SMALL], workplace)
    for code in blocks(page, "python"):
        retnet([code], workplace, code=True)


@pytest.mark.slow
def test_serving(workplace):
    """The server that docs/serving.md starts answers its `curl` lines and its Python, and ends in order."""
    lines = [line for block in blocks(SERVING, "bash") for line in block.splitlines()]
    (line,) = [line for line in lines if line.startswith("retnet serve")]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [port if word == "8000" else word for word in shlex.split(line)[1:]]
    server = subprocess.Popen([*RETNET, *words], cwd=workplace, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/ready")
        curls = [line for line in lines if line.startswith("curl")]
        assert len(curls) >= 5
        for line in curls:
            said = run([*shlex.split(line.replace(":8000", f":{port}")), "-sS"], workplace)
            assert '"error"' not in said, said
        for code in blocks(SERVING, "python served"):
            run([sys.executable, "-W", "error", "-c", code.replace(":8000", f":{port}")], workplace)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, server.stderr.read()
    finally:
        server.kill()
        server.communicate()


def wait_for(url: str) -> None:
    """Until it answers 200."""
    end = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url):
                return
        except OSError:  # nobody there yet, or not ready
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.1)


def test_the_service_of_the_pages_can_be_started():
    """Options of the systemd unit and of the container are those of the verb."""
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read_string(blocks(SERVING, "ini")[0])
    (container,) = re.findall(r"^CMD (.*)$", blocks(SERVING, "dockerfile")[0], re.M)
    for words in (shlex.split(unit["Service"]["ExecStart"])[1:], json.loads(container)[1:]):
        assert words[0] == "serve"
        serve.command.make_context("serve", words[1:])


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
