"""What comes before the first step: mistakes said early, data prepared, the configuration completed, the run begun."""

from __future__ import annotations

import math
import tomllib
from dataclasses import replace

import torch

from retnet import host
from retnet.data import Prepared, load, prepare
from retnet.model.cost import cost
from retnet.settings import UserError, build, dump
from retnet.train.config import RunConfig, TrainConfig
from retnet.train.distributed import Ranks
from retnet.train.progress import Progress
from retnet.train.run_dir import RunDirectory, differences


def check(config: RunConfig, run: RunDirectory, resume: bool, ranks: Ranks) -> torch.device:
    """Says what cannot be before any work is done; sets the threads, and returns the device."""
    if ranks.first and run.exists and not resume:
        raise UserError(
            f"{run.path} already holds a run; --resume continues it, --run-dir chooses another place"
        )
    cost(config.model)  # shapes
    c = config.train
    if c.accumulate % ranks.world:
        raise UserError(
            f"train.accumulate is {c.accumulate}, and {ranks.world} processes cannot share so many passes of a step "
            f"evenly; set it to a multiple of {ranks.world}{_same_step(c, ranks.world)}"
        )
    if c.threads:
        torch.set_num_threads(c.threads)
    return ranks.device(c.device)


def _same_step(c: TrainConfig, world: int) -> str:
    """Settings that make the same step of passes that can be shared, if there are any."""
    passes, rows = math.lcm(c.accumulate, world), c.accumulate * c.batch_size
    if rows % passes:
        return ""
    return f" (--train.accumulate {passes} --train.batch_size {rows // passes} makes the same step)"


def prepare_data(config: RunConfig, progress: Progress, ranks: Ranks) -> Prepared:
    """Prepares the data, on the first rank; the others wait and open what it made."""
    made = ranks.lead(
        lambda: prepare(config.data, on_progress=progress.preparing, on_problem=progress.problem)
    )
    directory = ranks.tell(str(made.directory) if made else "")
    return ranks.together(lambda: made or load(directory))


def resolve(
    config: RunConfig, run: RunDirectory, prepared: Prepared, device: torch.device, ranks: Ranks
) -> RunConfig:
    """Fills in what is open, and begins the run or makes sure that it was begun with the same; on the first rank."""

    def begin() -> RunConfig:
        old = run.config() if run.exists else None
        new = _filled_in(config, prepared, device, old)
        if old is None:
            run.create(new, {**host.describe(), "processes": ranks.world})
        elif changed := differences(old, new):
            raise UserError(
                f"{run.path} was begun with other settings: {'; '.join(changed)}. "
                "Start a new run in another --run-dir"
            )
        return new

    resolved = ranks.lead(begin)
    text = ranks.tell(dump(resolved) if resolved else "")
    return resolved or build(RunConfig, tomllib.loads(text))


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
