"""Slots of recurrent states and KV caches: pools of rows, in which sequences come and go without copying others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from retnet.mixers import Mixer

Rows = slice | Tensor  # of a pool: int64 [B] on the device of its states


def rows_of(slots: Tensor, device: torch.device) -> Rows:
    """Slots, int64 [B] on the CPU, as what the tensors of a pool are indexed with: a slice where they follow one another."""
    numbers = slots.tolist()
    if numbers and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return slice(numbers[0], numbers[0] + len(numbers))
    return slots.to(device)


class SlotPool:
    """The states of one layer for a fixed number of sequences: each tensor of a state, [B,...], as one of [slots,...].

    Caches have a place a token along their second dimension. Room for more places is made for all rows at once and by half,
    so that each place is copied a constant number of times; nothing else is ever copied for other rows.

    Args:
        mixer: of the layer.
        slots: how many sequences.
        like: a tensor of the device and type of the computation.

    Attributes:
        state: the tensors, in a NamedTuple as the mixer's own; another one once they have moved. Rows that nobody uses may
            hold anything.
        grows: whether there are caches, which have a place for every token.
    """

    def __init__(self, mixer: Mixer, slots: int, like: Tensor) -> None:
        self.state, self._initial = (
            mixer.init_state(rows, device=like.device, dtype=like.dtype) for rows in (slots, 1)
        )
        self._cached = [name in mixer.caches for name in self._initial._fields]
        self.grows = any(self._cached)

    def take(self, rows: Rows, new: int) -> Any:  # noqa: ANN401
        """The state of some rows, with room for `new` more tokens in each.

        Those of a slice are views of the pool, others copies; whoever has moved them on must `put` them back either way.
        """
        if not self.grows:
            return self._like(part[rows] for part in self.state)
        places = self.reserve(rows, new)
        length = self.state.length[rows].clone()
        parts = (
            part[rows, :places] if cached else part[rows]
            for part, cached in zip(self.state, self._cached, strict=True)
        )
        return self._like(parts)._replace(length=length)

    def reserve(self, rows: Rows, new: int) -> int:
        """Makes room for `new` more tokens in the caches of some rows; how many places the longest has then."""
        places = int(self.state.length[rows].max()) + new
        self._make_room(places)
        return places

    def put(self, rows: Rows, before: Any, after: Any) -> None:  # noqa: ANN401
        """Stores rows that `take` gave as `before` and that have become `after`; of a cache only the places that are new."""
        at = self._new_places(rows, after) if self.grows else None
        names = self._initial._fields
        for name, pool, cached, old, new in zip(names, self.state, self._cached, before, after, strict=True):
            if isinstance(rows, slice) and new is old and name != "length":
                continue  # a view, moved on in place
            if cached and at is not None:
                slot, row, place = at
                pool[slot, place] = new[row, place]
            else:
                pool[rows] = new

    def reset(self, rows: Rows) -> None:
        """Makes rows what they are before the first token."""
        for pool, first, cached in zip(self.state, self._initial, self._cached, strict=True):
            pool[rows] = 0 if cached else first[0]

    def copy(self, source: Rows, target: Rows) -> None:
        """Makes row target[i] what row source[i] is."""
        for pool in self.state:
            pool[target] = pool[source].clone()

    def read(self, rows: Rows) -> Any:  # noqa: ANN401
        """A copy of rows, as a state of the mixer; its caches are as long as the longest row."""
        length = self.state.length[rows] if self.grows else None
        places = int(length.max()) if length is not None and len(length) else 0
        return self._like(
            (part[rows, :places] if cached else part[rows]).clone()
            for part, cached in zip(self.state, self._cached, strict=True)
        )

    def write(self, rows: Rows, state: Any) -> None:  # noqa: ANN401
        """Puts the rows of a state of the mixer, [B,...] a tensor, in the place of what the slots held."""
        places = int(state.length.max()) if self.grows and len(state.length) else 0
        self._make_room(places)
        for pool, cached, new in zip(self.state, self._cached, state, strict=True):
            if cached:
                pool[rows] = (
                    0  # NaN must not stand behind the end of a row: a weight of 0 does not silence it
                )
                pool[rows, :places] = new[:, :places]
            else:
                pool[rows] = new

    def _new_places(self, rows: Rows, after: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
        """Slot, row and place of each token that came."""
        length = self.state.length[rows]
        count = after.length - length
        row = torch.repeat_interleave(count)
        place = (length - count.cumsum(0) + count)[row] + torch.arange(len(row), device=row.device)
        return (row + rows.start if isinstance(rows, slice) else rows[row]), row, place

    def _make_room(self, places: int) -> None:
        def grown(part: Tensor, cached: bool) -> Tensor:
            if not cached or part.shape[1] >= places:
                return part
            room = part.new_zeros(part.shape[0], places + places // 2 + 64, *part.shape[2:])
            room[:, : part.shape[1]] = part
            return room

        parts = zip(self.state, self._cached, strict=True)
        if all(part.shape[1] >= places for part, cached in parts if cached):
            return
        with torch.inference_mode(False):  # else nobody outside of it could change them
            self.state = self._like(map(grown, self.state, self._cached))

    def _like(self, parts: Iterable[Tensor]) -> Any:  # noqa: ANN401
        return type(self._initial)(*parts)
