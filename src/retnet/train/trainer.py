"""The training loop: from a configuration to a run directory, exactly resumable.

What a step computes is a function of the configuration and of what the last checkpoint holds: weights, the optimiser's
memory, the random state, and the step itself, which is all the data loader needs. A run that was killed and continued
therefore ends with the weights of one that never was.
"""

from __future__ import annotations

import functools
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from retnet.data import Batch, Batches, Prepared
from retnet.model import LanguageModel
from retnet.model.checkpoint import weights
from retnet.settings import UserError
from retnet.train.checkpoints import Checkpoints, Standing, spoiled
from retnet.train.config import RunConfig
from retnet.train.distributed import Ranks, complete, processes
from retnet.train.objective import Objective, Quality, count, evaluate
from retnet.train.optimizer import learning_rate
from retnet.train.pace import Pace
from retnet.train.progress import TrainingProgress
from retnet.train.run_dir import Metrics, RunDirectory
from retnet.train.start import Begin, check, owned, prepare_data, resolve, start_from

Forward = Callable[..., Any]


class Outcome(NamedTuple):
    """How a call of `train` ended."""

    run_dir: Path
    step: int  # steps done, in all calls together
    finished: bool  # False: stopped by a signal, saved, ready to be continued
    quality: Quality | None  # on the validation split, when last measured
    prepared: Prepared


def train(
    config: RunConfig,
    run_dir: str | Path,
    *,
    begin: Begin = "new",
    checkpoint: str | None = None,
    verify: bool = False,
    progress: TrainingProgress | None = None,
) -> Outcome:
    """Trains a model into a run directory, in this process or in all those that torchrun started.

    Args:
        config: what to train. What it leaves open (vocabulary, precision) is resolved and written to `config.toml`.
        run_dir: a directory of its own for this run; of several processes, the first alone reads and writes it.
        begin: ``"new"``: a run that is not there yet; ``"resume"``: go on with the run in `run_dir` from its newest
            checkpoint, or from the start if it has none yet; ``"resume-or-start"``: whichever fits.
        checkpoint: a checkpoint of the run to go on from instead; later ones are set aside.
        verify: read all text and all shards again, and trust no times and sizes; see `retnet.data.prepare`.
        progress: where to show how it goes, of several processes the first; default: nowhere.

    Raises:
        UserError: the directory holds a run already (or none to resume, or one of another configuration, or another
            process trains in it), the data cannot be used, the processes cannot share a step, or a loss, gradient or
            weight is not a finite number.
    """
    run, began = RunDirectory(Path(run_dir)), time.monotonic()
    with processes() as ranks, ExitStack() as stack:
        progress = progress if progress and ranks.first else TrainingProgress.silent()
        device = ranks.together(lambda: check(config, run, begin, checkpoint, ranks))
        stack.enter_context(owned(run, ranks))
        if checkpoint is not None:
            ranks.lead(lambda: run.choose(checkpoint))
        config = start_from(config, run, ranks)
        if not ranks.alone:
            share = config.train.accumulate // ranks.world
            progress.say(
                f"{ranks.world} processes, each with {share} of the {config.train.accumulate} passes of a step"
            )
        prepared = prepare_data(config, progress, ranks, verify)
        config, changed = resolve(config, run, prepared, device, ranks)
        trainer = _Trainer(config, run, prepared, progress, device, ranks, began)
        if changed := ranks.tell(changed):
            ranks.lead(lambda: run.change(config, trainer.step, changed))
            progress.say(f"{'; '.join(changed)}: the learning rate goes on as the new schedule has it")
        with _signals() as stopped:
            return trainer.loop(stopped)


