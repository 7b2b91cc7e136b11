"""The training loop: from a configuration to a run directory, exactly resumable.

What a step computes is a function of the configuration and of what the last checkpoint holds: weights, the optimisers'
memory, the random state, and the step itself, which is all the data loader needs. A run that was killed and continued
therefore ends with the weights of one that never was.
"""

from __future__ import annotations

import functools
import hashlib
import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from retnet.data import Batches, Mixture, Prepared
from retnet.settings import UserError
from retnet.train import elastic
from retnet.train.blocks import change_blocks, recompute_blocks
from retnet.train.checkpoints import Checkpoints, Standing
from retnet.train.config import RunConfig
from retnet.train.distillation import objective
from retnet.train.distributed import Ranks, processes
from retnet.train.gradients import scale
from retnet.train.hangs import HangDetector
from retnet.train.metrics import Metrics
from retnet.train.mixture import epochs, in_words
from retnet.train.notices import Notices
from retnet.train.objective import Quality, evaluate
from retnet.train.optimizer import learning_rate
from retnet.train.pace import Pace
from retnet.train.passes import Passes
from retnet.train.progress import TrainingProgress
from retnet.train.run_dir import RunDirectory
from retnet.train.signals import signals
from retnet.train.start import Begin, change_of_mesh, check, owned, prepare_data, resolve, shares, start_from
from retnet.train.step_filter import StepFilter
from retnet.train.step_meter import StepMeter
from retnet.train.trackers import trackers


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
    profile: bool = False,
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
        profile: trace a few steps into `profile/` of the run; of several processes, those of the first.
        progress: where to show how it goes, of several processes the first; default: nowhere.

    Raises:
        UserError: the directory holds a run already (or none to resume, or one of another configuration, or another
            process trains in it), the data cannot be used, the processes cannot share a step, a weight is not a finite
            number, or too many steps in a row had to be skipped.
    """
    run, began = RunDirectory(Path(run_dir)), time.monotonic()
    with processes() as ranks, ExitStack() as stack:
        progress = progress if progress and ranks.first else TrainingProgress.silent()
        begun = f"begun-{hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:16]}"
        if any(ranks.gather(elastic.noted(begun))):  # torchrun has started these processes again
            begin, checkpoint = "resume-or-start", None
        device = ranks.together(lambda: check(config, run, begin, checkpoint, ranks))
        if advice := elastic.advice():
            progress.say(advice)
        trainer: _Trainer | None = None
        stack.enter_context(owned(run, ranks, lambda: trainer is not None and trainer.step > 0))
        if checkpoint is not None:
            ranks.lead(lambda: run.choose(checkpoint))
        # whatever is there from now on is this run, and its newest checkpoint the one to take
        elastic.note(begun)
        ranks = ranks.arranged(config.parallel.of(ranks.world), device)
        config = start_from(config, run, progress, ranks)
        if not ranks.alone:
            progress.say(shares(config, ranks))
        prepared = prepare_data(config, progress, ranks, verify)
        config, changed = resolve(config, run, prepared, device, ranks)
        trainer = _Trainer(config, run, prepared, progress, device, ranks, began)
        if ranks.first and (other := change_of_mesh(run.path, ranks.axes)):
            progress.say(other)
        ranks.lead(lambda: run.note_launch(trainer.step, ranks.world, ranks.axes, elastic.restarts()))
        if changed := ranks.tell(changed):
            ranks.lead(lambda: run.change(config, trainer.step, changed))
            progress.say(f"{'; '.join(changed)}: learning rate and mixture go on as these have them")
        with signals() as stopped:
            return trainer.loop(stopped, profile)


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
        self.learned, standing = self.checkpoints.begin()
        self.model, self.best = self.learned.model, standing.best
        self.step = self.saved = standing.step
        self.filter = StepFilter(c, standing.norms, standing.skipped, standing.skipped_in_a_row)
        self.meter = StepMeter(config, device, ranks.world)
        self.objective: nn.Module = objective(config, run, self.model, prepared.tokenizer, device, ranks)
        if c.compile and ranks.alone:
            self.objective = torch.compile(self.objective, dynamic=True)  # type: ignore[assignment]  # a module, which torch calls a function
        elif c.compile:  # between the hooks that bring a block its weights
            ranks.leave_uncompiled()
            change_blocks(self.model, functools.partial(torch.compile, dynamic=True))
        if c.activation_checkpointing:
            recompute_blocks(self.model)
        self.autocast = torch.autocast(
            device.type,
            torch.bfloat16,
            enabled=c.precision == "bf16",
            cache_enabled=ranks.alone,  # it would keep whole weights, which are shared to save memory
        )
        read = functools.partial(Batches, seq_len=c.seq_len, batch_size=c.batch_size, seed=c.seed)
        mixture = Mixture.of(config.data, lambda step: c.passes_before(step) * c.batch_size)
        self.batches = read(prepared.train, mixture=mixture)
        self.held_out = read(prepared.validation)
        self.metrics: Metrics | None = None  # the first rank has them
        self.quality: Quality | None = None
        held_out = prepared.validation.num_tokens
        self.pace = Pace(began, held_out if c.eval_tokens is None else min(c.eval_tokens, held_out))
        self.open = c.minutes is not None and not ranks.tell(run.has_plan)  # steps are not decided yet
        self.notices = Notices(ranks, device)
        self.hangs = HangDetector(ranks, c.patience)
        self.passes = Passes(
            self.model,
            self.objective,
            self.batches,
            device,
            self.autocast,
            self.notices,
            ranks,
            self.hangs.at,
        )

    def loop(self, stopped: Sequence[signal.Signals], profile: bool) -> Outcome:
        """Trains until the last step, or until a signal has arrived at any of the processes."""
        self.notices.stopped = stopped
        metrics = self.metrics = self.ranks.lead(
            lambda: Metrics(self.run, self.step, trackers(self.run, self.config, self.step))
        )
        if not self.open:
            self._say_epochs()
        with (
            metrics or nullcontext(),
            self.hangs.on(),
            closing(self.checkpoints),
            self.progress.training(self.config, self.device, self.step),
            self._profiled(profile) as after_step,
        ):
            while not self.notices.signals and self.step < self.config.train.steps:
                loss, norm = self._learn()
                after_step()
                self._note_written()
                c = self.config.train
                last, improved = self.step == c.steps, False
                if last or self.filter.ended or self.step % c.log_every == 0:
                    lr, measured = learning_rate(self.step - 1, c), self.meter.line()
                    counted = {"skipped_steps": self.filter.skipped}
                    self._note(
                        loss=loss, gradient_norm=norm, lr=lr, **measured, **counted, **self._epochs(self.step)
                    )
                    left = self.pace.left(self.step, c)
                    self.progress.step(self.step, loss, measured["tokens_per_s"], left)
                if last or (c.eval_every and self.step % c.eval_every == 0):
                    improved = self._validate()
                if last or improved or self.filter.ended or self.step % c.checkpoint_every == 0:
                    self._save()
                if self.filter.ended:
                    self._wait()
                    raise UserError(self.filter.ending(self.step, c))
                if self.open and not last and self.ranks.tell(self.pace.ready(c)):
                    self._save()
                    self._wait()
                    self._plan()
            self._save()
            self._wait()
            steps = self.config.train.steps
            finished = self.step == steps
            if metrics:
                metrics.finished = finished
        if received := self.notices.signals:
            self.progress.say(f"{received[0]}: saved at step {self.step} of {steps}; {self.progress.way_on}")
        return Outcome(self.run.path, self.step, finished, self.quality, self.prepared)

    def _profiled(self, wanted: bool) -> AbstractContextManager[Callable[[], None]]:
        """What traces steps: yields what is called after each."""
        if not wanted or not self.ranks.first:
            return nullcontext(lambda: None)
        from retnet.train.profiling import profiled

        return profiled(self.run.path / "profile", self.step, self.device, self.progress.say)

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
        self._say_epochs()

    def _epochs(self, step: int) -> dict[str, float]:
        return epochs(self.config, self.prepared, self.batches, step)

    def _say_epochs(self) -> None:
        if read := self._epochs(self.config.train.steps):
            self.progress.say(in_words(read, self.config))

    def _learn(self) -> tuple[float, float]:
        """One step; returns the loss in nats per token and the norm of the gradient before clipping.

        The optimisers make it, unless its loss or gradient is not finite or a spike: then nothing but the step changes.
        """
        begin, c = time.perf_counter(), self.config.train
        with torch.profiler.record_function("forward and backward"):
            found = self.passes.gradients(self.step, c)
        if not self.checkpoints.copied:
            self.hangs.at(self.step + 1, "waits for the copy of a checkpoint")
            self.checkpoints.wait_for_copy()
        if problem := self.filter.problem(found.loss, found.norm):
            said = self.filter.said(problem, self.step + 1, self.model, found.batches, self.ranks, self.run)
            self.progress.say(f"skipped: {said}")
        else:
            clip = min(1.0, c.clip / (found.norm + 1e-6)) if c.clip else 1.0
            scale(list(self.model.parameters()), found.mean * clip, self.ranks)
            lr = learning_rate(self.step, c)
            for optimizer in self.learned.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
            if self.learned.average:
                self.learned.average.update(self.step + 1)
        self.model.zero_grad(set_to_none=True)
        seconds, passes = time.perf_counter() - begin, c.passes(self.step)
        self.meter.step(passes * c.batch_size * c.seq_len, seconds, found.waited)
        self.pace.step(seconds, passes)
        self.step += 1
        return found.loss, found.norm

    def _validate(self) -> bool:
        """Measures the validation split; True if it never was better. Where weights are averaged, the average counts."""
        begin, average = time.perf_counter(), self.learned.average
        with average.in_place() if average else nullcontext():
            self.quality = self._evaluate()
        bits = self.quality.bits_per_byte
        found = {"validation_loss": self.quality.loss, "validation_bits_per_byte": bits}
        if average:
            found["validation_bits_per_byte_not_averaged"] = self._evaluate().bits_per_byte
        self.pace.validation(time.perf_counter() - begin)
        self._note(**found)
        self.progress.validated(self.step, bits)
        # of an older version, the best itself may be no number
        improved = math.isfinite(bits) and (self.best is None or not bits >= self.best[0])
        if improved:
            self.best = (bits, self.step)
        return improved

    def _evaluate(self) -> Quality:
        shards = self.prepared.validation
        return evaluate(
            self.objective,
            self.held_out,
            bytes_per_token=shards.num_bytes / shards.num_tokens,
            device=self.device,
            autocast=self.autocast,
            max_tokens=self.config.train.eval_tokens,
            ranks=self.ranks,
            on_batch=lambda: self.hangs.at(self.step, "validates"),
        )

    def _note(self, **values: float) -> None:
        """Writes a line of metrics, on the first rank, which has the file; if it fails, the others hear in the next step."""
        if self.metrics:
            with self.notices.later():
                self.metrics.write(self.step, **values)

    def _note_written(self) -> None:
        """Notes a checkpoint that is complete now; if it failed, all hear in the next step."""
        with self.notices.later():
            if found := self.checkpoints.written():
                stall, seconds = found.stall, found.seconds
                self.pace.written(seconds - stall)
                self._note(checkpoint_step=found.step, checkpoint_stall_s=stall, checkpoint_write_s=seconds)

    def _wait(self) -> None:
        """Until what was saved is complete."""
        self.hangs.at(self.step, "saves")
        self.notices.tell()
        with self.hangs.paused():
            self.checkpoints.wait()
        self._note_written()

    def _save(self) -> None:
        """Begins a checkpoint, after the one before; nothing where this step has one."""
        if self.saved == self.step:
            return
        begin = time.perf_counter()
        self._wait()
        # whoever goes on after a run ended of them has been told
        in_a_row = 0 if self.filter.ended else self.filter.in_a_row
        standing = Standing(self.step, self.best, self.filter.skipped, in_a_row, self.filter.norms)
        self.checkpoints.save(self.learned, standing)
        self.saved = self.step
        self.pace.save(time.perf_counter() - begin)
