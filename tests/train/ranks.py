"""What several processes train, one case after the other, in one launch: torchrun -m tests.train.ranks CONFIG FOLDER

Every case leaves a run in FOLDER/NAME, or FOLDER/NAME.RANK.error with the mistake that this rank was told.
"""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError

from retnet.convert import convert
from retnet.mixers import MIXERS
from retnet.model import sharded
from retnet.settings import UserError, load
from retnet.train.config import ParallelConfig, RunConfig
from retnet.train.objective import Objective
from retnet.train.pace import Pace, fitted
from retnet.train.passes import Passes
from retnet.train.trainer import train
from tests.train.driver import wrap

FULL = os.strerror(errno.ENOSPC)
STOP = 3  # step after which runs are stopped, to be continued by another number of processes


def base(path) -> RunConfig:
    """The tiny run, without dropout and with an odd number of validation batches."""
    run = load(RunConfig, path)
    return changed(run, {"dropout": 0.0}, steps=6, learning_rate=1e-3, eval_every=3, eval_tokens=300)


def changed(run: RunConfig, model: dict, **options) -> RunConfig:
    return replace(run, model=replace(run.model, **model), train=replace(run.train, **options))


def cases(run: RunConfig) -> dict[str, RunConfig]:
    """Name → what is trained in the same way by one process and by several."""
    short = changed(run, {}, steps=2)
    mixers = {
        f"mixer {name}": changed(short, {"mixer": kind.Config(), "tie_embeddings": name == "retention"})
        for name, kind in MIXERS.items()
    }
    return {
        "plain": run,
        "still": changed(run, {}, steps=1, learning_rate=0.0),
        "recomputed": changed(short, {}, activation_checkpointing=True),
        "muon, ramp, average": changed(
            changed(run, {}, steps=3, accumulate=4, ramp_from=2, ramp_steps=1, spike=9.0),
            {},
            optimizer="muon",
            z_loss=1e-2,
            ema=0.5,
        ),
        "average": changed(short, {}, ema=0.5, z_loss=1e-2),
        "three rows": changed(run, {}, batch_size=3, clip=0.1),  # stretches end in mid-row
        "bf16 recomputed": changed(short, {}, activation_checkpointing=True, precision="bf16"),
        **mixers,
    }


def meshes(run: RunConfig) -> dict[str, tuple[str, RunConfig]]:
    """Name → the case it is like, and the same on a mesh of two processes that is not the default one."""
    made = cases(run)
    return {
        "replicated": (
            "muon, ramp, average",
            replace(made["muon, ramp, average"], parallel=ParallelConfig(replicate=2)),
        ),
        "by heads": ("three rows", replace(made["three rows"], parallel=ParallelConfig(tp=2))),
        "average by heads": ("average", replace(made["average"], parallel=ParallelConfig(tp=2))),
        "bf16 by heads": (
            "bf16 recomputed",
            replace(made["bf16 recomputed"], parallel=ParallelConfig(tp=2)),
        ),
        "in stretches": ("three rows", replace(made["three rows"], parallel=ParallelConfig(cp=2))),
        "bf16 in stretches": (
            "bf16 recomputed",
            replace(made["bf16 recomputed"], parallel=ParallelConfig(cp=2)),
        ),
    }


def stop_at(step: int) -> None:
    """SIGTERM for this process in a step, before all agree in it: the targets of its one pass are counted."""
    wrap(f"retnet.train.passes:count:{step}", lambda: os.kill(os.getpid(), signal.SIGTERM))


def break_loss(call: int) -> None:
    """Makes the loss of one pass of this process NaN."""
    plain, calls = Objective.forward, iter(range(1, 10**9))

    def broken(self, *batch):
        loss = plain(self, *batch)
        return loss * float("nan") if next(calls) == call else loss

    Objective.forward = broken


def plan_by_rank() -> None:
    """Every rank measures other times: the first finds that 5 steps fit."""
    rank = dist.get_rank()
    Pace.ready = lambda self, c: self._steps >= 3 - rank
    Pace.plan = lambda self, step, c: fitted(c, 5 + rank, step)


def note_batches(note, put=setattr) -> None:
    """Makes training tell of every batch that it computes its place in the order of the data, and its documents."""
    plain = Passes._read

    def read(self, places):
        found = plain(self, places)
        for place, batch in zip(places, found, strict=True):
            note([place, list(batch.documents)])
        return found

    put(Passes, "_read", read)