class _Trainer:
    """This process's part in training one model. All processes take the same turns, with the same numbers."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        prepared: Prepared,
        progress: TrainingProgress,
        device: torch.device,
        ranks: Ranks,
        began: float,
    ) -> None:
        self.config, self.run, self.prepared, self.progress = config, run, prepared, progress
        self.device, self.ranks = device, ranks
        c = config.train
        self.checkpoints = Checkpoints(config, run, prepared, device, ranks)
        self.model, self.optimizer, (self.step, self.best) = self.checkpoints.begin()
        self.objective: nn.Module = Objective(self.model)
        if c.compile and ranks.alone:
            self.objective = torch.compile(self.objective, dynamic=True)  # type: ignore[assignment]
        elif c.compile:  # between the hooks that bring a block its weights
            change_blocks(self.model, functools.partial(torch.compile, dynamic=True))
        if c.activation_checkpointing:
            recompute_blocks(self.model)
        self.autocast = torch.autocast(
            device.type,
            torch.bfloat16,
            enabled=c.precision == "bf16",
            cache_enabled=ranks.alone,  # it would keep whole weights, which are shared to save memory
        )
        sizes = {"seq_len": c.seq_len, "batch_size": c.batch_size, "seed": c.seed}
        self.batches = Batches(prepared.train, **sizes)
        self.held_out = Batches(prepared.validation, **sizes)
        self.quality: Quality | None = None
        held_out = prepared.validation.num_tokens
        self.pace = Pace(began, held_out if c.eval_tokens is None else min(c.eval_tokens, held_out))
        self.open = c.minutes is not None and not ranks.tell(run.has_plan)  # steps are not decided yet

    def loop(self, stopped: Sequence[signal.Signals]) -> Outcome:
        """Trains until the last step, or until a signal has arrived at any of the processes."""
        saved, busy, logged = self.step, 0.0, self.step  # seconds of learning since the last logged step
        metrics = self.ranks.lead(lambda: Metrics(self.run, self.step, self.config.train.tensorboard))
        with (
            closing(metrics) if metrics else nullcontext(),
            self.progress.training(self.config, self.model, self.step),
        ):
            while not (signals := self._noted(stopped)) and self.step < self.config.train.steps:
                begin = time.perf_counter()
                loss, norm = self._learn()
                seconds = time.perf_counter() - begin
                self.step, busy = self.step + 1, busy + seconds
                self.pace.step(seconds)
                c = self.config.train
                last, improved = self.step == c.steps, False
                if last or self.step % c.log_every == 0:
                    rate = (self.step - logged) * c.tokens_per_step / busy
                    lr = learning_rate(self.step - 1, c)
                    self._note(metrics, loss=loss, gradient_norm=norm, lr=lr, tokens_per_s=rate)
                    self.progress.step(self.step, loss, rate, self.pace.left(self.step, c))
                    busy, logged = 0.0, self.step
                if last or (c.eval_every and self.step % c.eval_every == 0):
                    improved = self._validate(metrics)
                if last or improved or self.step % c.checkpoint_every == 0:
                    self._save()
                    saved = self.step
                if self.open and not last and self.ranks.tell(self.pace.ready(c)):
                    if saved != self.step:
                        self._save()
                        saved = self.step
                    self._plan()
            if saved != self.step:
                self._save()
        steps = self.config.train.steps
        if signals:
            self.progress.say(f"{signals[0]}: saved at step {self.step} of {steps}; --resume continues")
        return Outcome(self.run.path, self.step, self.step == steps, self.quality, self.prepared)

    def _plan(self) -> None:
        """Fits the run into its minutes; the first rank decides.

        A checkpoint of this step is there: what was made before the decision, no run makes again with the schedule that
        comes of it.
        """
        asked = self.config.train

        def decide() -> tuple[int, int]:
            chosen = self.pace.plan(self.step, asked)
            self.run.plan(asked, chosen, self.step)
            return chosen.steps, chosen.warmup_steps

        steps, warmup_steps = self.ranks.tell(self.ranks.lead(decide) or (0, 0))
        chosen = replace(asked, steps=steps, warmup_steps=warmup_steps)
        self.config, self.open = replace(self.config, train=chosen), False
        self.progress.planned(chosen)

    def _noted(self, stopped: Sequence[signal.Signals]) -> list[str]:
        """Names of signals that arrived, at any of the processes: all of them stop after the same step."""
        return [name for name in self.ranks.gather(stopped[0].name if stopped else None) if name]

    def _learn(self) -> tuple[float, float]:
        """One step of the optimiser; returns the loss in nats per token and the norm of the gradient before clipping.

        Of the passes of a step, this process makes those whose number is its rank modulo the number of processes.
        """
        c = self.config.train
        self.objective.train()
        first = self.step * c.accumulate
        places = range(first + self.ranks.rank, first + c.accumulate, self.ranks.world)
        batches = [self.batches.batch(place) for place in places]
        targets = sum(self.ranks.gather(count(batches)))
        losses = []
        for place, batch in zip(places, batches, strict=True):
            if not self.ranks.alone:  # dropout then is the same for any number of processes but one
                torch.manual_seed(random.Random(f"{c.seed} {place}").getrandbits(63))
            with self.autocast:
                nats = self.objective(*(x.to(self.device, non_blocking=True) for x in batch[:3]))
            (nats / targets).backward()
            losses.append(float(nats.detach()))
        total = sum(self.ranks.gather(sum(losses)))
        broken = [batch for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]
        self._require_finite(total, "loss", broken)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), c.clip or math.inf)
        length = float(complete(norm, self.ranks))
        self._require_finite(length, "gradient", batches)
        lr = learning_rate(self.step, c)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total / targets, length

    def _require_finite(self, number: float, what: str, batches: Sequence[Batch]) -> None:
        """Ends the run where a number, the same on all ranks, is not finite; names the documents of all."""
        if math.isfinite(number):
            return
        if (bad := spoiled(weights(self.model), self.ranks)) is not None:  # not the documents' doing
            raise UserError(
                f"the {what} became {number} at step {self.step + 1}, since {bad} is not finite after step {self.step}; "
                "the last checkpoint is whole. Try a lower train.learning_rate or more train.warmup_steps"
            )
        mine = [d for batch in batches for d in batch.documents if d >= 0]
        documents = sorted({d for documents in self.ranks.gather(mine) for d in documents})
        raise UserError(
            f"the {what} became {number} at step {self.step + 1}, in documents {documents}. The weights of that step "
            "were not touched; the last checkpoint is whole. Try a lower train.learning_rate, more train.warmup_steps, a "
            f"smaller train.clip (now {self.config.train.clip}), train.precision = 'fp32', or look at those documents"
        )

    def _validate(self, metrics: Metrics | None) -> bool:
        """Measures the validation split; True if it never was better."""
        begin, shards = time.perf_counter(), self.prepared.validation
        self.quality = evaluate(
            self.objective,
            self.held_out,
            bytes_per_token=shards.num_bytes / shards.num_tokens,
            device=self.device,
            autocast=self.autocast,
            max_tokens=self.config.train.eval_tokens,
            ranks=self.ranks,
        )
        self.pace.validation(time.perf_counter() - begin)
        bits = self.quality.bits_per_byte
        self._note(metrics, validation_loss=self.quality.loss, validation_bits_per_byte=bits)
        self.progress.validated(self.step, bits)
        improved = self.best is None or bits < self.best[0]
        if improved:
            self.best = (bits, self.step)
        return improved

    def _note(self, metrics: Metrics | None, **values: float) -> None:
        """Writes a line of metrics; the first rank has the file, and all hear of it when it cannot be written."""
        self.ranks.lead(lambda: metrics.write(self.step, **values) if metrics else None)

    def _save(self) -> None:
        begin = time.perf_counter()
        self.checkpoints.save(self.model, self.optimizer, Standing(self.step, self.best))
        self.pace.save(time.perf_counter() - begin)


def recompute_blocks(model: LanguageModel) -> None:
    """Keeps only the inputs of blocks for the backward pass."""
    change_blocks(model, lambda forward: functools.partial(checkpoint, forward, use_reentrant=False))


def change_blocks(model: LanguageModel, change: Callable[[Forward], Forward]) -> None:
    """Wraps the forward pass of every block, from outside: names of weights and hooks of modules stay as they are."""
    for block in model.blocks:
        block.forward = change(block.forward)


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGTERM and Ctrl-C, to end after the step in hand; a second one ends at once.

    In another thread than the main one there are none, and who started the thread has to see to them.
    """
    received: list[signal.Signals] = []

    def note(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
