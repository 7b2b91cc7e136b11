"""What fits where a run does not: the nearest run that makes the same steps in less memory, or on more processes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import replace

from retnet.measure.footprint import footprint
from retnet.settings import UserError
from retnet.train.config import ParallelConfig, RunConfig

MOST_PARTS = 8  # of heads: they are exchanged in every block, which wants one machine
MOST_PROCESSES = 64  # times as many as there are


def nearest_fit(config: RunConfig, processes: int, nbytes: float) -> tuple[RunConfig, int] | None:
    """The nearest run that fits and makes the same steps.

    Preferred in this order are another mesh of as many processes, smaller passes, recomputed blocks, sequences that are cut,
    heads that are; then come twice as many processes, and so on.

    Args:
        config: that does not fit.
        processes: that there are.
        nbytes: of memory that each has.

    Returns:
        The run and its number of processes; None if none was found.
    """
    more = processes
    while more <= MOST_PROCESSES * processes:
        for candidate in _variants(config, more):
            try:
                if footprint(candidate, more).memory.peak <= nbytes:
                    return candidate, more
            except UserError:  # it cannot be shared so
                continue
        more *= 2
    return None


def _variants(config: RunConfig, processes: int) -> Iterator[RunConfig]:
    """The same steps in other ways, those nearest to the given one first."""
    c, axes = config.train, config.parallel
    parts = [axes.tp, *(n for n in _powers(min(processes, MOST_PARTS)) if n > axes.tp)]
    stretches = [axes.cp, *(n for n in _powers(processes) if n > axes.cp)]
    for tp, cp in itertools.product(parts, stretches):
        for recompute in dict.fromkeys((c.activation_checkpointing, True)):
            for split in (n for n in _powers(c.batch_size) if c.batch_size % n == 0):
                train = replace(
                    c,
                    activation_checkpointing=recompute,
                    batch_size=c.batch_size // split,
                    accumulate=c.accumulate * split,
                    ramp_from=c.ramp_from * split if c.ramp_steps else c.ramp_from,
                )
                for replicate in dict.fromkeys((axes.replicate, 1)):
                    left, rest = divmod(processes, replicate * tp * cp)
                    if not rest:  # a `shard` that is set changes with the others
                        mesh = ParallelConfig(replicate, axes.shard and left, tp, cp)
                        yield replace(config, train=train, parallel=mesh)


def _powers(most: int) -> Iterator[int]:
    """1, 2, 4, … up to a number."""
    n = 1
    while n <= most:
        yield n
        n *= 2


def changes(old: RunConfig, new: RunConfig) -> str:
    """What tells one run from another, as words of the command line."""
    words = []
    for section in ("train", "parallel"):
        before, after = getattr(old, section), getattr(new, section)
        for each in dataclasses.fields(after):
            value = getattr(after, each.name)
            if value != getattr(before, each.name) and value is not None:
                shown = str(value).lower() if isinstance(value, bool) else value
                words.append(f"--{section}.{each.name} {shown}")
    return " ".join(words)
