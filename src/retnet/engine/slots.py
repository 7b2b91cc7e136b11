"""Slots of recurrent states and KV caches: rows, in which sequences come and go without copying others."""

# ruff: noqa: ANN401 (the state of a mixer is a type of its own)

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from retnet.mixers import Mixer

Rows = slice | Tensor  # of a pool: int64 [B] on the device of its states
PLACES = 64  # a cache has a multiple of; each of so many tokens reads all of it, so copying it once more costs little


def rows_of(slots: Tensor, device: torch.device) -> Rows:
    """Slots, int64 [B] on the CPU, as what the tensors of a pool are indexed with: a slice where they follow one another."""
    numbers = slots.tolist()
    if numbers and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return slice(numbers[0], numbers[0] + len(numbers))
    return slots.to(device)


def room_for(tokens: int) -> int:
    """How many places the cache of a slot has that holds so many tokens."""
    return -(-tokens // PLACES) * PLACES


class SlotPool:
    """The states of one layer for a fixed number of sequences: each tensor of a state, [B,...], as one of [slots,...].

    Caches have a place a token along their second dimension. Each slot has one of its own, [S,...], with room for its own
    sequence alone (`room_for`), and none when it is freed: what a pool holds is what its sequences come to.

    Args:
        mixer: of the layer.
        slots: how many sequences.
        like: a tensor of the device and type of the computation.

    Attributes:
        state: the tensors, in a NamedTuple as the mixer's own; of a cache a list with one for each slot. Rows that nobody
            uses may hold anything.
        grows: whether there are caches, which have a place for every token.
        slots: as given.
        addresses: of the caches, int64 [fields of the state,slots].
    """

    def __init__(self, mixer: Mixer, slots: int, like: Tensor) -> None:
        self._initial = mixer.init_state(1, device=like.device, dtype=like.dtype)
        self._cached = [name in mixer.caches for name in self._initial._fields]
        self.grows, self.slots = any(self._cached), slots
        self._places = [0] * slots  # that the caches of each have
        self.addresses = torch.zeros(len(self._cached), slots, dtype=torch.int64)
        whole = mixer.init_state(slots, device=like.device, dtype=like.dtype)
        self.state = self._like(
            [first[0]] * slots if cached else part
            for part, first, cached in zip(whole, self._initial, self._cached, strict=True)
        )

    def take(self, rows: Rows, new: Sequence[int]) -> Any:
        """The state of some rows, with room for so many more tokens in each.

        Caches are a list of the pool's own, one a row, which grow in place. The rest of a slice are views of the pool, of
        other rows copies; whoever has moved them on must `put` them back either way.
        """
        if self.grows:
            self.reserve(rows, new)
        return self._like(
            [part[slot] for slot in _numbers(rows)] if cached else part[rows]
            for part, cached in zip(self.state, self._cached, strict=True)
        )

    def reserve(self, rows: Rows, new: Sequence[int]) -> None:
        """Makes room for so many more tokens in the caches of some rows."""
        lengths: list[int] = self.state.length[rows].tolist()
        for slot, length, more in zip(_numbers(rows), lengths, new, strict=True):
            if length + more > self._places[slot]:
                for number, caches in self._caches():
                    self._put_cache(number, slot, caches[slot][:length], length + more)

    def put(self, rows: Rows, before: Any, after: Any) -> None:
        """Stores rows that `take` gave as `before` and that have become `after`."""
        for pool, old, new, cached in zip(self.state, before, after, self._cached, strict=True):
            if not cached and (new is not old or not isinstance(rows, slice)):
                pool[rows] = new  # else a view, moved on in place

    def reset(self, rows: Rows) -> None:
        """Makes rows what they are before the first token."""
        self.free(rows)
        for pool, first, cached in zip(self.state, self._initial, self._cached, strict=True):
            if not cached:
                pool[rows] = first[0]

    def free(self, rows: Rows) -> None:
        """Gives back the memory of the caches of rows, which nobody uses any more."""
        for number, _ in self._caches():
            for slot in _numbers(rows):
                self._put_cache(number, slot, self._initial[number][0], 0)

    def copy(self, source: Rows, target: Rows) -> None:
        """Makes row target[i] what row source[i] is."""
        for number, (pool, cached) in enumerate(zip(self.state, self._cached, strict=True)):
            if cached:
                copied = [pool[slot] for slot in _numbers(source)]
                for slot, cache in zip(_numbers(target), copied, strict=True):
                    self._put_cache(number, slot, cache, len(cache))
            else:
                pool[target] = pool[source].clone()

    def read(self, rows: Rows) -> Any:
        """A copy of rows, as a state of the mixer; its caches are as long as the longest row."""
        return self._like(
            self._gather(part, rows) if cached else part[rows].clone()
            for part, cached in zip(self.state, self._cached, strict=True)
        )

    def write(self, rows: Rows, state: Any) -> None:
        """Puts the rows of a state of the mixer, [B,...] a tensor, in the place of what the slots held."""
        for number, (pool, cached, new) in enumerate(zip(self.state, self._cached, state, strict=True)):
            if cached:
                for slot, cache, length in zip(_numbers(rows), new, state.length.tolist(), strict=True):
                    self._put_cache(number, slot, cache[:length], length)
            else:
                pool[rows] = new

    def _caches(self) -> list[tuple[int, list[Tensor]]]:
        """Each cache of the state, by slot, and the number of its field."""
        return [(number, self.state[number]) for number, cached in enumerate(self._cached) if cached]

    def _gather(self, caches: Sequence[Tensor], rows: Rows) -> Tensor:
        """The caches of some rows as one, [B,S,...], as long as the longest."""
        slots, lengths = _numbers(rows), self.state.length[rows].tolist()
        if len(slots) == 1:
            return caches[slots[0]][None, : lengths[0]].clone()
        together = caches[0].new_zeros(len(slots), max(lengths, default=0), *caches[0].shape[1:])
        for row, slot, length in zip(together, slots, lengths, strict=True):
            row[:length] = caches[slot][:length]
        return together

    def _put_cache(self, number: int, slot: int, content: Tensor, tokens: int) -> None:
        """Gives a slot a cache of its own with this content and room for so many tokens."""
        with torch.inference_mode(False):  # else nobody outside of it could change it
            cache = content.new_empty(room_for(tokens), *content.shape[1:])
        cache[: len(content)] = content
        self.state[number][slot] = cache
        self.addresses[number, slot], self._places[slot] = cache.data_ptr(), len(cache)

    def _like(self, parts: Iterable[Any]) -> Any:
        return type(self._initial)(*parts)


def _numbers(rows: Rows) -> Sequence[int]:
    """Rows as numbers."""
    if isinstance(rows, slice):
        return range(rows.start, rows.stop)
    numbers: list[int] = rows.tolist()
    return numbers
