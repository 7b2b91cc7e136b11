"""Trains some runs, and writes what each took and what was expected: python -m tests.measure.footprints CONFIG FOLDER

Alone it is about memory, of several processes (torchrun -m) about bytes that they receive too; each writes FOLDER/RANK.json.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from retnet.host import map_large_tensors
from retnet.measure.footprint import footprint
from retnet.measure.memory import Watch
from retnet.mixers import MIXERS
from retnet.settings import load
from retnet.train.config import DistillConfig, ParallelConfig, RunConfig
from retnet.train.passes import Passes
from retnet.train.trainer import train

SHARED = "RANK" in os.environ
STEPS = 2


def cases(base: RunConfig, folder: Path) -> dict[str, RunConfig]:
    """Runs of which other parts take most of the memory, or of the bytes on the wire, each.

    What the first leaves in the folder is the teacher of another.
    """

    def case(model: dict, mixer: str = "retention", parallel: ParallelConfig | None = None, **options):
        kind, shown = MIXERS[mixer].Config(), {"eval_tokens": 512, "eval_every": 0, "device": "cpu"}
        shown["checkpoint_every"] = 1 if SHARED else 9  # copies are there while the second step computes
        return replace(
            base,
            model=replace(base.model, mixer=kind, **model),
            train=replace(base.train, steps=STEPS, **shown, **options),
            parallel=parallel or ParallelConfig(),
        )

    weights = case({"d_model": 512, "num_layers": 4}, batch_size=1, seq_len=128, accumulate=2, ema=0.9)
    teacher = DistillConfig(str(folder / "weights"))
    if SHARED:
        small = {"model": {"d_model": 64}, "batch_size": 1, "seq_len": 64}  # a cut is in the middle of a row
        return {
            "weights": weights,
            "teacher": replace(case(accumulate=2, **small), distill=teacher),
            "heads": case(
                {"d_model": 512, "num_layers": 4},
                parallel=ParallelConfig(tp=2),
                batch_size=1,
                seq_len=128,
                accumulate=2,
                activation_checkpointing=True,
            ),
            "replicas": case(parallel=ParallelConfig(replicate=2), accumulate=4, **small),
            "stretches": case(
                parallel=ParallelConfig(cp=2), accumulate=3, activation_checkpointing=True, **small
            ),
        }
    once, wide = {"seq_len": 512, "accumulate": 1}, {"d_model": 256, "num_layers": 4, "dropout": 0.0}
    taught = case({"d_model": 64}, batch_size=8, **once)
    return {
        "weights": weights,
        "teacher": replace(taught, distill=teacher),
        "logits": case({"d_model": 64, "vocab_size": 20000}, batch_size=2, **once),
        "activations": case(wide, batch_size=4, **once),
        "recomputed": case(wide, batch_size=8, activation_checkpointing=True, **once),
        "hybrid": case({"d_model": 128, "num_layers": 2}, "h3", batch_size=4, **once),
    }


def count_received(received: Counter) -> None:
    """Counts bytes that collectives bring this process in the passes of steps, by kind."""
    plain, gathers, scatters, sums = (
        Passes.gradients,
        dist.all_gather_single,
        dist.reduce_scatter_single,
        dist.all_reduce,
    )

    def gather(output, given, *args, **options):
        received["states" if given.dim() > 1 else "weights"] += output.nbytes - given.nbytes
        return gathers(output, given, *args, **options)

    def scatter(output, *args, **options):
        given = options["input"] if "input" in options else args[0]
        received["gradients"] += given.nbytes - output.nbytes
        return scatters(output, *args, **options)

    def reduce(x, *args, **options):
        ranks = dist.get_world_size(options.get("group"))
        inside = sys._getframe(1).f_globals["__name__"] == "retnet.ops.tensor_parallel"
        kind = "activations" if inside else "sums" if x.dtype == torch.float64 else "replicas"
        received[kind] += 2 * x.nbytes * (ranks - 1) // ranks
        return sums(x, *args, **options)

    def gradients(*args):
        dist.all_gather_single, dist.reduce_scatter_single, dist.all_reduce = gather, scatter, reduce
        try:
            return plain(*args)
        finally:
            dist.all_gather_single, dist.reduce_scatter_single, dist.all_reduce = gathers, scatters, sums

    Passes.gradients = gradients


def main() -> None:
    map_large_tensors()
    base, folder = load(RunConfig, sys.argv[1]), Path(sys.argv[2])
    if SHARED:
        dist.init_process_group()
    rank, world = (dist.get_rank(), dist.get_world_size()) if SHARED else (0, 1)
    received, found = Counter(), {}
    count_received(received)
    train(replace(base, train=replace(base.train, steps=1)), folder / "warm")  # libraries are loaded
    for name, config in cases(base, folder).items():
        received.clear()
        expected = footprint(config, world)  # reads the teacher
        watch = Watch(torch.device("cpu"))
        train(config, folder / name)
        found[name] = {
            "held": watch.peak(),
            "expected": expected.memory.peak,
            "received": {kind: number // STEPS for kind, number in received.items() if number},
            "to be received": {kind: number for kind, number in expected.traffic._asdict().items() if number},
        }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    if SHARED:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
