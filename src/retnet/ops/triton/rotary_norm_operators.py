"""The operators around retention for backend "triton": rotation of queries and keys, head norm with gate.

They keep types as they are, so autocast has nothing to say: what it narrowed comes in narrow. Triton is imported when one
of them first runs.
"""

# ruff: noqa: ANN401 (torch's contexts of derivatives take any attribute, and its operators any argument)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.ops import library
from retnet.ops.torch_private import is_batched, keep

DEVICES = ("cuda", "cpu")  # on the CPU in Triton's interpreter
INSTEAD = "backend 'torch'"  # of whoever wants a derivative that the kernels lack


def _launched(name: str) -> Callable[..., Any]:
    """A pass of `rotary_norm_launch`, which imports Triton."""

    def run(*arguments: Any) -> Any:
        from retnet.ops.triton import rotary_norm_launch

        return getattr(rotary_norm_launch, name)(*arguments)

    return run


def _fake_rotary(
    q: Tensor, k: Tensor, position: Tensor, theta: Tensor, interleaved: bool, backwards: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_norm(o: Tensor, gate: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    kind = rest[3]
    rstd = o.new_empty(o.shape[:-1], dtype=torch.float32)
    mean = rstd.new_empty(rstd.shape if kind == "group" else (0,))
    y = o.flatten(-2) if gate is None else gate
    return y.new_empty(y.shape), mean, rstd


def _fake_norm_backward(d_out: Tensor, o: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(o.new_empty(0) if x is None else x.new_empty(x.shape) for x in (o, *rest[:3]))


def _save_rotary(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    _, _, position, theta, ctx.interleaved, ctx.backwards = inputs
    keep(ctx, position, theta)


def _turn_back(ctx: Any, d_q: Tensor | None, d_k: Tensor | None) -> tuple[Tensor | None, ...]:
    """The transpose of a rotation is the rotation by the opposite angle."""
    position, theta = ctx.saved_tensors
    if ctx.needs_input_grad[3]:
        _refuse("theta")
    return *_turn_some(d_q, d_k, position, theta, ctx.interleaved, not ctx.backwards), *[None] * 4


def _turn_along(ctx: Any, t_q: Tensor | None, t_k: Tensor | None, *rest: Any) -> Any:
    position, theta = ctx.saved_tensors
    if rest[1] is not None:
        _refuse("theta")
    return _turn_some(t_q, t_k, position, theta, ctx.interleaved, ctx.backwards)


def _turn_some(q: Tensor | None, k: Tensor | None, *rest: Any) -> Any:
    """Both turned, where one is None as zeros."""
    given = q if q is not None else k
    if given is None:
        return None, None
    return rotary(*(torch.zeros_like(given) if x is None else x for x in (q, k)), *rest)


def _refuse(name: str) -> None:
    raise NotImplementedError(
        f"a derivative of {name} is wanted, which the kernel does not compute; use {INSTEAD}"
    )


def _rotary_of_many(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
    """The rule of `torch.vmap`: one more dimension of tokens; the angles are given to each."""
    q, k, position, theta, *rest = inputs
    if in_dims[3] is not None:
        raise NotImplementedError(f"torch.vmap over theta of a rotation; use {INSTEAD}")
    n = info.batch_size
    q, k, position = (_first(x, dim, n) for x, dim in zip((q, k, position), in_dims, strict=False))
    position = position.expand(q.shape[:-2]).flatten(0, 1)
    turned = rotary(q.flatten(0, 1), k.flatten(0, 1), position, theta, *rest)
    return tuple(x.unflatten(0, (n, -1)) for x in turned), (0, 0)


def _first(x: Tensor, dim: int | None, n: int) -> Tensor:
    """The batch in front: [n,...]."""
    return x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0)


def norm_by_torch(
    o: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
    kind: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel computes, in torch's operators: for second derivatives, and for those of `torch.func`."""
    y = o.float()
    spread = torch.ones_like(y[..., 0]) if sums is None else sums.float().expand(o.shape[:-1])
    mean = y.mean(-1) if kind == "group" else y.new_empty(0)
    if kind == "group":
        y = y - mean[..., None]
    rstd = (spread if kind == "none" else y.square().mean(-1) + eps * spread).rsqrt()
    y = (y * rstd[..., None]).flatten(-2)
    y = y if weight is None else y * weight.float()
    y = y if bias is None else y + bias.float()
    y = y if gate is None else y * F.silu(gate.float())
    return y.to((o if gate is None else gate).dtype), mean, rstd


def _norm_of(
    ctx: Any,
    given: list[Tensor | None],
) -> tuple[Callable[..., Tensor], list[int]]:
    """The normalised heads as a function of those inputs that are there, and which these are."""
    there = [i for i, x in enumerate(given) if x is not None]

    def function(*some: Tensor) -> Tensor:
        o, gate, weight, bias, sums = (dict(zip(there, some, strict=True)).get(i) for i in range(5))
        assert o is not None
        return norm_by_torch(o, gate, weight, bias, sums, ctx.kind, ctx.eps)[0]

    return function, there


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.kind, ctx.eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    keep(ctx, *tensors, *output[1:])


def _norm_gradients(ctx: Any, d_out: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    *inputs, mean, rstd = ctx.saved_tensors
    found: list[Tensor | None] = [None] * 7
    if d_out is None:
        return tuple(found)
    if torch.is_grad_enabled() or is_batched(d_out):  # a derivative of this one is wanted, or many of it
        function, there = _norm_of(ctx, inputs)
        for i, d in zip(there, torch.func.vjp(function, *(inputs[i] for i in there))[1](d_out), strict=True):
            found[i] = d
        return tuple(found)
    if ctx.needs_input_grad[4]:
        _refuse("sums")
    o, gate, weight, bias, _ = inputs
    gradients = head_norm_backward(d_out, o, gate, weight, bias, mean, rstd, ctx.kind)
    return *(None if x is None else d for x, d in zip(inputs, gradients, strict=False)), None, None, None


rotary = library.define(
    "rotary_triton",
    "(Tensor q, Tensor k, Tensor position, Tensor theta, bool interleaved, bool backwards) -> (Tensor, Tensor)",
    dict.fromkeys(DEVICES, _launched("rotary_pass")),
    _fake_rotary,
    library.Derivatives(_save_rotary, _turn_back, _turn_along, _rotary_of_many),
)
head_norm = library.define(
    "head_norm_triton",
    "(Tensor o, Tensor? gate, Tensor? weight, Tensor? bias, Tensor? sums, str kind, float eps) -> (Tensor, Tensor, Tensor)",
    dict.fromkeys(DEVICES, _launched("norm_pass")),
    _fake_norm,
    library.Derivatives(_save_norm, _norm_gradients, *library.refusals("head_norm_triton", INSTEAD)[2:]),
)
head_norm_backward = library.define(
    "head_norm_triton_backward",
    "(Tensor d_out, Tensor o, Tensor? gate, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, str kind)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    dict.fromkeys(DEVICES, _launched("norm_backward_pass")),
    _fake_norm_backward,
    instead=INSTEAD,
)
