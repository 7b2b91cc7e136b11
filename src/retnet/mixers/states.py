"""Rows of recurrent states: tensors (or None), batch first, in tuples and NamedTuples of any depth."""

# ruff: noqa: ANN401 (the state of a mixer is a type of its own)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def select_rows(state: Any, rows: Sequence[int] | Tensor) -> Any:
    """A new state made of the given rows, in that order; a row may be named several times. Always a copy."""
    index: dict[torch.device, Tensor] = {}

    def select(tensors: list[Tensor]) -> Tensor:
        device = tensors[0].device
        if device not in index:
            index[device] = torch.as_tensor(rows, dtype=torch.long, device=device)
        return tensors[0].index_select(0, index[device])

    return _map(select, [state])


def join_rows(states: Sequence[Any]) -> Any:
    """One state with the rows of all `states` (at least one), in order; of caches that grow, the shorter are filled up."""
    return states[0] if len(states) == 1 else _map(join_tensors, list(states))


def _map(function: Callable[[list[Tensor]], Tensor], states: list[Any]) -> Any:
    first = states[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return function(states)
    if not isinstance(first, tuple):
        raise TypeError(f"a state is made of tensors and tuples, got {type(first).__name__}")
    parts = [_map(function, list(part)) for part in zip(*states, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)


def join_tensors(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts [B_i,...] as one tensor; where a cache has grown further than others, zeros fill these up."""
    sizes = [max(size) for size in zip(*(part.shape[1:] for part in parts), strict=True)]
    return torch.cat([_filled_up(part, sizes) for part in parts])


def _filled_up(x: Tensor, sizes: list[int]) -> Tensor:
    missing = [want - have for have, want in zip(x.shape[1:], sizes, strict=True)]
    return F.pad(x, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else x
