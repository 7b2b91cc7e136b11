"""Hang detection: a thread in each of several processes, which ends it when all wait for one, and names that and its step.

The main thread notes where it is, which costs nothing; the watching thread tells the others through the store where all of
them met, which answers while collectives hang.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from retnet.errors import reason_of
from retnet.train import elastic
from retnet.train.distributed import Ranks

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

PLACES = (
    "reads its batches",
    "computes",
    "agrees with the others",
    "waits for the copy of a checkpoint",
    "validates",
    "saves",
)  # in a step, in this order
TICKS = 4  # looks in the time that processes wait
LONGEST = 10.0  # seconds between two looks


class Place(NamedTuple):
    """Where a process is."""

    step: int
    place: int  # of `PLACES`
    beat: int  # looks of its watching thread


class HangDetector:
    """Watches over steps, inside ``with detector.on():``; of a single process there is nothing to watch.

    Args:
        ranks: the processes.
        patience: seconds without any progress after which they end.
    """

    def __init__(self, ranks: Ranks, patience: float) -> None:
        self._ranks, self._patience = ranks, patience
        self._at, self._since, self._paused = (0, 0), time.monotonic(), False
        self._beat = 0
        self._ended = threading.Event()

    def at(self, step: int, place: str) -> None:
        """Notes that the main thread has come to a place of `PLACES` in a step (counted from 1), or is still getting on."""
        self._at, self._since = (step, PLACES.index(place)), time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what may take any time: then a process is only missed if it does not answer, for its patience again."""
        self._paused = True
        try:
            yield
        finally:
            self._since, self._paused = time.monotonic(), False

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watches inside the block."""
        if self._ranks.alone:
            yield
            return
        self._since = time.monotonic()
        # the main thread may wait in the connection of its process group
        store = elastic.connection(f"hangs {self._ranks.tell(time.time_ns())}")
        store.set_timeout(timedelta(seconds=max(self._patience, LONGEST)))
        thread = threading.Thread(target=self._watch, args=(store,), name="hangs", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _watch(self, store: Store) -> None:
        try:
            self._look(store)
        except RuntimeError as error:  # of the store
            if not self._ended.is_set():
                self._end(
                    0, f"torchrun's store, where the processes met, does not answer ({reason_of(error)})"
                )

    def _look(self, store: Store) -> None:
        period = min(self._patience / TICKS, LONGEST)
        before: dict[int, Place] | None = None
        until = 0.0
        while not self._ended.wait(period):
            self._tell(store)
            now = time.monotonic()
            if now - self._since <= self._patience:
                before = None
            elif before is None:
                # what may take any time is only ended for a process that does not answer
                before, until = self._hear(store), now + (self._patience if self._paused else 2 * period)
            elif now >= until:
                found = self._hear(store)
                if not self._paused or silent(before, found, self._ranks.world):
                    late, why = blamed(before, found, self._ranks.world)
                    speaker = min(set(found) - set(late), default=0)
                    self._end(speaker, f"no progress for {self._patience:g} s (train.patience): {why}")
                before = None

    def _tell(self, store: Store) -> None:
        self._beat += 1
        store.set(f"at {self._ranks.rank}", json.dumps((*self._at, self._beat)))

    def _hear(self, store: Store) -> dict[int, Place]:
        names = [f"at {rank}" for rank in range(self._ranks.world)]
        found = {rank: store.get(name) for rank, name in enumerate(names) if store.check([name])}
        return {rank: Place(*json.loads(text)) for rank, text in found.items()}

    def _end(self, speaker: int, why: str) -> None:
        """Ends this process; one speaks for all."""
        if self._ranks.rank == speaker:
            print(
                f"retnet: error: {why}. --resume goes on from the last checkpoint; torchrun --max-restarts N does so by "
                "itself",
                file=sys.stderr,
                flush=True,
            )
        else:
            time.sleep(1)
        os._exit(1)  # no other way: the main thread waits, and does not come back


def blamed(before: Mapping[int, Place], now: Mapping[int, Place], world: int) -> tuple[list[int], str]:
    """Which processes the others wait for, and a sentence about them.

    Args:
        before: where each process was when somebody grew impatient; who never said so is missing.
        now: some looks later.
        world: how many there are.
    """
    if missing := silent(before, now, world):
        last = now.get(missing[0], Place(0, 0, 0)).step
        return (
            missing,
            f"{_named(missing)} in step {last} and does not answer; it was stopped, or its machine is gone",
        )
    first = min((place.step, place.place) for place in now.values())
    late = [rank for rank, place in now.items() if (place.step, place.place) == first]
    where = f"in step {first[0]}, where it {PLACES[first[1]]}"
    if len(late) == world:
        return late, f"all processes are {where}, and which one the others wait for cannot be told"
    return late, f"{_named(late)} {where}, and the others wait for it"


def silent(before: Mapping[int, Place], now: Mapping[int, Place], world: int) -> list[int]:
    """Processes whose watching thread has not looked since; arguments as of `blamed`."""
    return [rank for rank in range(world) if rank not in now or now[rank] == before.get(rank)]


def _named(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"process {ranks[0]} is"
    return f"each of the processes {', '.join(map(str, ranks))} is"
