"""Checkpoints of training: weights, optimiser, loader, randomness. They do not know on how many processes they are read.

One process writes whole tensors, and waits until they are on the disk. Several go on while each writes what it holds
(`retnet.model.sharded`): what is learned is copied while the next step computes, which waits for the copy before it changes
anything, and a checkpoint waits for the one before if it is still under way.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from retnet.data import Prepared, RunData, Tokenizer
from retnet.errors import UserError, told
from retnet.io import write_text
from retnet.model import LanguageModel
from retnet.model.checkpoint import (
    first_not_finite,
    load_into,
    verify,
    weights,
)
from retnet.model.checkpoint_layout import KINDS, TensorPart
from retnet.model.language_model import fresh_weights
from retnet.model.safetensors_files import load_tensors, save_tensors
from retnet.settings import dump
from retnet.train.averaging import AveragedWeights
from retnet.train.config import RunConfig
from retnet.train.distributed import Ranks, broadcast_weights, own_part, shard, take_parts
from retnet.train.initial_weights import own_checkpoint, starting_weights
from retnet.train.optimizer import empty_memory, optimizer_tensors, optimizers
from retnet.train.run_dir import RunDirectory
from retnet.train.tensor_parallel import global_tensors

if TYPE_CHECKING:
    from retnet.model.sharded import PartWriter, PartWriting


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


class Written(NamedTuple):
    """A checkpoint that several processes wrote while they went on."""

    step: int
    stall: float  # seconds that training waited for it: before a step that needed its copy, and where it was wanted complete
    seconds: float  # until it was complete


@dataclass
class _Writing:
    """A checkpoint under way."""

    step: int
    began: float
    parts: PartWriting
    stall: float = 0.0
    ended: float = 0.0  # once it is complete


class Checkpoints:
    """The checkpoints of one run: the first rank reads and writes them for all, but for tensors."""

    def __init__(
        self, config: RunConfig, run: RunDirectory, prepared: Prepared, device: torch.device, ranks: Ranks
    ) -> None:
        self._config, self._run, self._device, self._ranks = config, run, device, ranks
        self._tokenizer = prepared.tokenizer
        self._data = RunData.of(prepared)
        self._writer: PartWriter | None = None
        self._writing: _Writing | None = None

    def begin(self) -> tuple[Learned, Standing]:
        """The model and its optimisers on the device, and where they stand: as the newest checkpoint says, or fresh.

        Of several ranks each draws all fresh weights, one at a time, and keeps its parts; of a checkpoint it reads these.
        Only what `train.start_from` names and no run or checkpoint is, is read whole, by the first.

        Raises:
            UserError: the checkpoint is damaged, or the run was begun with another corpus or tokenizer.
        """
        ranks, c = self._ranks, self._config.train
        if not ranks.alone:
            from retnet.model.sharded import PartWriter

            self._writer = PartWriter(ranks.new_group())
        path = self._verified()
        ranks.lead(lambda: self._require_same_data(path))
        model = self._model(fresh=path is None)
        learners = optimizers(model, c)
        average = AveragedWeights(model, c.ema, ranks) if c.ema else None
        standing = Standing()
        if path is not None:
            learned = Learned(model, learners, average)
            plain = ranks.together(lambda: self._restore(path, learned))
            standing = Standing.of(ranks.tell(plain))
            best = standing.best[1] if standing.best else None
            ranks.lead(lambda: self._run.point(standing.step, best))
        return Learned(model, learners, average), standing

    def save(self, learned: Learned, standing: Standing) -> None:
        """Writes a checkpoint; of several processes, begins to, after the one before is complete.

        Raises:
            UserError: the one before, or of one process this one, could not be written; or it would hold a number that is
                not finite.
        """
        begin = time.perf_counter()
        self.wait()
        model, average = learned.model, learned.average
        own = weights(model)
        held = {"model": {**own, **average.tensors}, "training": own} if average else {"model": own}
        held["optimizer"] = optimizer_tensors(model, learned.optimizers)
        files, step = self._files(standing), standing.step
        best, keep = standing.best[1] if standing.best else None, self._config.train.keep
        if self._writer is None:
            for tensors in held.values():
                self._require_finite(step, tensors)
            for kind, tensors in held.items():
                files[f"{kind}.safetensors"] = functools.partial(save_tensors, tensors)
            self._run.save(step, best, files, keep=keep)
            return
        parts = self._writer.write(
            self._run.partial(step),
            {kind: self._parts(tensors, model) for kind, tensors in held.items()},
            begin=lambda: self._run.begin_save(step),
            check=functools.partial(self._require_finite, step),
            finish=lambda written: self._run.save(step, best, files, keep=keep, written=written),
        )
        writing = self._writing = _Writing(step, begin, parts)
        parts.complete.add_done_callback(lambda _: setattr(writing, "ended", time.perf_counter()))
        writing.stall = time.perf_counter() - begin

    @property
    def copied(self) -> bool:
        """Whether what was learned is no longer wanted as it was when the last checkpoint was begun."""
        return self._writing is None or self._writing.parts.copied.is_set()

    def wait_for_copy(self) -> None:
        """Waits until `copied`: before that, nothing that is learned may change."""
        if self._writing is not None:
            begin = time.perf_counter()
            self._writing.parts.copied.wait()
            self._writing.stall += time.perf_counter() - begin

    def written(self) -> Written | None:
        """The checkpoint that was completed since the last call, if one was. It does not wait.

        Raises:
            UserError: it could not be written; other ranks may not know of it yet.
        """
        writing = self._writing
        if writing is None or not writing.parts.complete.done():
            return None
        self._require_written(writing)
        self._writing = None
        ended = writing.ended or time.perf_counter()  # done, and not noted yet
        seconds = ended - writing.began
        return Written(writing.step, min(writing.stall, seconds), seconds)

    def wait(self) -> None:
        """Waits until no checkpoint is under way; all ranks must call it.

        Raises:
            UserError: on all ranks, it could not be written.
        """
        if self._writing is not None:
            self._require_written(self._writing)

    def close(self) -> None:
        """Ends what is under way, well or badly: who calls it has been told, or has something worse to say."""
        if self._writing is not None:
            wait([self._writing.parts.complete])
            with suppress(BaseException):
                self._require_written(self._writing)
        if self._writer is not None:
            self._writer.close()

    def _require_written(self, writing: _Writing) -> None:
        from retnet.model.sharded import failure

        begin = time.perf_counter()
        doing = f"write the checkpoint of step {writing.step}"
        error = failure(writing.parts.complete, doing, lambda: self._run.whole)
        writing.stall += time.perf_counter() - begin
        if error is None:
            return
        if self._ranks.first:
            self._run.drop_partial(writing.step)
        raise error

    def _require_finite(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        if (bad := first_not_finite(tensors)) is not None:
            kind, _, name = bad.partition("/")
            raise UserError(
                f"{name if kind in KINDS else bad} is not finite after step {step}, so nothing was saved; "
                f"{self._run.whole}. Try a lower train.learning_rate or more train.warmup_steps"
            )

    def _files(self, standing: Standing) -> dict[str, Callable[[Path], None]]:
        """What a checkpoint holds beside tensors that are learned, as it is now."""
        tokens = {"train": self._data.train, "validation": self._data.validation}
        state = json.dumps({**standing._asdict(), "data": tokens}, indent=2) + "\n"
        random, config = _random_state(self._device), self._config.model
        return {
            "model.toml": lambda path: write_text(path, dump(config)),
            "tokenizer.json": self._tokenizer.save,
            "random.safetensors": lambda path: save_tensors(random, path),
            "trainer.json": lambda path: write_text(path, state),
        }

    def _verified(self) -> Path | None:
        """The newest checkpoint, if there is one. Each rank verifies some of its files.

        Raises:
            UserError: on all ranks, it is damaged; says which older one is whole.
        """
        ranks, run = self._ranks, self._run
        newest = ranks.lead(run.latest)
        name = ranks.tell(str(newest) if newest else "")
        if not name:
            return None
        problem = ""
        try:
            verify(Path(name), ranks.rank, ranks.world)
        except UserError as error:
            problem = str(error)
        if found := next(filter(None, ranks.gather(problem)), ""):
            ranks.lead(lambda: run.refuse_latest(found))
        return Path(name)

    def _model(self, fresh: bool) -> LanguageModel:
        """On the device, or this rank's part of it there; if not fresh, with any numbers as weights."""
        ranks, source, model_config = self._ranks, self._config.train.start_from, self._config.model
        torch.manual_seed(self._config.train.seed)
        device = self._device
        model = LanguageModel(model_config).to(device) if ranks.alone else shard(model_config, device, ranks)
        if fresh and source is not None:
            self._start(model, source)
        elif fresh and not ranks.alone:
            take_parts(model, fresh_weights(model_config), ranks)
        return model

    def _start(self, model: LanguageModel, source: str) -> None:
        """Copies the weights that a run starts from into its model: each rank reads its part, or the first reads for all."""
        ranks = self._ranks
        own = ranks.tell(str(ranks.lead(lambda: own_checkpoint(source)) or ""))
        found = ranks.lead(lambda: starting_weights(source, self._run, weights=not own))
        if own:
            path = Path(own)
            ranks.together(lambda: verify(path, ranks.rank, ranks.world))
            ranks.together(lambda: load_into(self._held(model, weights(model)), path))
        elif ranks.alone:
            assert found is not None
            with torch.no_grad():
                for name, x in weights(model).items():
                    x.copy_(found[name])
        else:
            take_parts(model, broadcast_weights(found, model, ranks), ranks)

    def _restore(self, path: Path, learned: Learned) -> dict[str, Any]:
        """Reads what was learned, this rank's part of it, and the random state; returns where training stands, as JSON."""
        model, average = learned.model, learned.average
        held = functools.partial(self._held, model)
        own = weights(model)
        load_into(held(own), path, "training" if average else "model")
        if average:
            averages = {
                name: average.tensors[name] if name in average.tensors else x.detach().clone()
                for name, x in own.items()
            }
            load_into(held(averages), path, "model")
        load_into(lambda names: held(empty_memory(model, learned.optimizers, names)), path, "optimizer")
        _restore_random_state(load_tensors(path / "random.safetensors"), self._device)
        return _trainer_state(path)

    def _held(self, model: LanguageModel, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor | TensorPart]:
        """What this rank holds of tensors that are shaped as a model's weights."""
        return tensors if self._ranks.alone else self._parts(tensors, model)

    def _parts(self, tensors: Mapping[str, Tensor], model: LanguageModel) -> dict[str, TensorPart]:
        from retnet.model.sharded import local_part

        whole = global_tensors(tensors, model, self._ranks.mesh)
        return {name: local_part(x) for name, x in whole.items()}

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


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
