"""Decay schedules, the γ of each head as natural logarithms; and sums of the decays of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = -800.0  # γ is 0 in fp64 from here on

Decay = Literal["paper", "experiments", "alibi", "none"] | float | tuple[float, ...]


def log_decays(decay: Decay | Sequence[float], num_heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """ln γ of each head, [H], computed in fp64 and on the CPU, also where modules are being made on the meta device.

    Args:
        decay: ``"paper"``: γ = 1 − 2^(−5−h), the paper's default (§3); ``"experiments"``: γ = 1 − exp(linspace(ln 1/32,
            ln 1/512, H)), the paper's own runs; ``"alibi"``: γ = exp(−s) with the slopes s of ALiBi (Press et al. 2022),
            2^(−8(h+1)/H) where H is a power of two, as in lightning attention; ``"none"``: γ = 1; a number: that γ for
            every head; a list: one γ a head.
        num_heads: H.
        dtype: of the result, fp32 or fp64; a coarser one would round γ to 1.

    Raises:
        ValueError: an unknown name, a γ outside (0, 1], or a list whose length is not H.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    if decay == "paper":
        # log1p(−2^(−5−h)) keeps what 1 − 2^(−5−h) would round away for many heads
        return torch.log1p(-torch.exp2(-5.0 - torch.arange(num_heads, dtype=torch.float64, device="cpu"))).to(
            dtype
        )
    if decay == "experiments":
        ends = math.log(1 / 32), math.log(1 / 512)
        return torch.log1p(
            -torch.exp(torch.linspace(*ends, num_heads, dtype=torch.float64, device="cpu"))
        ).to(dtype)
    if decay == "alibi":
        return -_alibi_slopes(num_heads).to(dtype)
    if decay == "none":
        return torch.zeros(num_heads, dtype=dtype, device="cpu")
    if isinstance(decay, str):
        raise ValueError(
            f"unknown decay {decay!r}; allowed: 'paper', 'experiments', 'alibi', 'none', a number in (0, 1], or one number "
            "a head"
        )
    gammas = [float(decay)] * num_heads if isinstance(decay, (int, float)) else [float(g) for g in decay]
    if len(gammas) != num_heads:
        raise ValueError(f"decay lists {len(gammas)} values for {num_heads} heads; give one γ a head")
    for gamma in gammas:
        if not 0 < gamma <= 1:
            raise ValueError(f"decay γ = {gamma} is outside (0, 1]")
    return torch.tensor(gammas, dtype=torch.float64, device="cpu").log().to(dtype)


def _alibi_slopes(num_heads: int) -> Tensor:
    """[H] fp64: of a power of two, those of the next lower one, and every second one of the next higher one for the rest."""
    lower = 1 << (num_heads.bit_length() - 1)

    def of_power(heads: int) -> Tensor:
        return torch.exp2(-8.0 * torch.arange(1, heads + 1, dtype=torch.float64, device="cpu") / heads)

    return torch.cat([of_power(lower), of_power(2 * lower)[::2][: num_heads - lower]])


def wide_type(device: torch.device) -> torch.dtype:
    """The type of sums over many tokens: fp64, where the device has it (Apple's has not)."""
    return torch.float32 if device.type == "mps" else torch.float64


def decay_sums(log_decay: Tensor) -> Tensor:
    """Σ_{i<t} ln γ_i for t = 0 … T: the decays of tokens [...,T,H], summed, [...,T+1,H] in `wide_type`.

    The difference of two of them is ln of the product of the γ between. A γ that is 0 counts as e^`LEAST`, so that what
    is added to it is not lost to rounding.
    """
    wide = log_decay.to(wide_type(log_decay.device)).clamp(min=LEAST)
    return F.pad(wide.cumsum(-2), (0, 0, 1, 0))


def sums_between(x: Tensor, begins: Tensor, ends: Tensor) -> Tensor:
    """Σ_{a≤t<b} x_t for pairs a, b of begins and ends, int64 [J]: of x [B,T,H], [B,J,H] in `wide_type`.

    They are differences of sums over all tokens, so a number that is not finite would spoil all after it; it makes those
    NaN that it is in.
    """
    x = x.to(wide_type(x.device))
    finite = x.isfinite()
    sums, broken = (F.pad(y.cumsum(1), (0, 0, 1, 0)) for y in (x.where(finite, 0.0), ~finite))
    found = sums[:, ends] - sums[:, begins]
    return found.masked_fill(broken[:, ends] != broken[:, begins], torch.nan)


def documents_of(length: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Of each of T tokens the document that it is packed in, and where that begins: int64 [T]."""
    bounds = cu_seqlens.long()
    tokens = torch.arange(length, device=bounds.device)
    document = torch.searchsorted(bounds, tokens, right=True) - 1
    return document, bounds[document]
