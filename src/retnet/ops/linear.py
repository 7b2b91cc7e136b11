"""Matrix products with weights (GEMM, x Wᵀ): oneDNN for many rows, skinny GEMM for few, MKL between.

On the CPU torch's fp32 products come from MKL. With many rows oneDNN, which torch carries as well, runs x Wᵀ and its
gradient in x 1.3 to 1.4 times faster on AMD's processors (the gradient in W not); with a few rows, which is decoding,
MKL reads the weights at a third of the memory's speed, and the kernels of `retnet.ops.cpu.decode` take over.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.ops.cpu import decode
from retnet.ops.torch_private import onednn_linear, plain

MANY_ROWS = 64  # from here on oneDNN is the faster one


def product(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x Wᵀ: x [...,K] and weight [N,K] → [...,N]; differentiable, any type, any device.

    With a `scale` [N] in fp32, the weight is int8, and W is its rows times their scales.
    """
    decoding = not torch.is_grad_enabled() and _eager_fp32(x)
    if decoding and (out := decode.few_rows(x, weight, scale)) is not None:
        return out
    if scale is not None:
        weight = (weight * scale[:, None]).to(x.dtype)
    if _suits_onednn(x):
        return _ManyRows.apply(x, weight)  # type: ignore[no-untyped-call]
    return F.linear(x, weight)


def _eager_fp32(x: Tensor) -> bool:
    """fp32 on a CPU, neither traced, nor transformed, nor under autocast: all have their own ways."""
    return (
        x.dtype is torch.float32
        and x.device.type == "cpu"
        and plain()
        and not torch.is_autocast_enabled("cpu")
    )


_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def _suits_onednn(x: Tensor) -> bool:
    many = x.numel() >= MANY_ROWS * x.shape[-1]
    return bool(many and _HAS_ONEDNN and _eager_fp32(x) and torch.backends.mkldnn.enabled)


def gemm(x: Tensor, weight: Tensor) -> Tensor:
    """`product` with many rows, not differentiable where oneDNN is the faster one."""
    return _onednn(x, weight) if _suits_onednn(x) else F.linear(x, weight)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return onednn_linear(x, weight)


class _ManyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = product(grad, weight.t()) if torch.is_grad_enabled() else gemm(grad, weight.t())
        if ctx.needs_input_grad[1]:
            dw = weight_gradient(grad, x)
        return dx, dw


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """gradᵀ x in the type of the product: grad [...,N] and x [...,K] → [N,K]."""
    return grad.flatten(0, -2).t() @ x.to(grad.dtype).flatten(0, -2)
