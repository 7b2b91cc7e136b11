"""The kernels around retention as operators of torch, as `operators` has those of retention.

They keep types as they are, so autocast has nothing to say: what it narrowed comes in narrow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotary(
    q: Tensor, k: Tensor, position: Tensor, theta: Tensor, interleaved: bool, backwards: bool
) -> tuple[Tensor, Tensor]:
    """q and k [...,H,K] turned by position [...] · θ [K/2], or back by it."""
    from retnet.ops.triton import row_launch

    return row_launch.rotary_pass(q, k, position, theta, interleaved, backwards)


def norm(
    o: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
    kind: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads o [...,H,V] normalised and gated, [...,H·V] in the type of the gate (else of o), and the fp32 statistics."""
    from retnet.ops.triton import row_launch

    return row_launch.norm_pass(o, gate, weight, bias, sums, kind, eps)


def norm_backward(
    d_out: Tensor,
    o: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of o, gate, weight and bias; empty for what is not there."""
    from retnet.ops.triton import row_launch

    return row_launch.norm_backward_pass(d_out, o, gate, weight, bias, mean, rstd, kind)


def _fake_rotary(
    q: Tensor, k: Tensor, position: Tensor, theta: Tensor, interleaved: bool, backwards: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_norm(
    o: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
    kind: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rstd = o.new_empty(o.shape[:-1], dtype=torch.float32)
    mean = rstd.new_empty(rstd.shape if kind == "group" else (0,))
    y = o.flatten(-2) if gate is None else gate
    return y.new_empty(y.shape), mean, rstd


def _fake_norm_backward(
    d_out: Tensor,
    o: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_o, d_gate, d_weight, d_bias = (
        o.new_empty(0) if x is None else x.new_empty(x.shape) for x in (o, gate, weight, bias)
    )
    return d_o, d_gate, d_weight, d_bias


def _save_rotary(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ANN401
    _, _, position, theta, ctx.interleaved, ctx.backwards = inputs
    ctx.save_for_backward(position, theta)


def _turn_back(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """The transpose of a rotation is the rotation by the opposite angle."""
    return *torch.ops.retnet.triton_rotary(
        d_q, d_k, *ctx.saved_tensors, ctx.interleaved, not ctx.backwards
    ), *[None] * 4


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    o, gate, weight, bias, _, ctx.kind, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(o, gate, weight, bias, *output[1:])


def _norm_gradients(ctx: Any, d_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    inputs = ctx.saved_tensors
    found = torch.ops.retnet.triton_norm_backward(d_out, *inputs, ctx.kind)
    return *(None if x is None else d for x, d in zip(inputs, found, strict=False)), None, None, None


torch.library.define(
    "retnet::triton_rotary",
    "(Tensor q, Tensor k, Tensor position, Tensor theta, bool interleaved, bool backwards) -> (Tensor, Tensor)",
)
torch.library.define(
    "retnet::triton_norm",
    "(Tensor o, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? sums, str kind, float eps) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "retnet::triton_norm_backward",
    "(Tensor d_out, Tensor o, Tensor? gate, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, str kind)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
for _device in ("cuda", "cpu"):  # on the CPU in Triton's interpreter
    torch.library.impl("retnet::triton_rotary", _device, rotary)
    torch.library.impl("retnet::triton_norm", _device, norm)
    torch.library.impl("retnet::triton_norm_backward", _device, norm_backward)
torch.library.register_fake("retnet::triton_rotary", _fake_rotary)
torch.library.register_fake("retnet::triton_norm", _fake_norm)
torch.library.register_fake("retnet::triton_norm_backward", _fake_norm_backward)
torch.library.register_autograd("retnet::triton_rotary", _turn_back, setup_context=_save_rotary)
torch.library.register_autograd("retnet::triton_norm", _norm_gradients, setup_context=_save_norm)

# The operators, as everything outside calls them.
apply_rotary = torch.ops.retnet.triton_rotary
head_norm = torch.ops.retnet.triton_norm
