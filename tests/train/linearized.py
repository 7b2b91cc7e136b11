"""What the ranks of test_linearize.py do: a linearisation by all of them, one that is stopped, and one that one began."""

import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from retnet.settings import load
from retnet.train.distributed import Ranks
from retnet.train.linearize import Linearization, linearize
from retnet.train.progress import TrainingProgress


class Stopping(TrainingProgress):
    """Sends this process a signal in the third step of a stage of six."""

    def step(self, step, *measured):
        if (self._steps, step) == (6, 3):
            os.kill(os.getpid(), signal.SIGTERM)


def cases() -> dict[str, list]:
    """Name → what is known of each stage."""
    ranks, folder = Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD), Path(sys.argv[4])
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if ranks.first else None
    port = ranks.tell(store.port if store else None)
    told = {"RANK": ranks.rank, "LOCAL_RANK": ranks.rank, "WORLD_SIZE": ranks.world}  # as by torchrun
    os.environ |= {name: str(value) for name, value in told.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    config = load(Linearization, folder / "config.toml")
    stopped = linearize(config, folder / "stopped", Stopping(Console(quiet=True)))
    assert (stopped.finished, stopped.student.name) == (False, "2-distil")
    done = {name: linearize(config, folder / name) for name in ("two", "stopped", "begun by one")}
    dist.barrier()  # the store goes last
    return {
        name: [[stage.parameters, *stage.quality, stage.recall] for stage in made.stages]
        for name, made in done.items()
    }
