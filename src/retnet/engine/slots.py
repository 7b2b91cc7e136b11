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
        self.addresses = torch.zeros(len(self._cached), slots, dtype=torch.int64)
        whole = mixer.init_state(slots, device=like.device, dtype=like.dtype)
        self.state = self._like(
            [first[0]] * slots if cached else part
            for part, first, cached in zip(whole, self._initial, self._cached, strict=True)
        )

    def take(self, rows: Rows, new: int) -> Any:
        """The state of some rows, with room for `new` more tokens in each.

        Those of a slice, and the cache of a single row, are views of the pool, others copies; whoever has moved them on must
        `put` them back either way.
        """
        lengths: list[int] = self.state.length[rows].tolist() if self.grows else []
        if len(lengths) == 1:
            self.reserve(rows, new)
        taken = self._like(
            self._gather(part, rows, lengths, new) if cached else part[rows]
            for part, cached in zip(self.state, self._cached, strict=True)
        )
        return taken._replace(length=taken.length.clone()) if self.grows else taken

    def reserve(self, rows: Rows, new: int) -> None:
        """Makes room for `new` more tokens in the caches of some rows."""
        lengths: list[int] = self.state.length[rows].tolist()
        for number, _ in self._caches():
            for slot, length in zip(_numbers(rows), lengths, strict=True):
                self._make_room(number, slot, length, length + new)

    def put(self, rows: Rows, before: Any, after: Any) -> None:
        """Stores rows that `take` gave as `before` and that have become `after`; of a cache only the places that are new."""
        if self.grows:
            ends = zip(self.state.length[rows].tolist(), after.length.tolist(), strict=True)
            places = [*enumerate(zip(_numbers(rows), ends, strict=True))]
        for number, (pool, old, new) in enumerate(zip(self.state, before, after, strict=True)):
            if self._cached[number]:
                for row, (slot, (start, end)) in places if new is not old or len(new) > 1 else ():
                    self._make_room(number, slot, start, end)
                    pool[slot][start:end] = new[row, start:end]
            elif new is not old or self.grows or not isinstance(rows, slice):
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
        lengths: list[int] = self.state.length[rows].tolist() if self.grows else []
        return self._like(
            (self._gather(part, rows, lengths, 0) if cached else part[rows]).clone()
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

    def _gather(self, caches: Sequence[Tensor], rows: Rows, lengths: Sequence[int], new: int) -> Tensor:
        """The caches [B,S,...] of some rows up to the longest and so many places more; of a single row a view."""
        places, numbers = max(lengths, default=0) + new, _numbers(rows)
        if len(numbers) == 1:
            return caches[numbers[0]][None, :places]
        together = caches[0].new_zeros(len(numbers), places, *caches[0].shape[1:])
        for row, slot, length in zip(together, numbers, lengths, strict=True):
            row[:length] = caches[slot][:length]
        return together

    def _make_room(self, number: int, slot: int, length: int, tokens: int) -> None:
        """Lets the cache of a slot, of which so many places are filled, hold so many tokens."""
        cache = self.state[number][slot]
        if len(cache) < tokens:
            self._put_cache(number, slot, cache[:length], tokens)

    def _put_cache(self, number: int, slot: int, content: Tensor, tokens: int) -> None:
        """Gives a slot a cache of its own with this content, room for so many tokens, and zeros behind."""
        with torch.inference_mode(False):  # else nobody outside of it could change it
            cache = content.new_zeros(room_for(tokens), *content.shape[1:])
        cache[: len(content)] = content
        self.state[number][slot] = cache
        self.addresses[number, slot] = cache.data_ptr()

    def _like(self, parts: Iterable[Any]) -> Any:
        return type(self._initial)(*parts)


def _numbers(rows: Rows) -> Sequence[int]:
    """Rows as numbers."""
    if isinstance(rows, slice):
        return range(rows.start, rows.stop)
    numbers: list[int] = rows.tolist()
    return numbers
