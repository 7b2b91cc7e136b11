"""Rotary position embedding (RoPE) as a module: cos and sin made once for all layers of a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from retnet.ops import apply_rotary, computes_angles, frequencies, positions, rotation
from retnet.settings import UserError

Rotation = Literal["interleaved", "halves", "none"]


class Positions(NamedTuple):
    """Positions of the tokens of one pass, with cos and sin of their rotary angles: position embeddings, made once.

    The first two dimensions are those of the tokens, or 1 where all rows of a batch share them.
    """

    position: Tensor  # int64 [B,T], or [B] for a step
    cos: Tensor | None  # [B,T,K/2], fp32 or fp64; None where nothing is rotated, or a kernel makes its own
    sin: Tensor | None

    def first(self, length: int) -> Positions:
        """Those of the first tokens of every row."""
        return Positions(*(None if x is None else x[:, :length] for x in self))  # type: ignore[arg-type]  # `position` is there


class Rotary(nn.Module):
    """Turns pairs of queries and keys by position. The angles keep their precision whatever becomes of the weights.

    Args:
        key_dim: K, of a head.
        layout: see `retnet.ops.rotate`; ``"none"`` turns nothing.
        base: see `retnet.ops.frequencies`.
        spacing: as there.
        backend: see `retnet.ops.apply_rotary`.
        turned: R, how many numbers of a head turn, the first ones; all of them by default.

    Raises:
        UserError: numbers that turn are not pairs of those of a head.
    """

    theta: Tensor  # [R/2] fp64, empty where nothing is turned

    def __init__(
        self,
        key_dim: int,
        layout: Rotation,
        base: float,
        spacing: Literal["inclusive", "geometric"] = "geometric",
        backend: str = "auto",
        turned: int | None = None,
    ) -> None:
        super().__init__()
        if turned is not None and layout == "none":
            raise UserError(
                f"rotary_dim is {turned}, but rotary = 'none' turns nothing; leave out one of them"
            )
        if turned is not None and (turned % 2 or not 0 < turned <= key_dim):
            raise UserError(
                f"rotary_dim is {turned}; rotation turns pairs of the {key_dim} numbers of a head, so make it even and at "
                f"most {key_dim}"
            )
        if layout != "none" and turned is None and key_dim % 2:
            raise UserError(
                f"heads have width {key_dim}, which is odd, and rotation turns pairs; "
                "change num_heads or set rotary = 'none'"
            )
        self.key_dim, self.layout, self.base, self.spacing = key_dim, layout, base, spacing
        self.backend, self.turned = backend, key_dim if turned is None else turned
        self._set_angles(torch.empty(0).device)

    def _frequencies(self) -> Tensor:
        if self.layout == "none":
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        return frequencies(self.turned, self.spacing, self.base)

    def _set_angles(self, device: torch.device) -> None:
        self.register_buffer("theta", self._frequencies().to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
        self._set_angles(self.theta.device)
        return self

    def positions(
        self, x: Tensor, cu_seqlens: Tensor | None = None, start: Tensor | None = None
    ) -> Positions:
        """Of the tokens of x [B,T,D], or [B,D] for a step, which has a `start`; see `retnet.ops.positions`."""
        if x.dim() == 2:
            position = positions(1, start=start)[:, 0].to(x.device)
        else:
            position = positions(x.shape[1], cu_seqlens, start=start, device=x.device).to(x.device)
        if self.layout == "none" or computes_angles(self.backend, x.new_empty(0, self.turned)):
            return Positions(position, None, None)
        here = self.theta.device == x.device  # not so where weights wait on a disk
        theta = self.theta if here else self._frequencies().to(x.device)
        return Positions(position, *rotation(position, theta, torch.promote_types(x.dtype, torch.float32)))

    def forward(self, q: Tensor, k: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """q, k [...,H,K] at their positions; types stay."""
        if self.layout == "none":
            return q, k
        position, cos, sin = positions
        angles = None if cos is None or sin is None else (cos, sin)
        if self.turned == self.key_dim:
            return apply_rotary(q, k, position, self.theta, self.layout, self.backend, angles)
        turned_q, turned_k = (x[..., : self.turned].contiguous() for x in (q, k))
        turned_q, turned_k = apply_rotary(
            turned_q, turned_k, position, self.theta, self.layout, self.backend, angles
        )
        rest = slice(self.turned, None)
        return torch.cat([turned_q, q[..., rest]], dim=-1), torch.cat([turned_k, k[..., rest]], dim=-1)
