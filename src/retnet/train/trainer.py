"""The training loop: from a configuration to a run directory, exactly resumable.

What a step computes is a function of the configuration and of what the last checkpoint holds: weights, the optimiser's
memory, the random state, and the step itself, which is all the data loader needs. A run that was killed and continued
therefore ends with the weights of one that never was.
"""

from __future__ import annotations

import functools
import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retnet.data import Batch, Batches, Prepared, prepare
from retnet.model import LanguageModel
from retnet.model.checkpoint import Files, load_tensors, load_weights, model_files, save_tensors
from retnet.model.cost import cost
from retnet.settings import UserError
from retnet.train import host
from retnet.train.config import RunConfig
from retnet.train.objective import Objective, Quality, count, evaluate
from retnet.train.optimizer import adamw, learning_rate, optimizer_tensors, restore_optimizer
from retnet.train.progress import Progress
from retnet.train.run_dir import Metrics, RunDirectory, differences


class Outcome(NamedTuple):
    """How a call of `train` ended."""

    run_dir: Path
    step: int  # steps done, in all calls together
    finished: bool  # False: stopped by a signal, saved, ready to be continued
    quality: Quality | None  # on the validation split, when last measured
    prepared: Prepared


def train(
    config: RunConfig, run_dir: str | Path, *, resume: bool = False, progress: Progress | None = None
) -> Outcome:
    """Trains a model into a run directory.

    Args:
        config: what to train. What it leaves open (vocabulary, precision) is resolved and written to `config.toml`.
        run_dir: a directory of its own for this run.
        resume: continue the run in `run_dir` from its newest checkpoint, or from the start if it has none yet.
        progress: where to show how it goes; default: nowhere.

    Raises:
        UserError: the directory holds a run already (or none to resume, or one of another configuration), the data
            cannot be used, or the loss became NaN or infinite.
    """
    progress = progress or Progress.silent()
    run = RunDirectory(Path(run_dir))
    if run.exists and not resume:
        raise UserError(
            f"{run.path} already holds a run; --resume continues it, --run-dir chooses another place"
        )
    cost(config.model)  # shapes that cannot be are said before any work is done
    host.choose_device(config.train.device)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    prepared = prepare(config.data, on_progress=progress.preparing, on_problem=progress.problem)
    old = run.config() if run.exists else None
    config = _resolve(config, prepared, old)
    if old is None:
        run.create(config, host.describe())
    elif changed := differences(old, config):
        raise UserError(
            f"{run.path} was begun with other settings: {'; '.join(changed)}. Start a new run in another --run-dir"
        )
    trainer = _Trainer(config, run, prepared, progress)
    with _signals() as stopped:
        return trainer.loop(stopped)


def _resolve(config: RunConfig, prepared: Prepared, old: RunConfig | None) -> RunConfig:
    """Fills in what depends on the tokenizer and the machine; a continued run keeps what it began with."""
    vocab_size = config.model.vocab_size or prepared.tokenizer.vocab_size
    if vocab_size < prepared.tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size is {vocab_size}, but the tokenizer has {prepared.tokenizer.vocab_size} tokens; "
            "raise it, or leave it out"
        )
    precision = config.train.precision
    if precision == "auto":
        device = host.choose_device(config.train.device)
        precision = old.train.precision if old else host.choose_precision(precision, device)  # type: ignore[assignment]
    return replace(
        config,
        model=replace(config.model, vocab_size=vocab_size),
        train=replace(config.train, precision=precision),
    )


