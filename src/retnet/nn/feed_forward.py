"""The feed-forward network (FFN) of a block, plain or gated."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from retnet.nn.linear import Linear, linear_of


class FeedForward(nn.Module):
    """gelu(x W_1) W_2 (paper §3), or gated: (act(x W_1) ⊙ x W_G) W_2."""

    def __init__(self, d_model: int, width: int, kind: str) -> None:
        super().__init__()
        self.act = F.silu if kind == "swiglu" else F.gelu
        self.fc1 = Linear(d_model, width)
        self.gate = Linear(d_model, width) if kind != "gelu" else None
        self.fc2 = Linear(width, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """x [...,D] → [...,D]."""
        gate = None if self.gate is None else self.gate(x)
        return linear_of(self.fc2, self._hidden, self.fc1(x), gate, lead=x.dim() - 1)

    def _hidden(self, x: Tensor, gate: Tensor | None) -> Tensor:
        return self.act(x) if gate is None else self.act(x) * gate
