"""Prefill scheduling: what is left to read of each prompt, and how prompts share the tokens that a step reads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retnet.engine.decoder import Decoder
from retnet.engine.requests import Stats
from retnet.engine.store import BLOCK, StateStore, kept_positions, keys_of, next_key, root_of
from retnet.engine.streams import Stream
from retnet.model import ModelState

IDLE_TOKENS = 1024  # at least, in a step that only reads: nobody waits for it


class Snapshot(NamedTuple):
    """The state after a prompt, of each layer a row, and the logits [1,V] after it."""

    state: ModelState
    logits: Tensor


class Prompt:
    """A request until the last of its samples runs.

    Attributes:
        id: the request's.
        asked: what that is.
        ids: its tokens.
        streams: samples that do not run yet.
        bytes: what the state of one may come to.
        slot: where it is read.
        position: tokens read so far.
        cached: how many of these were not read, since the cache had a state after them.
        root: what these begin with.
        keys: of the states at its block boundaries.
        stops: after how many tokens the cache wants a state.
        snapshot: the state after it, when it has been read and samples wait for a slot.
    """

    def __init__(self, number: int, ids: tuple[int, ...], streams: Sequence[Stream], size: int) -> None:
        self.id, self.ids, self.streams, self.bytes = number, ids, deque(streams), size
        self.asked = streams[0].asked
        self.slot, self.position, self.cached = -1, 0, 0
        self.root = ""
        self.keys: list[str] = []
        self.stops: list[int] = []
        self.snapshot: Snapshot | None = None

    def start(self, stream: Stream, slot: int) -> None:
        """One of its samples runs from here on, in a slot."""
        stream.slot, stream.bytes = slot, self.bytes
        stream.prompt, stream.cached_tokens = self.ids, self.cached
        stream.key, stream.kept = self.keys[-1] if self.keys else self.root, BLOCK * len(self.keys)

    def piece(self, most: int) -> int:
        """How many tokens to read now, at most so many and not beyond the next state that the cache wants."""
        stop = next((stop for stop in self.stops if stop > self.position), len(self.ids))
        return min(most, stop - self.position)

    def block(self) -> int:
        """Tokens up to the next block boundary, or the end."""
        return min(BLOCK - self.position % BLOCK, len(self.ids) - self.position)


class Prefill:
    """Prompts that have a slot, read a part at every step: one packed call, or with `exact` one for each block.

    Args:
        decoder: reads them.
        stats: tokens and seconds are counted here.
        tokens: at most, in a step that also decodes.
        exact: prompts are read alone, in blocks that begin at multiples of `BLOCK` tokens.
        store: where states are kept and found; None: nowhere.
        fingerprint: of the model.

    Attributes:
        prompts: the oldest first.
    """

    def __init__(
        self,
        decoder: Decoder,
        stats: Stats,
        tokens: int,
        exact: bool,
        store: StateStore | None,
        fingerprint: str,
    ) -> None:
        self._decoder, self._stats, self._exact = decoder, stats, exact
        self._tokens = max(tokens, 2 * BLOCK) if exact else tokens  # its half is a block
        self._store, self._fingerprint = store, fingerprint
        self.prompts: list[Prompt] = []

    def begin(self, prompt: Prompt) -> None:
        """Fills a prompt's slot: with the longest kept beginning of it, of which at least the last token is read anew."""
        self.prompts.append(prompt)
        if self._store is not None and prompt.asked.cache:
            prompt.root = root_of(self._fingerprint, prompt.asked.cache_salt)
            prompt.keys = keys_of(prompt.root, prompt.ids)
            prompt.position, state = self._store.longest(prompt.keys[: (len(prompt.ids) - 1) // BLOCK])
            prompt.stops = kept_positions(len(prompt.ids), prompt.asked.marks)
            prompt.cached = prompt.position
            if state is not None:
                self._decoder.write(index(prompt.slot), state)
                return
        self._decoder.reset(index(prompt.slot))

    def keep(self, streams: Sequence[Stream]) -> None:
        """Keeps the states of running streams that are at a block boundary; with `exact` those of blocks that were read."""
        if self._store is None or self._exact:
            return
        for stream in streams:
            while stream.kept + BLOCK <= stream.length and stream.asked.cache:
                block = stream.ids(stream.kept, stream.kept + BLOCK)
                stream.key = next_key(stream.key, block)
                stream.kept += BLOCK
                if stream.kept == stream.length:
                    self._store.put(stream.key, self._decoder.read(index(stream.slot)))

    def read(self, decoding: bool) -> list[tuple[Prompt, Tensor]]:
        """Reads a part of them: those that came to their end, with the logits [1,V] after it."""
        budget = self._tokens if decoding else max(self._tokens, IDLE_TOKENS)
        shares = share([len(prompt.ids) - prompt.position for prompt in self.prompts], budget)
        parts = [(prompt, count) for prompt, count in zip(self.prompts, shares, strict=True) if count]
        if not self._exact:
            return self._read_pieces([(prompt, prompt.piece(count)) for prompt, count in parts])
        done = []
        for prompt, count in parts:
            while (block := prompt.block()) and block <= count:
                done += self._read_pieces([(prompt, block)])
                count -= block
        return done

    def _read_pieces(self, parts: Sequence[tuple[Prompt, int]]) -> list[tuple[Prompt, Tensor]]:
        """So many tokens of each of these prompts, in one call."""
        began, done = time.perf_counter(), []
        tokens = [i for prompt, count in parts for i in prompt.ids[prompt.position : prompt.position + count]]
        bounds = torch.tensor([0, *(count for _, count in parts)]).cumsum(0)
        device = self._decoder.device
        slots = index(*(prompt.slot for prompt, _ in parts))
        logits = self._decoder.prefill(torch.tensor(tokens, device=device), bounds, slots)
        for row, (prompt, count) in enumerate(parts):
            prompt.position += count
            if self._store is not None and prompt.position in prompt.stops:
                state = self._decoder.read(index(prompt.slot))
                self._store.put(prompt.keys[prompt.position // BLOCK - 1], state)
            if prompt.position == len(prompt.ids):
                done.append((prompt, logits[row : row + 1]))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._stats.prefill_tokens += len(tokens)
        self._stats.prefill_seconds += time.perf_counter() - began
        return done


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


def index(*slots: int) -> Tensor:
    """Slots as int64 [B]."""
    return torch.tensor(slots, dtype=torch.int64)
