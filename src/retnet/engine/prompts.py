"""Prefill scheduling: what is left to read of each prompt, and how prompts share the tokens that a step reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from retnet.engine.store import BLOCK
from retnet.engine.streams import Stream
from retnet.model import ModelState


class Snapshot(NamedTuple):
    """The state after a prompt, of each layer a row, and the logits [1,V] after it."""

    state: ModelState
    logits: Tensor


class Prompt:
    """A request until the last of its samples runs.

    Attributes:
        id: the request's.
        ids: its tokens.
        streams: samples that do not run yet.
        bytes: what the state of one may come to.
        slot: where it is read.
        position: tokens read so far.
        cached: how many of these were not read, since the cache had a state after them.
        keys: of the states at its block boundaries.
        stops: after how many tokens the cache wants a state.
        snapshot: the state after it, when it has been read and samples wait for a slot.
    """

    def __init__(self, number: int, ids: tuple[int, ...], streams: Sequence[Stream], size: int) -> None:
        self.id, self.ids, self.streams, self.bytes = number, ids, deque(streams), size
        self.cache, self.marks = streams[0].asked.cache, streams[0].asked.marks
        self.slot, self.position, self.cached = -1, 0, 0
        self.keys: list[str] = []
        self.stops: list[int] = []
        self.snapshot: Snapshot | None = None

    def piece(self, most: int) -> int:
        """How many tokens to read now, at most so many and not beyond the next state that the cache wants."""
        stop = next((stop for stop in self.stops if stop > self.position), len(self.ids))
        return min(most, stop - self.position)

    def block(self) -> int:
        """Tokens up to the next block boundary, or the end."""
        return min(BLOCK - self.position % BLOCK, len(self.ids) - self.position)


def share(left: Sequence[int], budget: int) -> list[int]:
    """How many tokens of each prompt are read in a step: half for the first, the rest for the shortest first.

    Args:
        left: tokens each has left to read, at least one, the oldest prompt first.
        budget: the most tokens in all.

    Returns:
        Tokens of each; the budget is used up while there is anything left to read.
    """
    shares = [0] * len(left)

    def give(prompt: int, most: int) -> int:
        given = min(left[prompt] - shares[prompt], most)
        shares[prompt] += given
        return given

    budget -= give(0, budget - budget // 2)
    for prompt in sorted(range(1, len(left)), key=left.__getitem__):
        budget -= give(prompt, budget)
    give(0, budget)
    return shares
