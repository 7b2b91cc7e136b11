"""Runs at a glance: state, progress, speed, quality and settings of run directories, read without torch.

What is read may be half-written, damaged, of an older version, or no run at all.
"""

from __future__ import annotations

import json
import os
import statistics
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from retnet import lock

BITS = "validation_bits_per_byte"
LAUNCHES = "launches.jsonl"
RECENT = 20  # logged lines whose median speed is shown
TAIL = 1 << 18  # bytes at the end of the metrics in which the last lines lie
INSIDE = frozenset(
    {"checkpoints", "tensorboard", "profile", "wandb"}
)  # folders of a run in which no run lies


class RunSummary(NamedTuple):
    """What is known of a run; None or nothing where it is not."""

    path: Path
    state: str  # "running", "finished", "stopped" or "damaged"
    note: str = ""  # which process runs it, or what is damaged
    step: int = 0  # the last one that is known of
    steps: int | None = None  # of the whole run
    loss: float | None = None  # in nats per token, as logged last
    bits: float | None = None  # per byte, of the best validation
    tokens_per_s: float | None = None  # median of the last lines
    seconds: float | None = None  # of training, in all calls together
    skipped: int = 0  # steps
    pace: float | None = None  # seconds of a step, as the last lines went
    written: float = 0.0  # when its metrics were, in seconds since the epoch
    mesh: str = ""  # of several processes, as the last call had them, such as "shard 2 × tp 4"
    settings: Mapping[str, Any] = {}  # dotted name → value, as its config.toml says

    @property
    def left(self) -> float | None:
        """Seconds to the last step, as the last ones went."""
        return (self.steps - self.step) * self.pace if self.steps and self.pace else None


class _LastLines(NamedTuple):
    """The last lines of `metrics.jsonl`, and its best validation."""

    step: int = 0
    loss: float | None = None
    bits: float | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None
    skipped: int = 0
    pace: float | None = None


def is_run(path: Path) -> bool:
    """Whether a run was begun in this folder; a config.toml alone may be anybody's."""
    beside = ("checkpoints", "metrics.jsonl", "env.json")
    return (path / "config.toml").is_file() and any((path / name).exists() for name in beside)


def find_runs(folder: Path) -> Iterator[Path]:
    """The runs in a folder and below it, itself included; hidden folders and what cannot be read are passed by."""
    seen: set[str] = set()  # links may lead round in a circle
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        run = "config.toml" in files and is_run(Path(place))
        if run:
            yield Path(place)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not (run and f in INSIDE))


