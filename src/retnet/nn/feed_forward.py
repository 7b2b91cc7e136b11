"""The feed-forward network (FFN) of a block, plain or gated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from retnet.nn.linear import Linear, linear_of
from retnet.nn.narrow import narrow_parameter


class FeedForward(nn.Module):
    """gelu(x W_1) W_2 (paper §3), or gated: (act(x W_1) ⊙ x W_G) W_2.

    Attributes:
        width_axes: of its weights, the axis along which the hidden width lies.
    """

    width_axes: ClassVar[Mapping[str, int]] = {"fc1.weight": 0, "gate.weight": 0, "fc2.weight": 1}

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

    def keep_width(self, begin: int, end: int) -> None:
        """Leaves it this part of its hidden width alone: its output is then that part's summand of the whole's."""
        width = self.fc1.out_features
        for name, axis in self.width_axes.items():
            narrow_parameter(self, name, axis, begin, end, width)

    def _hidden(self, x: Tensor, gate: Tensor | None) -> Tensor:
        return self.act(x) if gate is None else self.act(x) * gate
