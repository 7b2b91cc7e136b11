"""Steps of several processes beside those of one: strong and weak scaling over each axis of the mesh, interleaved.

    torchrun --standalone --nproc-per-node=2 -m tools.measure_scaling [--rounds 5] [--out benchmarks/results/tools]

All contenders take turns in the same processes. A step of one process is made by the first while the others wait; over an
axis all make the same step together (strong scaling), or one with as many times the passes (weak scaling). Cores share
caches and memory, so that some processes together are slower than one even if they have nothing to do with each other: that
is measured too, each making steps of its own at once, and is what efficiency is to be held against.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from retnet.data import Batch
from retnet.host import keep_freed_memory
from retnet.measure import records
from retnet.measure.clock import Contender, Sample, Spread, interleave, times_faster
from retnet.model import LanguageModel, ModelConfig
from retnet.model.language_model import fresh_weights
from retnet.settings import config_path, load
from retnet.tables import Table, print_table
from retnet.train.config import ParallelConfig, RunConfig, TrainConfig
from retnet.train.distributed import Ranks, processes, shard, take_parts
from retnet.train.gradients import scale
from retnet.train.notices import Notices
from retnet.train.objective import Objective
from retnet.train.optimizer import optimizers
from retnet.train.passes import Passes

CPU = torch.device("cpu")
AXES = ("shard", "replicate", "tp", "cp")
ALONE, AT_ONCE = "one process", "each by itself, at once"


class RandomBatches:
    """Batches of random tokens, each row a document."""

    def __init__(self, vocabulary: int, c: TrainConfig) -> None:
        self._vocabulary, self._c = vocabulary, c

    def batch(self, place: int) -> Batch:
        """As of `Batches`."""
        g = torch.Generator().manual_seed(place)
        size = (self._c.batch_size, self._c.seq_len)
        tokens, targets = (torch.randint(self._vocabulary, size, generator=g) for _ in range(2))
        bounds = torch.arange(size[0] + 1, dtype=torch.int32) * size[1]
        return Batch(tokens, targets, bounds, tuple(range(size[0])))


class Trained:
    """A model on a mesh, and the steps that its processes make."""

    def __init__(self, config: ModelConfig, c: TrainConfig, ranks: Ranks) -> None:
        torch.manual_seed(0)
        if ranks.alone:
            model = LanguageModel(config)
        else:
            model = shard(config, CPU, ranks)
            take_parts(model, fresh_weights(config), ranks)
        assert config.vocab_size is not None
        self._model, self._ranks, self._optimizers = model, ranks, optimizers(model, c)
        batches: Any = RandomBatches(config.vocab_size, c)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=False)
        objective = Objective(model, tp=ranks.tp)
        self._passes = Passes(model, objective, batches, CPU, autocast, Notices(ranks, CPU), ranks)

    def step(self, c: TrainConfig) -> None:
        """As `retnet train` makes it."""
        found = self._passes.gradients(0, c)
        scale(list(self._model.parameters()), found.mean * min(1.0, c.clip / found.norm), self._ranks)
        for optimizer in self._optimizers:
            optimizer.step()
        self._model.zero_grad(set_to_none=True)


def timed(run: Callable[[], None], group: dist.ProcessGroup) -> float:
    """Seconds from when all processes begin until the last has ended."""
    dist.barrier(group)
    begin = time.perf_counter()
    run()
    dist.barrier(group)
    return time.perf_counter() - begin


def contenders(config: ModelConfig, c: TrainConfig, ranks: Ranks) -> list[Contender]:
    """Steps of `c`, and over each axis those with more passes too."""
    group = ranks.group
    assert group is not None
    alone = Trained(config, c, Ranks())

    def lead() -> None:
        if ranks.first:
            alone.step(c)

    found = [
        Contender(ALONE, lambda: timed(lead, group)),
        Contender(AT_ONCE, lambda: timed(lambda: alone.step(c), group)),
    ]
    more = replace(c, accumulate=c.accumulate * ranks.world)
    for axis in AXES:
        axes = ParallelConfig(**{"shard": 1, axis: ranks.world})
        trained = Trained(config, c, ranks.arranged(axes, CPU))
        for kind, steps in (("strong", c), ("weak", more)):
            run = lambda trained=trained, steps=steps: trained.step(steps)  # noqa: E731
            found.append(Contender(f"{axis}, {kind}", lambda run=run: timed(run, group)))
    return found


def rows(samples: Mapping[str, list[Sample]], world: int) -> list[dict[str, Any]]:
    """Speed-up over one process of each axis, and the part that is reached of what cores have without exchange."""
    found = []
    at_once = samples[AT_ONCE]
    for axis in AXES:
        strong, weak = samples[f"{axis}, strong"], samples[f"{axis}, weak"]
        halves = [s._replace(seconds=s.seconds / world) for s in at_once]
        found.append(
            {
                "axis": axis,
                "strong_speed_up": vars(times_faster(strong, samples[ALONE])),
                "weak_efficiency": vars(times_faster(weak, samples[ALONE])),
                "strong_of_no_exchange": vars(times_faster(strong, halves)),
                "weak_of_no_exchange": vars(times_faster(weak, at_once)),
                "strong_seconds": [s.seconds for s in strong],
                "weak_seconds": [s.seconds for s in weak],
            }
        )
    return found


def table(found: Mapping[str, Any]) -> Table:
    """The same in print."""
    names = ("strong_speed_up", "weak_efficiency", "strong_of_no_exchange", "weak_of_no_exchange")
    lines = tuple((row["axis"], *(Spread(**row[name]).written() for name in names)) for row in found["rows"])
    columns = ("axis", "strong: speed-up", "weak: efficiency", "strong ÷ no exchange", "weak ÷ no exchange")
    ceiling = Spread(**found["at_once_efficiency"]).written()
    return Table(
        f"{found['processes']} processes; {ceiling} of one's speed each without exchange", columns, lines
    )


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="laptop/25m", help="whose model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where the record goes; nowhere by default")
    asked = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    config = replace(load(RunConfig, config_path(asked.config)).model, vocab_size=257, dropout=0.0)
    c = TrainConfig(seq_len=asked.seq_len, batch_size=asked.batch_size, accumulate=asked.accumulate)
    with processes() as ranks:
        samples = interleave(contenders(config, c, ranks), {}, asked.rounds, lambda *_: None)
        if not ranks.first:
            return
        found = {
            "processes": ranks.world,
            "tokens_per_step": c.tokens_per_step,
            "one_process_seconds": [s.seconds for s in samples[ALONE]],
            "at_once_efficiency": vars(times_faster(samples[AT_ONCE], samples[ALONE])),
            "rows": rows(samples, ranks.world),
        }
    print_table(table(found), Console())
    if asked.out:
        record = records.complete("scaling", {"model": asked.config, "train": vars(c)}, found)
        print(f"wrote {records.write(record, asked.out / f'{records.stem(record)}.json', ())[0]}")


if __name__ == "__main__":
    main()
