"""KV cache that grows, and whose rows have lengths of their own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Cache = Tensor | list[Tensor]  # [B,S,...], or a row [S,...] each that has room for what comes


def append(cache: Cache, length: Tensor, new: Tensor) -> Cache:
    """Writes new [B,T,...] behind the first `length` [B] places of each row of a cache.

    Places from a row's length on are never read, so rows of different lengths stand in one cache. It is changed in place
    where there is room and no gradient is wanted; else it is copied. For single tokens it grows by an eighth at a time,
    so that copying costs a constant per token. A list of rows is always changed in place.
    """
    B, T = new.shape[:2]
    if isinstance(cache, list):
        for row, start, part in zip(cache, length.tolist(), new, strict=True):
            row[start : start + T] = part
        return cache
    need = int(length.max()) + T
    grows = need > cache.shape[1]
    if grows:
        room = need + (need // 8 + 64) * (T == 1)
        grown = cache.new_zeros(B, room, *cache.shape[2:])
        grown[:, : cache.shape[1]] = cache
        cache = grown
    elif torch.is_grad_enabled() and (new.requires_grad or cache.requires_grad):
        cache = cache.clone()
    rows = torch.arange(B, device=length.device)[:, None]
    places = length[:, None] + torch.arange(T, device=length.device)
    cache[rows, places] = new.to(cache.dtype)
    return cache


def right_aligned(cache: Cache, length: Tensor) -> Tensor:
    """The filled places of a cache, [B, max(length), ...], the newest of each row last, zeros before the first."""
    if isinstance(cache, list):
        filled = [row[:count] for row, count in zip(cache, length.tolist(), strict=True)]
        return pad_sequence(filled, True, padding_side="left") if len(filled) > 1 else filled[0][None]
    longest = int(length.max())
    cache = cache[:, :longest]
    short = longest - length
    if not short.any():
        return cache
    places = torch.arange(longest, device=length.device) - short[:, None]
    rows = torch.arange(len(length), device=length.device)[:, None]
    empty = (places < 0).view(*places.shape, *[1] * (cache.dim() - 2))
    return cache[rows, places.clamp(min=0)].masked_fill(empty, 0)
