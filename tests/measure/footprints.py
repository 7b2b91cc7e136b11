"""Trains some runs, and prints how much memory each took of this process and how much was expected:
python -m tests.measure.footprints CONFIG FOLDER, or torchrun -m …; every rank writes FOLDER/RANK.json.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from retnet.host import map_large_tensors
from retnet.measure.footprint import footprint
from retnet.measure.memory import Watch
from retnet.mixers import MIXERS
from retnet.settings import load
from retnet.train.config import RunConfig
from retnet.train.trainer import train


def cases(base: RunConfig) -> dict[str, RunConfig]:
    """Runs of which other parts take most of the memory each."""

    def case(model: dict, mixer: str = "retention", **options) -> RunConfig:
        kind = MIXERS[mixer].Config()
        return replace(
            base,
            model=replace(base.model, mixer=kind, **model),
            train=replace(base.train, steps=2, eval_tokens=512, eval_every=0, checkpoint_every=9, **options),
        )

    once = {"seq_len": 512, "accumulate": 1}
    alone = {
        "logits": case({"d_model": 64, "vocab_size": 20000}, batch_size=2, **once),
        "activations": case({"d_model": 256, "num_layers": 4, "dropout": 0.0}, batch_size=4, **once),
        "recomputed": case(
            {"d_model": 256, "num_layers": 4}, batch_size=8, activation_checkpointing=True, **once
        ),
        "hybrid": case({"d_model": 128, "num_layers": 2}, "h3", batch_size=4, **once),
    }
    weights = case({"d_model": 512, "num_layers": 4}, batch_size=1, seq_len=128, accumulate=2, ema=0.9)
    return {**(alone if "RANK" not in os.environ else {}), "weights": weights}


def main() -> None:
    map_large_tensors()
    base, folder = load(RunConfig, sys.argv[1]), Path(sys.argv[2])
    shared = "RANK" in os.environ
    if shared:
        dist.init_process_group()
    rank, world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
    found = {}
    train(replace(base, train=replace(base.train, steps=1)), folder / "warm")  # libraries are loaded
    for name, config in cases(base).items():
        watch = Watch(torch.device("cpu"))
        train(config, folder / name)
        memory = footprint(config, world).memory
        found[name] = {"held": watch.peak(), "expected": memory.peak, **memory._asdict()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    if shared:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
