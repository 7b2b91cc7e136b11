"""A run directory: `config.toml` (resolved), `env.json`, `data.json`, `metrics.jsonl`, `checkpoints/`, and `plan.json`.

`launches.jsonl` has a line for each call of `train`: from which step it went on, when, and on which mesh of processes.

A checkpoint directory holds the model, the tokenizer, the optimiser, the random state and where training stands. The
files `best` and `last` in `checkpoints/` name one each.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from retnet import lock
from retnet.data import DataConfig, RunData
from retnet.errors import told
from retnet.io import write_json, write_text
from retnet.model.checkpoint import begin_checkpoint, staging, verify, write_checkpoint
from retnet.model.checkpoint_layout import Entry, Files
from retnet.model.runs import find_checkpoint
from retnet.settings import UserError, differences, dump, load
from retnet.train.config import ParallelConfig, RunConfig, TrainConfig
from retnet.train.run_summary import LAUNCHES

# Settings that may differ when a run is continued: they change what is kept and shown, not what is learned; where text
# lies, since what identifies a corpus is its tokens, which `data.json` knows; and how processes share the work.
HARMLESS = (
    frozenset(
        f"train.{name}"
        for name in (
            "log_every",
            "eval_every",
            "eval_tokens",
            "checkpoint_every",
            "keep",
            "tensorboard",
            "wandb",
            "start_from",
            "skip_limit",
            "patience",
        )
    )
    | frozenset(f"data.{name}" for name in ("corpus", "validation", "tokenizer", "cache"))
    | frozenset(f"parallel.{name}" for name in ("replicate", "shard", "tp", "cp"))
)
# All that a run writes of its own, so all that one may take away that came to nothing.
OWN = {
    *("config.toml", "env.json", "data.json", "plan.json", "origin.json", "teacher.json", "tokenizer.json"),
    *("metrics.jsonl", "changes.jsonl", "launches.jsonl", "checkpoints", "tensorboard", "wandb", "profile"),
}
PLAN = "plan.json"
_STEP = re.compile(r"step-\d{8,}")  # a copy that somebody keeps beside them is none of ours
LENGTH = "train.steps"  # may change too: the run then ends earlier or later, and its schedule with it
PHASES = "data.phases"  # those that have not begun may change too


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / "config.toml").is_file()

    @property
    def around(self) -> Path | None:
        """The run whose folder of checkpoints this is, or lies in, or whose file it is, if any."""
        if self.path.is_file() and RunDirectory(self.path.parent).exists:
            return self.path.parent
        for folder in (self.path, self.path.parent):
            if folder.name == "checkpoints" and RunDirectory(folder.parent).exists:
                return folder.parent
        return None

    def create(self, config: RunConfig, environment: dict[str, Any], data: RunData) -> None:
        """Begins a run: writes what it is made from and where it runs.

        Raises:
            UserError: the directory cannot be written.
        """
        with self.writing():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "env.json", environment)
            data.write(self.path)
            write_text(self.path / "config.toml", dump(config))

    @contextmanager
    def beginning(self, begun: Callable[[], bool]) -> Iterator[None]:
        """Around a call of `train`: one that fails before anything was begun leaves nothing; a run that was there stays.

        What others put there meanwhile stays too: prepared data, other runs.

        Args:
            begun: whether a step was made.
        """
        before = None if self.exists else set(os.listdir(self.path))
        try:
            yield
        except BaseException:
            if before is not None and not begun() and not lock.lost(self.path):
                with suppress(OSError):
                    for new in OWN.intersection(os.listdir(self.path)) - before:
                        path = self.path / new
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise

    def config(self) -> RunConfig:
        """The resolved configuration of the run."""
        return load(RunConfig, self.path / "config.toml")

    def begin_save(self, step: int) -> None:
        """Makes the folder `partial` that several processes write their files of a checkpoint into.

        Raises:
            UserError: it cannot be made; or the directory is not this process's any more.
        """
        self._require_own(step)
        with self.writing():
            begin_checkpoint(self.checkpoints / _name(step))

    def partial(self, step: int) -> Path:
        """Where the checkpoint of a step is written before it is complete."""
        return staging(self.checkpoints / _name(step))

    def drop_partial(self, step: int) -> None:
        """Removes what was written of a checkpoint that came to nothing: the next one may need its space."""
        if not lock.lost(self.path):  # or another process writes there now
            shutil.rmtree(self.partial(step), ignore_errors=True)

    def save(
        self,
        step: int,
        best_step: int | None,
        files: Files,
        *,
        keep: int,
        written: Mapping[str, Entry] | None = None,
    ) -> None:
        """Writes the checkpoint of a step, and removes all but the last `keep` and the best.

        Args:
            step: that was made last.
            best_step: whose validation was the best so far, if any.
            files: what the checkpoint holds.
            keep: how many of the last ones stay.
            written: what it holds beside them, that was written after `begin_save`.

        Raises:
            UserError: it cannot be written, and says which one is whole; or the directory is not this process's any more.
        """
        self._require_own(step)
        write_checkpoint(self.checkpoints / _name(step), files, whole=self.whole, written=written)
        self.point(step, best_step)
        with self.writing():
            for old in self._steps()[:-keep]:
                if best_step is None or old.name != _name(best_step):
                    # gone at once, however long removing takes; NFS keeps what others read, and `latest` removes it then
                    hidden = staging(old)
                    old.rename(hidden)
                    shutil.rmtree(hidden, ignore_errors=True)

    def _require_own(self, step: int) -> None:
        if not self.exists:
            raise UserError(
                f"the run directory {self.path} is gone, moved or removed; step {step} is not saved"
            )
        if lock.lost(self.path):
            raise UserError(
                f"the run directory {self.path} is another one now, or in use by another process too: it was moved, or its "
                f"{lock.LOCK} removed, while training went on; step {step} is not saved"
            )

    def point(self, last_step: int, best_step: int | None) -> None:
        """Makes `last` and `best` name the checkpoints of these steps."""
        with self.writing():
            write_text(self.checkpoints / "last", _name(last_step) + "\n")
            if best_step is not None:
                write_text(self.checkpoints / "best", _name(best_step) + "\n")

    @property
    def whole(self) -> str:
        """What can be gone on with when nothing more can be written, for messages."""
        steps = self._steps()
        return (
            f"{steps[-1].name} is whole, and --resume goes on from it"
            if steps
            else "nothing was saved before"
        )

    def writing(self) -> AbstractContextManager[None]:
        """Around what is written here: when it cannot be, the message says what is whole."""
        return told(f"write the run directory {self.path}", self.whole)

    def change(self, config: RunConfig, step: int, changes: list[str]) -> None:
        """Goes on with other settings: `config.toml` says the new ones, `changes.jsonl` what changed and when."""
        line = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "changes": changes}
        with self.writing():
            with (self.path / "changes.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if self.has_plan:
                plan = json.loads((self.path / PLAN).read_text(encoding="utf-8"))
                write_json(self.path / PLAN, {**plan, "steps": config.train.steps})
            write_text(self.path / "config.toml", dump(config))

    def note_launch(self, step: int, processes: int, axes: ParallelConfig, restarts: int) -> None:
        """Adds to `launches.jsonl` how a call of `train` goes on, which may be on other processes than the one before."""
        line = {
            "step": step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "processes": processes,
            "mesh": vars(axes),
            "restarts": restarts,
        }
        with self.writing(), (self.path / LAUNCHES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def note_data(self, config: DataConfig, data: RunData) -> None:
        """Makes `config.toml` and `data.json` say where the run's text lies now, and what it is."""
        old = self.config()
        with self.writing():
            if old.data != config:
                write_text(self.path / "config.toml", dump(replace(old, data=config)))
            if RunData.read(self.path) != data:
                data.write(self.path)

    def plan(self, asked: TrainConfig, chosen: TrainConfig, step: int) -> None:
        """Notes how many steps fit into `train.minutes`: `plan.json` decides, `config.toml` follows.

        Args:
            asked: the settings before.
            chosen: and with the steps and the rise of the learning rate that were chosen.
            step: after which; its checkpoint is there already, so that no step before it is made again.
        """
        plan = {
            "after": step,
            "asked": asked.steps,
            "steps": chosen.steps,
            "warmup_steps": chosen.warmup_steps,
        }
        with self.writing():
            write_json(self.path / PLAN, plan)
            write_text(self.path / "config.toml", dump(self.planned(self.config())))

    @property
    def has_plan(self) -> bool:
        """Whether `plan` was called for this run, in this process or an earlier one."""
        return (self.path / PLAN).is_file()

    def planned(self, config: RunConfig) -> RunConfig:
        """A configuration of this run with the steps that were planned, unless it says other ones than were asked for.

        Raises:
            UserError: the plan is damaged.
        """
        if not self.has_plan:
            return config
        try:
            plan = json.loads((self.path / PLAN).read_text(encoding="utf-8"))
            steps = plan["steps"] if config.train.steps == plan["asked"] else config.train.steps
            return replace(
                config, train=replace(config.train, steps=steps, warmup_steps=plan["warmup_steps"])
            )
        except (OSError, ValueError, KeyError, TypeError, UserError):
            raise UserError(f"{self.path / PLAN} is damaged; start a new run in another --run-dir") from None

    def steps_done(self) -> int:
        """Of the newest checkpoint; 0 without one."""
        steps = self._steps()
        return int(steps[-1].name.removeprefix("step-")) if steps else 0

    def choose(self, name: str) -> None:
        """Makes a checkpoint the newest: those after it are set aside, in `checkpoints/aside`.

        Args:
            name: "best", "last" or "step-…".

        Raises:
            UserError: no such checkpoint, or it is damaged.
        """
        chosen, _ = find_checkpoint(self.path, name)
        verify(chosen)
        aside = self.checkpoints / "aside"
        with self.writing():
            for later in self._steps():
                if later.name > chosen.name:
                    aside.mkdir(exist_ok=True)
                    number = sum(path.name.startswith(later.name) for path in aside.iterdir())
                    later.rename(aside / (f"{later.name}.{number}" if number else later.name))

    def latest(self) -> Path | None:
        """The newest complete checkpoint, to be verified; None if there is none. Removes what interrupted writes left."""
        with self.writing():
            for partial in self.checkpoints.glob(".*.partial"):
                shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink()
        steps = self._steps()
        return steps[-1] if steps else None

    def refuse_latest(self, problem: str) -> NoReturn:
        """Says what is wrong with the newest checkpoint, and which older one is whole.

        Raises:
            UserError: always.
        """
        whole = next((step.name for step in reversed(self._steps()[:-1]) if _whole(step)), None)
        instead = (
            f"{whole} is whole: --resume --checkpoint {whole} goes on from there"
            if whole
            else "no older one is whole; start a new run"
        )
        raise UserError(f"{problem.removesuffix('; take another checkpoint')}; {instead}") from None

    def _steps(self) -> list[Path]:
        found = (path for path in self.checkpoints.glob("step-*") if _STEP.fullmatch(path.name))
        return sorted(path for path in found if path.is_dir())


def _whole(checkpoint: Path) -> bool:
    try:
        verify(checkpoint)
    except UserError:
        return False
    return True


def _name(step: int) -> str:
    return f"step-{step:08d}"


def changes(old: object, new: object, harmless: Container[str] = HARMLESS) -> list[str]:
    """Settings that differ between two configurations, as ``"train.steps: 100 → 200"``; harmless ones are left out."""
    found = differences(old, new)
    return [f"{place}: {before!r} → {now!r}" for place, before, now in found if place not in harmless]
