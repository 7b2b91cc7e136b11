"""LayerNorm and RMSNorm over the width of the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """LayerNorm or RMSNorm with affine weights; statistics in fp32 or better."""

    def __init__(self, width: int, kind: str, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        """x [...,D] → [...,D] in the type of x."""
        return self.normalised(x, self.weight, self.bias)

    def normalised(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As `forward`, with other weights [D] than its own."""
        if bias is None:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            return F.rms_norm(wide, weight.shape, eps=self.eps).to(x.dtype) * weight
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)  # statistics in fp32 inside
