"""Products with weights, by the library that is fastest at each.

On the CPU torch's fp32 products come from MKL. With many rows oneDNN, which torch carries as well, runs x Wᵀ and its
gradient in x 1.3 to 1.4 times faster on AMD's processors (the gradient in W not); with a few rows, which is decoding,
MKL reads the weights at a third of the memory's speed, and the kernels of `retnet.ops.cpu.decode` take over.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from retnet.ops.cpu import decode

MANY_ROWS = 64  # from here on oneDNN is the faster one


def product(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x Wᵀ: x [...,K] and weight [N,K] → [...,N]; differentiable, any type, any device.

    With a `scale` [N] in fp32, the weight is int8, and W is its rows times their scales.
    """
    fast = x.dtype is torch.float32 and x.device.type == "cpu" and _eager()
    if fast and (out := decode.few_rows(x, weight, scale)) is not None:
        return out
    if scale is not None:
        weight = (weight * scale[:, None]).to(x.dtype)
    if fast and x.numel() >= MANY_ROWS * x.shape[-1] and torch.backends.mkldnn.enabled and _HAS_ONEDNN:
        return _ManyRows.apply(x, weight)  # type: ignore[no-untyped-call]
    return F.linear(x, weight)


def _eager() -> bool:
    """Neither traced nor under autocast: both have their own ways."""
    return not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")


_HAS_ONEDNN = torch.backends.mkldnn.is_available()


class _ManyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        dx = _onednn(grad, weight.t()) if ctx.needs_input_grad[0] else None
        dw = grad.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return dx, dw


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
