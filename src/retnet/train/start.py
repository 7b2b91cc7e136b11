"""Start of a run, before its first step: settings checked, data prepared, configuration completed, folder begun."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Literal

import torch

from retnet import host
from retnet.data import Prepared, load, prepare
from retnet.lock import sole_owner
from retnet.model.cost import cost
from retnet.settings import UserError, build, dump
from retnet.train.config import RunConfig, TrainConfig
from retnet.train.distributed import Ranks
from retnet.train.initial_weights import adopt
from retnet.train.progress import TrainingProgress
from retnet.train.run_dir import LENGTH, RunDirectory, differences

Begin = Literal["new", "resume", "resume-or-start"]  # what a call of `train` is to find in the run directory


def check(
    config: RunConfig, run: RunDirectory, begin: Begin, checkpoint: str | None, ranks: Ranks
) -> torch.device:
    """Says what cannot be before any work is done; sets the threads, and returns the device."""
    if ranks.first:
        _check_run(run, begin, checkpoint)
    cost(config.model)  # shapes
    c = config.train
    if c.accumulate % ranks.world:
        raise UserError(
            f"train.accumulate is {c.accumulate}, and {ranks.world} processes cannot share so many passes of a step "
            f"evenly; set it to a multiple of {ranks.world}{_same_step(c, ranks.world)}"
        )
    if c.ramp_steps and c.ramp_from % ranks.world:
        raise UserError(
            f"train.ramp_from is {c.ramp_from}, and {ranks.world} processes cannot share so many passes of the first steps "
            f"evenly; set it to a multiple of {ranks.world}"
        )
    if c.threads:
        torch.set_num_threads(c.threads)
    return ranks.device(c.device)


def _check_run(run: RunDirectory, begin: Begin, checkpoint: str | None) -> None:
    if run.exists and begin == "new":
        raise UserError(
            f"{run.path} already holds a run; --resume continues it, --run-dir chooses another place"
        )
    around = run.around
    if not run.exists and around is not None:
        raise UserError(f"{run.path} lies in the run {around}; --run-dir {around} names that")
    if not run.exists and begin == "resume":
        raise UserError(
            f"there is no run in {run.path} to resume; leave out --resume to begin one there "
            "(--resume-or-start does either)"
        )
    if checkpoint is not None and not run.exists:
        raise UserError(f"--checkpoint {checkpoint} is of a run that is resumed, and {run.path} holds none")


def _same_step(c: TrainConfig, world: int) -> str:
    """Settings that make the same step of passes that can be shared, if there are any."""
    passes, rows = math.lcm(c.accumulate, world), c.accumulate * c.batch_size
    if rows % passes:
        return ""
    return f" (--train.accumulate {passes} --train.batch_size {rows // passes} makes the same step)"


@contextmanager
def owned(run: RunDirectory, ranks: Ranks) -> Iterator[None]:
    """The run directory for these processes alone; the first rank holds it for all."""
    with ExitStack() as stack:
        ranks.lead(lambda: stack.enter_context(sole_owner(run.path)))
        yield


def start_from(config: RunConfig, run: RunDirectory, ranks: Ranks) -> RunConfig:
    """The configuration with the model and tokenizer of the weights a run starts from, if it does; see `origin.adopt`."""
    adopted = ranks.lead(lambda: adopt(config, run))
    text = ranks.tell(dump(adopted) if adopted else "")
    return adopted or build(RunConfig, tomllib.loads(text))


def prepare_data(config: RunConfig, progress: TrainingProgress, ranks: Ranks, verify: bool) -> Prepared:
    """Prepares the data, on the first rank; the others wait and open what it made."""
    made = ranks.lead(
        lambda: prepare(
            config.data, on_progress=progress.preparing, on_problem=progress.problem, verify=verify
        )
    )
    directory = ranks.tell(str(made.directory) if made else "")
    return ranks.together(lambda: made or load(directory))


def resolve(
    config: RunConfig,
    run: RunDirectory,
    prepared: Prepared,
    device: torch.device,
    ranks: Ranks,
) -> tuple[RunConfig, list[str]]:
    """Fills in what is open, and begins the run or makes sure that it was begun with the same; on the first rank.

    Returns:
        The configuration, and on the first rank what is to be changed in that of the run, once its checkpoint is read.
    """
    changed: list[str] = []

    def begin() -> RunConfig:
        old = run.planned(run.config()) if run.exists else None
        new = run.planned(_filled_in(config, prepared, device, old))
        if old is None:
            run.create(new, {**host.describe(), "processes": ranks.world})
            return new
        changed.extend(differences(old, new))
        fixed = [change for change in changed if not change.startswith(f"{LENGTH}:")]
        if fixed:
            raise UserError(
                f"{run.path} was begun with other settings: {'; '.join(fixed)}. Start a new run in another --run-dir; "
                f"--init {run.path} begins it with these weights"
            )
        done = run.steps_done()
        if new.train.steps < done:
            raise UserError(
                f"{run.path} has made {done} steps already; train.steps {new.train.steps} is less"
            )
        return new

    resolved = ranks.lead(begin)
    text = ranks.tell(dump(resolved) if resolved else "")
    return resolved or build(RunConfig, tomllib.loads(text)), changed


def _filled_in(
    config: RunConfig, prepared: Prepared, device: torch.device, old: RunConfig | None
) -> RunConfig:
    """With what depends on the tokenizer and the machine; a continued run keeps what it began with."""
    vocab_size = config.model.vocab_size or prepared.tokenizer.vocab_size
    if vocab_size < prepared.tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size is {vocab_size}, but the tokenizer has {prepared.tokenizer.vocab_size} tokens; "
            "raise it, or leave it out"
        )
    precision = config.train.precision
    if precision == "auto":
        precision = old.train.precision if old else host.choose_precision(precision, device)  # type: ignore[assignment]
    return replace(
        config,
        model=replace(config.model, vocab_size=vocab_size),
        train=replace(config.train, precision=precision),
    )
