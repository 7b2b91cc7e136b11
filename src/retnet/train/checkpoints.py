"""Checkpoints of training (weights, optimiser, loader, randomness), whole tensors whatever the number of processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retnet.data import Prepared, RunData, Tokenizer
from retnet.errors import UserError, told
from retnet.io import write_text
from retnet.model import LanguageModel
from retnet.model.checkpoint import (
    Files,
    first_not_finite,
    load_tensors,
    load_weights,
    model_files,
    save_tensors,
    weights,
)
from retnet.train.averaging import AveragedWeights
from retnet.train.config import RunConfig
from retnet.train.distributed import Ranks, collect, own_part, shard
from retnet.train.initial_weights import fill
from retnet.train.optimizer import optimizer_tensors, optimizers, restore_optimizers
from retnet.train.run_dir import RunDirectory
from retnet.train.tensor_parallel import global_tensors

TRAINED = (
    "training.safetensors"  # beside an average, which is the model: the weights that training goes on with
)


class Standing(NamedTuple):
    """Where training stands."""

    step: int = 0  # steps done
    best: tuple[float, int] | None = None  # validation in bits per byte, and its step
    skipped: int = 0  # steps of those done
    skipped_in_a_row: int = 0  # the last of these
    norms: tuple[float, ...] = ()  # of the last gradients; see `StepFilter`

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Standing:
        """From what JSON made of one, an older one too."""
        best = plain["best"]
        skipped, in_a_row = plain.get("skipped", 0), plain.get("skipped_in_a_row", 0)
        norms = tuple(plain.get("norms", ()))
        return cls(plain["step"], (best[0], best[1]) if best else None, skipped, in_a_row, norms)


class Learned(NamedTuple):
    """What steps change: the model, its optimisers' memory, and the average of its weights, if one is kept."""

    model: LanguageModel
    optimizers: tuple[torch.optim.Optimizer, ...]
    average: AveragedWeights | None


class _Saved(NamedTuple):
    """What the first rank begins with: of the newest checkpoint, or fresh from the seed."""

    model: LanguageModel  # on the CPU
    memory: dict[str, Tensor]  # of the optimisers
    average: dict[str, Tensor]  # of the weights; empty without one
    standing: Standing


class Checkpoints:
    """The checkpoints of one run: the first rank reads and writes them for all."""

    def __init__(
        self, config: RunConfig, run: RunDirectory, prepared: Prepared, device: torch.device, ranks: Ranks
    ) -> None:
        self._config, self._run, self._device, self._ranks = config, run, device, ranks
        self._tokenizer = prepared.tokenizer
        self._data = RunData.of(prepared)

    def begin(self) -> tuple[Learned, Standing]:
        """The model and its optimisers on the device, and where they stand: as the newest checkpoint says, or fresh.

        The first rank's CPU holds the whole model until all ranks have their parts.

        Raises:
            UserError: the checkpoint is damaged, or the run was begun with another corpus or tokenizer.
        """
        ranks, c = self._ranks, self._config.train
        saved = ranks.lead(self._read)
        standing = Standing.of(ranks.tell((saved.standing if saved else Standing())._asdict()))
        model = saved.model if saved else _hollow(self._config)
        model = model.to(self._device) if ranks.alone else shard(model, self._device, ranks)
        learners = optimizers(model, c)
        restore_optimizers(model, learners, saved.memory if saved else {}, ranks)
        average = AveragedWeights(model, c.ema, ranks) if c.ema else None
        if average and standing.step:
            average.restore(saved.average if saved else {})
        return Learned(model, learners, average), standing

    def save(self, learned: Learned, standing: Standing) -> None:
        """Writes a checkpoint. From several ranks, the first one's CPU gathers 12 bytes a parameter.

        Raises:
            UserError: a weight or the optimisers' memory is not a finite number, which no checkpoint may hold.
        """
        model, average = learned.model, learned.average
        memory = optimizer_tensors(model, learned.optimizers)
        bad = spoiled({**weights(model), **memory}, self._ranks)
        if bad is not None:
            raise UserError(
                f"{bad} is not finite after step {standing.step}, so nothing was saved; {self._run.whole}. "
                "Try a lower train.learning_rate or more train.warmup_steps"
            )
        whole, trained, memory = model, None, self._collect(memory, model)
        if average or not self._ranks.alone:
            trained = self._collect(weights(model), model)
            averages = self._collect(average.tensors, model) if average else {}
            whole = _hollow(self._config)
            whole.load_state_dict({**trained, **averages}, strict=False, assign=True)
        tokens = {"train": self._data.train, "validation": self._data.validation}
        state = {**standing._asdict(), "data": tokens}
        files: Files = {
            **model_files(whole),
            **({TRAINED: lambda path: save_tensors(trained or {}, path)} if average else {}),
            "tokenizer.json": self._tokenizer.save,
            "optimizer.safetensors": lambda path: save_tensors(memory, path),
            "random.safetensors": lambda path: save_tensors(_random_state(self._device), path),
            "trainer.json": lambda path: write_text(path, json.dumps(state, indent=2) + "\n"),
        }
        best = standing.best[1] if standing.best else None
        keep = self._config.train.keep
        self._ranks.lead(lambda: self._run.save(standing.step, best, files, keep=keep))

    def _collect(self, parts: Mapping[str, Tensor], model: LanguageModel) -> dict[str, Tensor]:
        return collect(global_tensors(parts, model, self._ranks.mesh), self._ranks)

    def _read(self) -> _Saved:
        torch.manual_seed(self._config.train.seed)
        model = LanguageModel(self._config.model)
        path = self._run.latest()
        self._require_same_data(path)
        if path is None:
            fill(model, self._config, self._run)
            return _Saved(model, {}, {}, Standing())
        state = _trainer_state(path)
        load_weights(model, path)
        average = {}
        if self._config.train.ema:
            average = {name: x.clone() for name, x in weights(model).items()}
            load_weights(model, path, TRAINED)
        _restore_random_state(load_tensors(path / "random.safetensors"), self._device)
        standing = Standing.of(state)
        self._run.point(standing.step, standing.best[1] if standing.best else None)
        return _Saved(model, load_tensors(path / "optimizer.safetensors"), average, standing)

    def _require_same_data(self, path: Path | None) -> None:
        """Refuses to go on with other tokens than the run began with; of older versions only checkpoints know them."""
        then = RunData.read(self._run.path)
        if then is None and path is not None:
            then = RunData(
                Tokenizer.load(path / "tokenizer.json").fingerprint, **_trainer_state(path)["data"]
            )
        apart = self._config.data.validation is not None
        if then is not None and (changed := then.changed(self._data, apart=apart)):
            raise UserError(
                f"{changed} since {self._run.path} was begun, so the run cannot go on as it began; "
                "restore the files, or start a new run"
            )
        self._run.note_data(
            self._config.data, self._data
        )  # the same tokens, of text that may lie otherwise now


def _trainer_state(path: Path) -> dict[str, Any]:
    with told(f"read the checkpoint {path}", "--resume --checkpoint NAME takes another one"):
        state: dict[str, Any] = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
        return state


def spoiled(tensors: Mapping[str, Tensor], ranks: Ranks) -> str | None:
    """The name of a tensor that is not finite, the same on all ranks; all must ask."""
    own = {name: own_part(x, ranks) for name, x in tensors.items()}
    return next((name for name in ranks.gather(first_not_finite(own)) if name is not None), None)


def _hollow(config: RunConfig) -> LanguageModel:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return LanguageModel(config.model)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