@contextmanager
def batches_noted(folder: Path, name: str) -> Iterator[None]:
    """Leaves in a file of this rank what `note_batches` tells."""
    plain, found = Passes._read, []
    note_batches(found.append)
    yield
    Passes._read = plain
    (folder / f"{name}.{dist.get_rank()}.batches").write_text(json.dumps(found))


def failing(target: str, error: Exception) -> None:
    """Makes the n-th call of a function of this process raise an error; see `wrap`."""

    def fail() -> None:
        raise error

    wrap(target, fail)


@contextmanager
def copies_late() -> Iterator[None]:
    """Checkpoints are copied later than the next step wants to change what they are of."""
    plain = sharded.DefaultStager.stage

    def stage(self, tensors):
        time.sleep(0.2)
        return plain(self, tensors)

    sharded.DefaultStager.stage = stage
    yield
    sharded.DefaultStager.stage = plain


def started(run: RunConfig, folder: Path) -> None:
    """Runs that learn nothing and begin with the weights of others, which no process reads as a whole."""
    if dist.get_rank() == 0:
        convert(folder / "plain", folder / "narrow", to="run", dtype="bfloat16")
    dist.barrier()
    whole, sharded.SavedTensors.whole = sharded.SavedTensors.whole, None
    for source in ("plain", "narrow"):
        still = changed(run, {}, steps=1, learning_rate=0.0, start_from=str(folder / source))
        train(still, folder / f"from {source}")
    sharded.SavedTensors.whole = whole


def faulty(run: RunConfig, folder: Path) -> None:
    """Runs that cannot go on, because of what happens to one process."""
    rank, short = dist.get_rank(), changed(run, {}, eval_every=0, checkpoint_every=2)
    train(changed(short, {}, steps=4), folder / "damaged")
    if rank == 0:
        shard = folder / "damaged/checkpoints/step-00000004/shard-00002-model-00003-of-00003.safetensors"
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    dist.barrier()
    mistaken(folder, "damaged", short, begin="resume")
    if rank == 0:
        failing("retnet.train.metrics:Metrics.write:2", UserError("no line can be written"))
    mistaken(folder, "no metrics", short)
    if rank == 1:
        said = f"Error while serializing: I/O error: {FULL} (os error {errno.ENOSPC})"
        # of the second checkpoint, which has a file of weights and one of moments as the first
        failing("retnet.model.safetensors_files:save_file:3", SafetensorError(said))
    mistaken(folder, "full", short)


def mistaken(folder: Path, name: str, config: RunConfig, **options) -> None:
    try:
        train(config, folder / name, **options)
    except UserError as error:
        (folder / f"{name}.{dist.get_rank()}.error").write_text(str(error))


def main() -> None:
    config, folder = sys.argv[1], Path(sys.argv[2])
    run = base(config)
    dist.init_process_group()  # once, for all cases
    for name, case in cases(run).items():
        with copies_late() if name == "plain" else nullcontext():
            train(case, folder / name)
    started(run, folder)
    for name, (_, case) in meshes(run).items():
        train(case, folder / name)
    with batches_noted(folder, "from one"):
        train(run, folder / "from one", begin="resume")
    train(replace(run, parallel=ParallelConfig(tp=2)), folder / "from one by heads", begin="resume")
    faulty(run, folder)
    mistaken(folder, "uneven", changed(run, {}, accumulate=3))
    mistaken(folder, "unfit", replace(run, parallel=ParallelConfig(cp=4)))
    mistaken(folder, "nowhere", replace(run, data=replace(run.data, corpus="nowhere")))
    last = dist.get_rank() == dist.get_world_size() - 1
    if last:
        stop_at(STOP)
    for name in ("stopped", "stopped and continued"):
        with batches_noted(folder, name):
            train(run, folder / name)
        if last:
            stop_at(STOP)
    train(run, folder / "stopped and continued", begin="resume")
    if last:
        break_loss(2)
    mistaken(folder, "broken", changed(run, {}, skip_limit=1))
    plan_by_rank()
    train(changed(run, {}, minutes=1.0, steps=100), folder / "planned")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