class _Trainer:
    """One process training one model."""

    def __init__(self, config: RunConfig, run: RunDirectory, prepared: Prepared, progress: Progress) -> None:
        self.config, self.run, self.prepared, self.progress = config, run, prepared, progress
        c = config.train
        self.device = host.choose_device(c.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=c.precision == "bf16")
        torch.manual_seed(c.seed)
        self.model = LanguageModel(config.model).to(self.device)
        if c.activation_checkpointing:
            _recompute_blocks(self.model)
        self.objective: nn.Module = Objective(self.model)
        if c.compile:
            self.objective = torch.compile(self.objective, dynamic=True)  # type: ignore[assignment]
        self.optimizer = adamw(self.model, c)
        sizes = {"seq_len": c.seq_len, "batch_size": c.batch_size, "seed": c.seed}
        self.batches = Batches(prepared.train, **sizes)
        self.held_out = Batches(prepared.validation, **sizes)
        self.step = 0
        self.best: tuple[float, int] | None = None  # bits per byte, step
        self.quality: Quality | None = None
        self._restore()

    def loop(self, stopped: list[signal.Signals]) -> Outcome:
        """Trains until the last step, or until a signal has arrived."""
        c = self.config.train
        saved, busy, logged = self.step, 0.0, self.step  # seconds of learning since the last logged step
        metrics = Metrics(self.run, self.step, c.tensorboard)
        with closing(metrics), self.progress.training(self.config, self.model, self.step):
            while self.step < c.steps and not stopped:
                begin = time.perf_counter()
                loss, norm = self._learn()
                busy += time.perf_counter() - begin
                self.step += 1
                last, improved = self.step == c.steps, False
                if last or self.step % c.log_every == 0:
                    rate = (self.step - logged) * c.tokens_per_step / busy
                    lr = learning_rate(self.step - 1, c)
                    metrics.write(self.step, loss=loss, gradient_norm=norm, lr=lr, tokens_per_s=rate)
                    self.progress.step(self.step, loss, rate)
                    busy, logged = 0.0, self.step
                if last or (c.eval_every and self.step % c.eval_every == 0):
                    improved = self._validate(metrics)
                if last or improved or self.step % c.checkpoint_every == 0:
                    self._save()
                    saved = self.step
            if saved != self.step:
                self._save()
        if stopped:
            self.progress.say(
                f"{stopped[0].name}: saved at step {self.step} of {c.steps}; --resume continues"
            )
        return Outcome(self.run.path, self.step, self.step == c.steps, self.quality, self.prepared)

    def _learn(self) -> tuple[float, float]:
        """One step of the optimiser; returns the loss in nats per token and the norm of the gradient before clipping."""
        c = self.config.train
        self.objective.train()
        batches = [self.batches.batch(self.step * c.accumulate + i) for i in range(c.accumulate)]
        targets = count(batches)
        total = 0.0
        for batch in batches:
            with self.autocast:
                nats = self.objective(*(x.to(self.device, non_blocking=True) for x in batch[:3]))
            self._require_finite(nats, "loss", batch)
            (nats / targets).backward()
            total += float(nats.detach())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), c.clip or math.inf)
        self._require_finite(norm, "gradient", *batches)
        lr = learning_rate(self.step, c)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total / targets, float(norm)

    def _require_finite(self, value: Tensor, what: str, *batches: Batch) -> None:
        number = float(value.detach())
        if math.isfinite(number):
            return
        documents = sorted({d for batch in batches for d in batch.documents if d >= 0})
        raise UserError(
            f"the {what} became {number} at step {self.step + 1}, in documents {documents}. The weights of that step "
            "were not touched; the last checkpoint is whole. Try a lower train.learning_rate, more train.warmup_steps, a "
            f"smaller train.clip (now {self.config.train.clip}), train.precision = 'fp32', or look at those documents"
        )

    def _validate(self, metrics: Metrics) -> bool:
        """Measures the validation split; True if it never was better."""
        shards = self.prepared.validation
        self.quality = evaluate(
            self.objective,
            self.held_out,
            bytes_per_token=shards.num_bytes / shards.num_tokens,
            device=self.device,
            autocast=self.autocast,
            max_tokens=self.config.train.eval_tokens,
        )
        bits = self.quality.bits_per_byte
        metrics.write(self.step, validation_loss=self.quality.loss, validation_bits_per_byte=bits)
        self.progress.validated(self.step, bits)
        improved = self.best is None or bits < self.best[0]
        if improved:
            self.best = (bits, self.step)
        return improved

    def _save(self) -> None:
        files: Files = {
            **model_files(self.model),
            "tokenizer.json": self.prepared.tokenizer.save,
            "optimizer.safetensors": lambda path: save_tensors(
                optimizer_tensors(self.model, self.optimizer), path
            ),
            "random.safetensors": lambda path: save_tensors(_random_state(self.device), path),
            "trainer.json": lambda path: _write_json(
                path, {"step": self.step, "best": self.best, "data": self._data()}
            ),
        }
        self.run.save(self.step, self.best[1] if self.best else None, files, keep=self.config.train.keep)

    def _restore(self) -> None:
        path = self.run.latest()
        if path is None:
            return
        where = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
        if where["data"] != self._data():
            raise UserError(
                f"the corpus has changed since {path} was written, so the run cannot go on as it began; "
                "restore the files, or start a new run"
            )
        load_weights(self.model, path)
        restore_optimizer(self.model, self.optimizer, load_tensors(path / "optimizer.safetensors"))
        _restore_random_state(load_tensors(path / "random.safetensors"), self.device)
        self.step = where["step"]
        self.best = tuple(where["best"]) if where["best"] else None
        self.run.point(self.step, self.best[1] if self.best else None)

    def _data(self) -> dict[str, str]:
        """What identifies the tokens: a run goes on only with those it began with."""
        return {"train": self.prepared.train.fingerprint, "validation": self.prepared.validation.fingerprint}


def _recompute_blocks(model: LanguageModel) -> None:
    """Keeps only the inputs of blocks for the backward pass; from outside, names of weights stay as they are."""
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGTERM and Ctrl-C, to end after the step in hand; a second one ends at once."""
    received: list[signal.Signals] = []

    def note(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