def summarise_run(path: Path) -> RunSummary:
    """Reads a run; what is wrong with it makes it "damaged" and is said in its note."""
    metrics = path / "metrics.jsonl"
    try:
        status = metrics.stat()
        progress, written = _progress(metrics, status.st_size, status.st_mtime_ns), status.st_mtime
    except OSError:  # none yet, or it cannot be read, which is no damage of the run
        progress, written = _LastLines(), 0.0
    problem, settings = "", {}
    try:
        settings = _settings(path / "config.toml")
    except (OSError, ValueError) as error:  # of TOML and UTF-8 too
        problem = f"config.toml cannot be read: {' '.join(str(error).split())}"
    saved, damage = _checkpoint(path / "checkpoints")
    steps = settings.get("train.steps")
    if not problem and not isinstance(steps, int):
        problem, steps = "config.toml has no train.steps", None
    owner, problem = lock.holder(path), problem or damage
    done = isinstance(steps, int) and saved >= steps
    state = "running" if owner else "damaged" if problem else "finished" if done else "stopped"
    step = max(saved, progress.step)
    found = progress._replace(step=step)._asdict()
    note = owner or problem
    summary = RunSummary(path, state, note, written=written, settings=settings, **found)
    return summary._replace(steps=steps if not problem else None, mesh=mesh_words(last_mesh(path) or {}))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl` that are whole, in order; none where it cannot be read."""
    try:
        content = (path / "metrics.jsonl").read_bytes()
    except OSError:
        return []
    return [line for text in content.splitlines() if (line := _line(text))]


def differing(runs: list[RunSummary], defaults: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs: dotted name → its value in each, None where it has none.

    Args:
        runs: to be compared; damaged ones without settings have none.
        defaults: of settings that an older run, or one that leaves them open, does not name.
    """
    known = [run.settings for run in runs if run.settings]
    names = dict.fromkeys(name for settings in known for name in settings)
    values = {
        name: [run.settings.get(name, defaults.get(name)) if run.settings else None for run in runs]
        for name in names
    }
    said = {
        name: {json.dumps(settings.get(name, defaults.get(name)), default=str) for settings in known}
        for name in names
    }
    return {name: found for name, found in values.items() if len(said[name]) > 1}


@lru_cache(maxsize=4096)
def _progress(path: Path, size: int, changed: int) -> _LastLines:
    """Read anew only when its size or time of change is another."""
    content = path.read_bytes()
    learned: list[dict[str, Any]] = []
    step, seconds = 0, None
    for text in reversed(content[-TAIL:].splitlines()):
        line = _line(text)
        if line is None:
            continue
        step = max(step, line["step"])
        seconds = line.get("seconds") if seconds is None else seconds
        if "tokens_per_s" in line:
            learned.append(line)
        if len(learned) == RECENT:
            break
    last = learned[0] if learned else {}
    bits = [line[BITS] for line in _holding(content, f'"{BITS}"'.encode()) if BITS in line]
    loss = next((line["loss"] for line in learned if "loss" in line), None)
    rates = [line["tokens_per_s"] for line in learned]
    speed = statistics.median(rates) if rates else None
    skipped = last.get("skipped_steps", 0)
    return _LastLines(step, loss, min(bits, default=None), speed, seconds, skipped, _pace(learned))


def _pace(learned: list[dict[str, Any]]) -> float | None:
    """Seconds of a step in the last lines, newest first. Older versions noted none, or began them anew in each call."""
    timed = [(line["step"], line["seconds"]) for line in learned if "seconds" in line]
    if len(timed) == 1:
        timed.append((0, 0.0))
    went = [(last - first, late - early) for (last, late), (first, early) in pairwise(timed)]
    went = [(steps, seconds) for steps, seconds in went if steps > 0 and seconds > 0]
    return sum(seconds for _, seconds in went) / sum(steps for steps, _ in went) if went else None


def _holding(content: bytes, word: bytes) -> Iterator[dict[str, Any]]:
    """The lines with a word, found without reading the others."""
    at = content.find(word)
    while at >= 0:
        end = content.find(b"\n", at)
        end = len(content) if end < 0 else end
        if line := _line(content[content.rfind(b"\n", 0, at) + 1 : end]):
            yield line
        at = content.find(word, end)


def read_launches(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's `launches.jsonl` that are whole: a call of `train` each, the first one first."""
    found = []
    with suppress(OSError):
        for text in (path / LAUNCHES).read_bytes().splitlines():
            with suppress(ValueError):
                found.append(json.loads(text))
    return found


def last_mesh(path: Path) -> dict[str, int] | None:
    """Axis → number of processes, of the last call that trained a run; None where it is not known."""
    for line in reversed(read_launches(path)):
        with suppress(KeyError, TypeError, AttributeError, ValueError):
            return {str(name): int(size) for name, size in line["mesh"].items()}
    return None


def mesh_words(mesh: Mapping[str, int]) -> str:
    """The axes of a mesh over which there are several processes, such as ``"shard 2 × tp 4"``; of one process nothing."""
    return " × ".join(f"{name} {size}" for name, size in mesh.items() if size > 1)


def _line(text: bytes) -> dict[str, Any] | None:
    """A line of metrics; None for one that is cut short, or something else."""
    try:
        line = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    whole = isinstance(line, dict) and type(line.get("step")) is int
    numbers = whole and all(isinstance(value, (int, float)) for value in line.values())
    return line if numbers else None


def _settings(path: Path) -> dict[str, Any]:
    """Dotted name → value of a TOML file."""
    with path.open("rb") as file:
        return dict(_flat(tomllib.load(file), ""))


def _flat(table: Mapping[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value


def _checkpoint(folder: Path) -> tuple[int, str]:
    """The step of the newest checkpoint, and what is plainly wrong with it: sizes are looked at, hashes are not."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return 0, ""
    steps = {int(name[5:]): name for name in names if name.startswith("step-") and name[5:].isdecimal()}
    if not steps:
        return 0, ""
    newest = folder / steps[max(steps)]
    try:
        files = json.loads((newest / "manifest.json").read_bytes())["files"]
        wrong = [name for name, entry in files.items() if (newest / name).stat().st_size != entry["bytes"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return max(steps), f"{newest.name} is not complete"
    return max(steps), f"{newest.name}/{wrong[0]} has another size than was written" if wrong else ""
