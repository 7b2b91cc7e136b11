"""What several mixers are made of: convolutions, growing caches, rotation, parameters that stay precise."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.ops import apply_rotary, frequencies
from retnet.settings import UserError

Rotation = Literal["interleaved", "halves", "none"]
M = TypeVar("M", bound=nn.Module)


def widened(x: Tensor) -> torch.dtype:
    """The type to compute in: that of x, at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def exactly(x: Tensor) -> AbstractContextManager[object]:
    """A context in which products stay in the type of x, whatever surrounds it."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def head_width(d_model: int, num_heads: int) -> int:
    """Width of one head.

    Raises:
        UserError: the model's width does not divide by the heads.
    """
    if d_model % num_heads:
        raise UserError(f"d_model {d_model} is not a multiple of num_heads {num_heads}; change one")
    return d_model // num_heads


def require_positive(**values: float) -> None:
    """Refuses values that are not above zero.

    Raises:
        UserError: naming the first such value.
    """
    for name, value in values.items():
        if not value > 0:
            least = "at least 1" if isinstance(value, int) else "above 0"
            raise UserError(f"{name} is {value}; it must be {least}")


class Precise(nn.Module):
    """A module whose parameters stay fp32 or better: `.to(bfloat16)` does not round decays and filters."""

    def _apply(self: M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> M:
        def keep(x: Tensor) -> Tensor:
            y = fn(x)
            narrowed = y.is_floating_point() and y.dtype.itemsize < min(x.dtype.itemsize, 4)
            return x.to(y.device) if narrowed else y

        return super()._apply(keep, recurse)  # type: ignore[no-untyped-call]


class Rotary(nn.Module):
    """Turns pairs of queries and keys by position. The angles keep their precision whatever becomes of the weights."""

    theta: Tensor  # [K/2] fp64

    def __init__(self, key_dim: int, layout: Rotation, base: float) -> None:
        super().__init__()
        if layout != "none" and key_dim % 2:
            raise UserError(
                f"heads have width {key_dim}, which is odd, and rotation turns pairs; "
                "change num_heads or set rotary = 'none'"
            )
        self.key_dim, self.layout, self.base = key_dim, layout, base
        self._set_angles(torch.empty(0).device)

    def _set_angles(self, device: torch.device) -> None:
        theta = torch.zeros(0, dtype=torch.float64)
        if self.layout != "none":
            theta = frequencies(self.key_dim, "geometric", self.base)
        self.register_buffer("theta", theta.to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._set_angles(self.theta.device)
        return self

    def forward(self, q: Tensor, k: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """q, k [...,H,K] at int64 `position` [...]; types stay."""
        if self.layout == "none":
            return q, k
        return apply_rotary(q, k, position, self.theta, self.layout)


def fft_convolution(x: Tensor, h: Tensor) -> Tensor:
    """Causal convolution y_t = Σ_{s≤t} h_{t−s} x_s along the last dimension, in O(T log T).

    Args:
        x: [...,T], fp32 or fp64.
        h: a filter of at least T places, its other dimensions broadcast against those of x.

    Returns:
        As x. Rounding knows no order: what comes later leaves traces of the size of the type's ε.
    """
    T = x.shape[-1]
    n = 1 << (2 * T - 1).bit_length()  # no wrapping around; powers of two are fastest
    spectrum = torch.fft.rfft(x, n=n) * torch.fft.rfft(h[..., :T], n=n)
    return torch.fft.irfft(spectrum, n=n)[..., :T]


def fft_flops(length: int) -> int:
    """Operations of `fft_convolution` per token and channel, the filter's own transform counted as for a batch of one."""
    n = 1 << (2 * length - 1).bit_length()
    return round((3 * 2.5 * n * math.log2(n) + 3 * n) / length)


class ShortConvolution(nn.Module):
    """A causal filter of a few taps on each channel: y_t = Σ_{j<taps} w_j x_{t−j}. Computed in fp32 or better."""

    def __init__(self, channels: int, taps: int, std: float) -> None:
        super().__init__()
        self.taps = taps
        self.weight = nn.Parameter(torch.randn(channels, taps) * std)

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B,T,D], with the `taps` − 1 inputs before it [B,taps−1,D] (default: zeros); y [B,T,D] and the next such."""
        wide = widened(x)
        x = x.to(wide)
        x = F.pad(x, (0, 0, self.taps - 1, 0)) if before is None else torch.cat([before.to(wide), x], dim=1)
        after, weight = x[:, x.shape[1] - self.taps + 1 :], self.weight.to(wide).flip(1)
        if x.shape[1] == self.taps:  # one token, which is decoding
            return (x * weight.mT).sum(1, keepdim=True), after
        with exactly(x):
            return F.conv1d(x.mT, weight[:, None], groups=x.shape[2]).mT, after


def append(cache: Tensor, length: Tensor, new: Tensor) -> Tensor:
    """Writes new [B,T,...] behind the first `length` [B] places of each row of a cache [B,S,...].

    Places from a row's length on are never read, so rows of different lengths stand in one cache. It is changed in place
    where there is room and no gradient is wanted; else it is copied. For single tokens it grows by an eighth at a time,
    so that copying costs a constant per token.
    """
    B, T = new.shape[:2]
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


def right_aligned(cache: Tensor, length: Tensor) -> Tensor:
    """The filled places of a cache [B,S,...], [B, max(length), ...], the newest of each row last, zeros before the first."""
    longest = int(length.max())
    cache = cache[:, :longest]
    short = longest - length
    if not short.any():
        return cache
    places = torch.arange(longest, device=length.device) - short[:, None]
    rows = torch.arange(len(length), device=length.device)[:, None]
    empty = (places < 0).view(*places.shape, *[1] * (cache.dim() - 2))
    return cache[rows, places.clamp(min=0)].masked_fill(empty, 0)
