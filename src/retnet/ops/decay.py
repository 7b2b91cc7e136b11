"""Decay schedules: the γ of each head, as natural logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

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
