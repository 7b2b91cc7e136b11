"""Start of a run, before its first step: settings checked, data prepared, configuration completed, folder begun."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from retnet import host
from retnet.data import DataConfig, Prepared, RunData, Tokenizer, load, prepare
from retnet.lock import sole_owner
from retnet.mixers import MIXERS
from retnet.model.cost import cost
from retnet.settings import UserError, build, dump
from retnet.train.config import ParallelConfig, RunConfig, TrainConfig
from retnet.train.distributed import Ranks
from retnet.train.initial_weights import adopt
from retnet.train.optimizer import bytes_per_parameter
from retnet.train.progress import TrainingProgress
from retnet.train.run_dir import LENGTH, PHASES, RunDirectory, changes
from retnet.train.run_summary import last_mesh, mesh_words
from retnet.train.tensor_parallel import check_heads

GIB = 2**30
BYTES_PER_TOKEN = 24  # of a batch: int64 as it is read, as input, and as target
Begin = Literal["new", "resume", "resume-or-start"]  # what a call of `train` is to find in the run directory


def check(
    config: RunConfig, run: RunDirectory, begin: Begin, checkpoint: str | None, ranks: Ranks
) -> torch.device:
    """Says what cannot be before any work is done; sets the threads, and returns the device."""
    if ranks.first:
        _check_run(run, begin, checkpoint)
    parameters = cost(config.model).total  # refuses shapes that do not fit
    c = config.train
    axes = config.parallel.of(ranks.world)
    check_shares(c, axes)
    if c.threads:
        torch.set_num_threads(c.threads)
    device = ranks.device(c.device)
    _check_memory(config, parameters, device, axes)
    return device


def check_shares(c: TrainConfig, axes: ParallelConfig) -> None:
    """Says where processes cannot share the passes of a step.

    Raises:
        UserError: on all ranks alike.
    """
    each = axes.tp * axes.cp
    number = f"{axes.readers} processes" if each == 1 else f"{axes.readers} groups of {each} processes"
    if c.accumulate % axes.readers:
        raise UserError(
            f"train.accumulate is {c.accumulate}, and {number} cannot share so many passes of a step "
            f"evenly; set it to a multiple of {axes.readers}{_same_step(c, axes.readers)}"
        )
    if c.ramp_steps and c.ramp_from % axes.readers:
        raise UserError(
            f"train.ramp_from is {c.ramp_from}, and {number} cannot share so many passes of the first steps "
            f"evenly; set it to a multiple of {axes.readers}"
        )


def _check_memory(config: RunConfig, parameters: int, device: torch.device, axes: ParallelConfig) -> None:
    """Refuses what cannot fit: the system would end the process without a word, and not at once.

    Counted is the least that any model needs: weights, gradients and moments in fp32; of each pass its tokens, and what
    every block reads, in bf16.
    """
    c, m = config.train, config.model
    tokens = c.batch_size * c.seq_len
    weights = bytes_per_parameter(c).total * parameters // (axes.parts * axes.tp)
    passed = 2 * tokens // axes.cp * m.d_model * m.num_layers
    read = BYTES_PER_TOKEN * tokens * max(c.accumulate // axes.readers, 1)
    cpu = torch.device("cpu")
    for place, need in {cpu: read, device: weights + passed + (read if device == cpu else 0)}.items():
        if need > (have := host.memory_of(place)):
            raise UserError(
                f"training needs {need / GIB:,.0f} GiB at the least, and {place} has {have / GIB:,.0f}: a model of "
                f"{parameters:,} parameters takes {weights / GIB:,.1f}, a pass of train.batch_size {c.batch_size} rows of "
                f"train.seq_len {c.seq_len} {passed / GIB:,.1f}, the tokens of train.accumulate {c.accumulate} passes "
                f"{read / GIB:,.1f}; make one of them smaller"
            )


def _check_run(run: RunDirectory, begin: Begin, checkpoint: str | None) -> None:
    if run.exists and begin == "new":
        raise UserError(
            f"{run.path} already holds a run; --resume continues it, --run-dir chooses another place"
        )
    around = run.around
    if not run.exists and around is not None:
        raise UserError(f"{run.path} lies in the run {around}; --run-dir {around} names that")
    if not run.exists and run.steps_done():  # a new run would go on from them
        raise UserError(
            f"{run.path} has checkpoints and no config.toml, so nobody knows what run they are of; restore that, or choose "
            f"another --run-dir, where --init {run.path} begins a run with these weights"
        )
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
def owned(run: RunDirectory, ranks: Ranks, begun: Callable[[], bool]) -> Iterator[None]:
    """The run directory for these processes alone; the first rank holds it for all, and clears it if nothing was begun."""
    with ExitStack() as stack:
        ranks.lead(lambda: stack.enter_context(sole_owner(run.path)))
        ranks.lead(lambda: stack.enter_context(run.beginning(begun)))
        yield


def start_from(config: RunConfig, run: RunDirectory, progress: TrainingProgress, ranks: Ranks) -> RunConfig:
    """The configuration with the model and tokenizer of the weights a run starts from, if it does; see `adopt`."""
    adopted = ranks.lead(lambda: adopt(config, run))
    if adopted and not run.exists and _other_tokenizer(config.data, adopted.data):
        progress.say(
            f"--init {config.train.start_from}: the tokenizer that its weights were trained with is used, "
            f"not data.tokenizer {config.data.tokenizer!r}"
        )
    text = ranks.tell(dump(adopted) if adopted else "")
    config = adopted or build(RunConfig, tomllib.loads(text))
    check_cut(config)
    return config


def check_cut(config: RunConfig) -> None:
    """Says what cannot be cut along time, where `parallel.cp` asks for it, or by heads, where `parallel.tp` does.

    Raises:
        UserError: on all ranks alike.
    """
    cp, tp, c = config.parallel.cp, config.parallel.tp, config.train
    check_heads(config.model, tp)
    if tp > 1 and c.optimizer == "muon":
        raise UserError(
            f"parallel.tp is {tp}, and train.optimizer 'muon' makes updates of whole matrices orthogonal, of which each "
            "process then has a part; set it to 1, and parallel.shard cuts them, or take train.optimizer 'adamw'"
        )
    if cp == 1:
        return
    able = [name for name, kind in MIXERS.items() if kind.cuttable]
    whole = next((f"the mixer {m.name!r}" for m in config.model.mixers_by_layer if m.name not in able), None)
    if not config.model.has_states:
        whole = "score_norm = 'torchscale'"
    if whole:
        raise UserError(
            f"parallel.cp is {cp}, but {whole} needs whole sequences, not a stretch of them on each process; set it to 1 "
            f"(mixers that can be cut: {', '.join(able)})"
        )
    if c.batch_size * c.seq_len < cp:
        raise UserError(
            f"parallel.cp is {cp}, more than the {c.batch_size * c.seq_len} tokens of a pass; lower it"
        )


def shares(config: RunConfig, ranks: Ranks) -> str:
    """How several processes share the passes of a step, for people to read."""
    passes, axes = config.train.accumulate, ranks.axes
    each = f"{passes // axes.readers} of the {passes} passes of a step"
    if axes.cp * axes.tp == 1:
        return f"{ranks.world} processes, each with {each}"
    parts = ["a stretch of its sequences"] if axes.cp > 1 else []
    parts += ["a part of the heads, widths and vocabulary"] if axes.tp > 1 else []
    return (
        f"{ranks.world} processes, every {axes.cp * axes.tp} with {each}, and each with {' and '.join(parts)}"
    )


def change_of_mesh(run: Path, axes: ParallelConfig) -> str:
    """Says that a run goes on on other processes than those of the call before, if it does."""
    before, now = last_mesh(run), vars(axes)
    if before is None or before == now:
        return ""
    was, is_now = (mesh_words(mesh) or "one process" for mesh in (before, now))
    return f"{was} trained it before, now {is_now}: what is learned stays the same, up to rounding"


def _other_tokenizer(asked: DataConfig, adopted: DataConfig) -> bool:
    """Whether the tokenizer that comes with weights is another one than a configuration leaves at its default."""
    if asked.tokenizer == adopted.tokenizer:  # also one that is still to be learned, "bpe:8192"
        return False
    one, other = (Tokenizer.load(data.tokenizer).fingerprint for data in (asked, adopted))
    return one != other


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
            environment = {**host.describe(), "processes": ranks.world, "mesh": vars(ranks.axes)}
            run.create(new, environment, RunData.of(prepared))
            return new
        changed.extend(changes(old, new))
        done = run.steps_done()
        begun = [[phase for phase in one.data.phases or () if phase.step < done] for one in (old, new)]
        free = {LENGTH, PHASES} if begun[0] == begun[1] else {LENGTH}
        fixed = [change for change in changed if re.split(r"[:[]", change)[0] not in free]
        if fixed:
            raise UserError(
                f"{run.path} was begun with other settings: {'; '.join(fixed)}. Start a new run in another --run-dir; "
                f"--init {run.path} begins it with these weights"
            )
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
        precision = old.train.precision if old else host.choose_precision(precision, device)
    return replace(
        config,
        model=replace(config.model, vocab_size=vocab_size),
        train=replace(config.train, precision=precision),
    )
