"""Checkpoints of training (weights, optimiser, loader, randomness), whole tensors whatever the number of processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from retnet.data import Prepared
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
from retnet.train.config import RunConfig
from retnet.train.distributed import Ranks, collect, own_part, shard
from retnet.train.initial_weights import fill
from retnet.train.optimizer import adamw, optimizer_tensors, restore_optimizer
from retnet.train.run_dir import RunDirectory


class Standing(NamedTuple):
    """Where training stands."""

    step: int = 0  # steps done
    best: tuple[float, int] | None = None  # validation in bits per byte, and its step


class _Saved(NamedTuple):
    """What the first rank begins with: of the newest checkpoint, or fresh from the seed."""

    model: LanguageModel  # on the CPU
    memory: dict[str, Tensor]  # of the optimiser
    standing: Standing


class Checkpoints:
    """The checkpoints of one run: the first rank reads and writes them for all."""

    def __init__(
        self, config: RunConfig, run: RunDirectory, prepared: Prepared, device: torch.device, ranks: Ranks
    ) -> None:
        self._config, self._run, self._device, self._ranks = config, run, device, ranks
        self._tokenizer = prepared.tokenizer
        # what identifies the tokens: a run goes on only with those it began with
        self._data = {"train": prepared.train.fingerprint, "validation": prepared.validation.fingerprint}

    def begin(self) -> tuple[LanguageModel, torch.optim.AdamW, Standing]:
        """The model and its optimiser on the device, and where they stand: as the newest checkpoint says, or fresh.

        The first rank's CPU holds the whole model until all ranks have their parts.

        Raises:
            UserError: the checkpoint is damaged, or of another corpus.
        """
        ranks = self._ranks
        saved = ranks.lead(self._read)
        step, best = ranks.tell(saved.standing if saved else Standing())
        model = saved.model if saved else _hollow(self._config)
        model = model.to(self._device) if ranks.alone else shard(model, self._device, ranks)
        optimizer = adamw(model, self._config.train)
        restore_optimizer(model, optimizer, saved.memory if saved else {}, ranks)
        return model, optimizer, Standing(step, (best[0], best[1]) if best else None)

    def save(self, model: LanguageModel, optimizer: torch.optim.Optimizer, standing: Standing) -> None:
        """Writes a checkpoint. From several ranks, the first one's CPU gathers 12 bytes a parameter.

        Raises:
            UserError: a weight or the optimiser's memory is not a finite number, which no checkpoint may hold.
        """
        bad = spoiled({**weights(model), **optimizer_tensors(model, optimizer)}, self._ranks)
        if bad is not None:
            raise UserError(
                f"{bad} is not finite after step {standing.step}, so nothing was saved; the last checkpoint is whole. "
                "Try a lower train.learning_rate or more train.warmup_steps"
            )
        whole = model
        if not self._ranks.alone:
            whole = _hollow(self._config)
            whole.load_state_dict(collect(weights(model), self._ranks), strict=False, assign=True)
        memory = collect(optimizer_tensors(model, optimizer), self._ranks)
        state = {**standing._asdict(), "data": self._data}
        files: Files = {
            **model_files(whole),
            "tokenizer.json": self._tokenizer.save,
            "optimizer.safetensors": lambda path: save_tensors(memory, path),
            "random.safetensors": lambda path: save_tensors(_random_state(self._device), path),
            "trainer.json": lambda path: write_text(path, json.dumps(state, indent=2) + "\n"),
        }
        best = standing.best[1] if standing.best else None
        keep = self._config.train.keep
        self._ranks.lead(lambda: self._run.save(standing.step, best, files, keep=keep))

    def _read(self) -> _Saved:
        torch.manual_seed(self._config.train.seed)
        model = LanguageModel(self._config.model)
        path = self._run.latest()
        if path is None:
            fill(model, self._config, self._run)
            return _Saved(model, {}, Standing())
        with told(f"read the checkpoint {path}", "--resume --checkpoint NAME takes another one"):
            state = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
        if state["data"] != self._data:
            raise UserError(
                f"the corpus has changed since {path} was written, so the run cannot go on as it began; "
                "restore the files, or start a new run"
            )
        load_weights(model, path)
        _restore_random_state(load_tensors(path / "random.safetensors"), self._device)
        standing = Standing(state["step"], tuple(state["best"]) if state["best"] else None)
        self._run.point(standing.step, standing.best[1] if standing.best else None)
        return _Saved(model, load_tensors(path / "optimizer.safetensors"), standing)


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
