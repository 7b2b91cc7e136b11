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
from retnet.ops.dispatch import Implementation, Op
from retnet.ops.torch_private import is_batched, onednn_linear, plain

MANY_ROWS = 64  # from here on oneDNN is the faster one


def product(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x Wᵀ: x [...,K] and weight [N,K] → [...,N]; differentiable, any type, any device.

    With a `scale` [N] in fp32, the weight is int8, and W is its rows times their scales.
    """
    out: Tensor = _LINEAR.choose("auto", x, weight, scale)(x, weight, scale)
    return out


def gemm(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """`product` by torch's libraries alone: oneDNN for many rows of fp32 on a CPU, else what `F.linear` takes."""
    if scale is not None and x.dtype is torch.float32:
        return (
            gemm(x, weight.float()) * scale
        )  # int8 times fp32 would be a pass over all weights, and a slow one
    if scale is not None:
        weight = (weight * scale[:, None]).to(x.dtype)
    if (
        plain()
        and not torch.is_autocast_enabled("cpu")
        and x.dtype is torch.float32
        and x.is_cpu
        and x.numel() >= MANY_ROWS * x.shape[-1]
        and onednn_linear is not None
        and torch.backends.mkldnn.enabled
    ):
        return _ManyRows.apply(x, weight)  # type: ignore[no-untyped-call]  # torch has no types here
    return F.linear(x, weight)


class _ManyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # noqa: ANN401
        assert onednn_linear is not None
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        dx = input_gradient(grad, weight) if ctx.needs_input_grad[0] else None
        return dx, weight_gradient(grad, x) if ctx.needs_input_grad[1] else None


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad W in the type of grad: grad [...,N] and weight [N,K] → [...,K]."""
    weight = weight.to(grad.dtype)
    return grad @ weight if is_batched(grad) else gemm(grad, weight.t())


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """gradᵀ x in the type of the product: grad [...,N] and x [...,K] → [N,K]."""
    # not `flatten`: gradients that come batched have no rule for it
    return grad.reshape(-1, grad.shape[-1]).t() @ x.to(grad.dtype).reshape(-1, x.shape[-1])


# The row of the dispatch table; arguments: x, weight, scale.


def _reference(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    return F.linear(x, weight if scale is None else (weight * scale[:, None]).to(x.dtype))


_LINEAR = Op(
    "linear",
    numba=Implementation(decode.skinny_gemm, decode.no_skinny_gemm, auto_on="cpu", differentiable=False),
    torch=Implementation(gemm),
    triton=Implementation(gemm),
    reference=Implementation(_reference),
)
