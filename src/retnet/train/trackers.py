"""Trackers of experiments beside `metrics.jsonl`, each through its own library: TensorBoard, Weights & Biases."""

from __future__ import annotations

import hashlib
import os
import tomllib
from collections.abc import Mapping
from typing import Any, Protocol

from retnet.data.remote import without_keys
from retnet.errors import UserError, reason_of, told
from retnet.settings import dump
from retnet.train.config import RunConfig
from retnet.train.run_dir import RunDirectory
from retnet.train.run_summary import read_launches


class Tracker(Protocol):
    """Something that is told what was measured."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Takes what was measured at the end of a step."""

    def close(self, finished: bool) -> None:
        """Ends it, all of it written; not `finished`: the run failed, or was stopped before its last step.

        Raises:
            UserError: what it kept back cannot be written.
        """


def trackers(run: RunDirectory, config: RunConfig, step: int) -> list[Tracker]:
    """Those that `train.tensorboard` and `train.wandb` ask for, of a run that goes on after a step.

    Raises:
        UserError: a library is missing, or cannot begin.
    """
    found: list[Tracker] = [TensorBoard(run, step)] if config.train.tensorboard else []
    return [*found, WandB(run, config)] if config.train.wandb else found


class TensorBoard:
    """Event files in `tensorboard/`."""

    def __init__(self, run: RunDirectory, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "train.tensorboard needs TensorBoard: pip install 'retnet[tensorboard]'"
            ) from None
        self._run, self._path = run, run.path / "tensorboard"
        self._board: Any = SummaryWriter(str(self._path), purge_step=step + 1)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """As of any tracker; it is with the system before this returns, as a killed process closes nothing."""
        with told(f"write {self._path}", self._run.whole):
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()

    def close(self, finished: bool) -> None:
        """As of any tracker; event files have no word for how a run ended."""
        with told(f"write {self._path}", self._run.whole):
            self._board.close()


class WandB:
    """A run of Weights & Biases, in the project "retnet" or WANDB_PROJECT's; all calls of a run are one there.

    WANDB_MODE=offline keeps it in `wandb/` of the run, for `wandb sync`.
    """

    def __init__(self, run: RunDirectory, config: RunConfig) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("train.wandb needs Weights & Biases: pip install 'retnet[wandb]'") from None
        first = next(iter(read_launches(run.path)), {})
        place = f"{run.path.resolve()} {first.get('time')}"
        try:
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "retnet"),
                name=run.path.name,
                id=hashlib.sha256(place.encode()).hexdigest()[:16],
                resume="allow",
                dir=run.path,
                config=tomllib.loads(without_keys(dump(config))),
            )
        except wandb.Error as error:
            raise UserError(
                f"train.wandb cannot begin: {reason_of(error)}; `wandb login`, or WANDB_MODE=offline keeps it in the run"
            ) from None

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """As of any tracker."""
        self._run.log(dict(values), step=step)

    def close(self, finished: bool) -> None:
        """As of any tracker; a run that is not finished is "failed" there until it goes on."""
        self._run.finish(exit_code=0 if finished else 1)
