"""Rotary position embedding of queries and keys, as a module that keeps its angles in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from retnet.ops import apply_rotary, frequencies
from retnet.settings import UserError

Rotation = Literal["interleaved", "halves", "none"]


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
