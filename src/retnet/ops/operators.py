"""Retention's custom operators: chunkwise forward and backward, and decoding step, of the backends torch, numba, triton.

All backends have the same schemas, fake kernels and rules of differentiation, defined here once. With a constant decay
retention is linear in each of q, k, v and the state, so every derivative, of any order, is made of its forward and
backward pass again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retnet.ops import chunkwise, library
from retnet.ops.chunkwise import initial_state
from retnet.ops.cpu import chunkwise_numba, decode
from retnet.ops.torch_private import keep
from retnet.ops.triton import operators as triton
from retnet.ops.triton import tile_table

ANY = "CompositeExplicitAutograd"
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of q, k, v and the state

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? state, Tensor? cu_seqlens"
_FORWARD = f"({_INPUTS}, float scale, SymInt chunk, bool keep_states) -> (Tensor, Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor d_out, Tensor? d_final, {_INPUTS}, Tensor? snapshots, float scale, SymInt chunk)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_STEP = (
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor(a!) state, Tensor? slots, float scale) -> Tensor"
)


class Operators(NamedTuple):
    """Of one backend.

    Attributes:
        forward: forward(q, k, v, log_decay, state, cu_seqlens, scale, chunk, keep_states): output [B,T,H,V] in v's type,
            final state, and the states at chunk boundaries, empty unless they are kept.
        backward: backward(d_out, d_final, q, k, v, log_decay, state, cu_seqlens, snapshots, scale, chunk): gradients of
            q, k, v and the state.
        step: step(q, k, v, log_decay, state, slots, scale): output; the state changes in place.
    """

    forward: Any
    backward: Any
    step: Any


class _Call(NamedTuple):
    """What forward and backward pass of one call share, besides q, k, v and the state."""

    ops: Operators
    log_decay: Tensor
    cu_seqlens: Tensor | None
    scale: float
    chunk: int

    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        shared = (self.log_decay, state, self.cu_seqlens, self.scale, self.chunk)
        out, final, _ = self.ops.forward(q, k, v, *shared, False)
        return out, final

    def backward(
        self,
        d_out: Tensor,
        d_final: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor | None,
        snapshots: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shared = (self.log_decay, state, self.cu_seqlens, snapshots, self.scale, self.chunk)
        found: tuple[Tensor, Tensor, Tensor, Tensor] = self.ops.backward(d_out, d_final, q, k, v, *shared)
        return found

    def forward_along(self, inputs: Gradients, directions: Gradients) -> list[Tensor | None]:
        """The change of output and final state, when q, k, v and the state change in these directions."""
        q, k, v, state = inputs
        a, b, c, e = directions
        assert q is not None and k is not None and v is not None  # noqa: PT018
        found: list[tuple[Tensor | None, Tensor | None]] = []
        if a is not None:
            found.append((self.forward(a, k, v, state)[0], None))
        if b is not None or e is not None:
            found.append(self.forward(q, torch.zeros_like(k) if b is None else b, v, e))
        if c is not None:
            found.append(self.forward(q, k, c, None))
        return [_sum(part) for part in zip(*found, strict=True)] if found else [None, None]

    def backward_along(
        self, d_out: Tensor | None, d_final: Tensor | None, inputs: Gradients, directions: Gradients
    ) -> list[Tensor | None]:
        """The change of the gradients of q, k, v and the state, when these change in these directions."""
        q, k, v, state = inputs
        a, b, c, e = directions
        assert q is not None and k is not None and v is not None  # noqa: PT018
        d_out = torch.zeros_like(v) if d_out is None else d_out
        found: list[Gradients] = []
        if a is not None:
            _, dk, dv, d_state = self.backward(d_out, None, a, k, v, state)
            found.append((None, dk, dv, None if state is None else d_state))
        if b is not None or e is not None:
            along = torch.zeros_like(k) if b is None else b
            dq, _, dv, _ = self.backward(d_out, d_final, q, along, v, e)
            found.append((dq, None, dv if b is not None else None, None))
        if c is not None:
            dq, dk, _, _ = self.backward(d_out, d_final, q, k, c, None)
            found.append((dq, dk, None, None))
        return [_sum(part) for part in zip(*found, strict=True)] if found else [None] * 4


def _sum(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    given = [x for x in parts if x is not None]
    return sum(given[1:], given[0]) if given else None


def _define(
    backend: str,
    keys: tuple[str, ...],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    step: Callable[..., Any],
) -> Operators:
    """The three operators of a backend, for types of device or `ANY`."""
    name = f"retention_chunkwise_{backend}"

    def each(kernel: Callable[..., Any]) -> Mapping[str, Callable[..., Any]]:
        return dict.fromkeys(keys, kernel)

    def call(ctx: Any, log_decay: Tensor, cu_seqlens: Tensor | None) -> _Call:  # noqa: ANN401
        return _Call(made, log_decay, cu_seqlens, ctx.scale, ctx.chunk)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
        *tensors, ctx.scale, ctx.chunk, keep_states = inputs
        ctx.mark_non_differentiable(output[2])
        keep(ctx, *tensors, output[2] if keep_states else None)

    def gradients(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, _: object) -> Any:  # noqa: ANN401
        q, k, v, log_decay, state, cu_seqlens, snapshots = ctx.saved_tensors
        _refuse_decay(ctx.needs_input_grad[3])
        d_out = torch.zeros_like(v) if d_out is None else d_out
        run = call(ctx, log_decay, cu_seqlens)
        dq, dk, dv, d_state = run.backward(d_out, d_final, q, k, v, state, snapshots)
        return dq, dk, dv, None, None if state is None else d_state, *[None] * 4

    def tangents(ctx: Any, *along: Tensor | None) -> Any:  # noqa: ANN401
        q, k, v, log_decay, state, cu_seqlens, _ = ctx.saved_tensors
        a, b, c, d_log_decay, e, *_ = along
        _refuse_decay(d_log_decay is not None)
        run = call(ctx, log_decay, cu_seqlens)
        out, final = run.forward_along((q, k, v, state), (a, b, c, e))
        zeros = initial_state(q, v, None, cu_seqlens) if final is None else final
        return torch.zeros_like(v) if out is None else out, zeros, None

    def save_backward(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ANN401
        *tensors, _, ctx.scale, ctx.chunk = (
            inputs  # but for the snapshots, which k, v and the state determine
        )
        keep(ctx, *tensors)

    def second_gradients(ctx: Any, *cotangents: Tensor | None) -> Any:  # noqa: ANN401
        d_out, d_final, q, k, v, log_decay, state, cu_seqlens = ctx.saved_tensors
        _refuse_decay(ctx.needs_input_grad[5])
        run, inputs = call(ctx, log_decay, cu_seqlens), (q, k, v, state)
        a, b, c, e = cotangents
        out, final = run.forward_along(inputs, (a, b, c, e))
        dq, dk, dv, d_state = run.backward_along(d_out, d_final, inputs, (a, b, c, e))
        final = None if d_final is None else final
        return out, final, dq, dk, dv, None, d_state, *[None] * 4

    def second_tangents(ctx: Any, *along: Tensor | None) -> Any:  # noqa: ANN401
        d_out, d_final, q, k, v, log_decay, state, cu_seqlens = ctx.saved_tensors
        t_out, t_final, a, b, c, d_log_decay, e, *_ = along
        _refuse_decay(d_log_decay is not None)
        run, inputs = call(ctx, log_decay, cu_seqlens), (q, k, v, state)
        changes = run.backward_along(d_out, d_final, inputs, (a, b, c, e))
        if t_out is not None or t_final is not None:
            linear = run.backward(torch.zeros_like(v) if t_out is None else t_out, t_final, *inputs)
            changes = [_sum(pair) for pair in zip(changes, linear, strict=True)]
        like = (q, k, v, initial_state(q, v, state, cu_seqlens))
        return tuple(torch.zeros_like(x) if y is None else y for x, y in zip(like, changes, strict=True))

    def fake_forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *rest: Any) -> Any:  # noqa: ANN401
        state, cu_seqlens, _, chunk, keep_states = rest
        final = initial_state(q, v, state, cu_seqlens)
        if not (keep_states and backend == "triton"):
            return v.new_empty(v.shape), final, final.new_empty(0)
        documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
        total = tile_table.count_chunks(q.shape[0], q.shape[1], documents, chunk)
        kept = q.new_empty(total, *final.shape[1:], dtype=tile_table.snapshot_dtype(q.dtype))
        return v.new_empty(v.shape), final, kept

    rules = library.Derivatives(save, gradients, tangents, lambda *x: _fold(made.forward, _SIDES, *x))
    rules_of_backward = library.Derivatives(
        save_backward, second_gradients, second_tangents, lambda *x: _fold(made.backward, _SIDES_BACKWARD, *x)
    )
    made = Operators(
        library.define(name, _FORWARD, each(forward), fake_forward, rules, casts=3),
        library.define(f"{name}_backward", _BACKWARD, each(backward), _fake_backward, rules_of_backward),
        library.define(f"retention_step_{backend}", _STEP, each(step), _fake_step),
    )
    return made


def _refuse_decay(wanted: bool) -> None:
    if wanted:
        raise NotImplementedError(
            "a derivative of log_decay is wanted, which explicit backward passes do not compute; use backend 'reference'"
        )


# Where the heads of each tensor are: under vmap the batch becomes more heads, which takes any packing and any decay along.
_SIDES = (2, 2, 2, 0, 1, None, None, None, None), (2, 1, 1)
_SIDES_BACKWARD = (2, 1, 2, 2, 2, 0, 1, None, 1, None, None), (2, 2, 2, 1)


def _fold(op: Any, sides: Any, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:  # noqa: ANN401
    """The rule of `torch.vmap`: n calls with H heads each are one call with n·H heads."""
    folded, n = [], info.batch_size
    for x, dim, heads in zip(inputs, in_dims, sides[0], strict=True):
        if dim is not None and heads is None:
            raise NotImplementedError("torch.vmap over cu_seqlens of retention; call it for each packing")
        if heads is None or x is None:
            folded.append(x)
            continue
        x = x.movedim(dim, heads) if dim is not None else x.unsqueeze(heads).expand(*_with(x.shape, heads, n))
        folded.append(x.flatten(heads, heads + 1))
    outputs = op(*folded)
    dims = tuple(heads if x.dim() > heads else None for x, heads in zip(outputs, sides[1], strict=True))
    pairs = zip(outputs, dims, strict=True)
    return tuple(x if d is None else x.unflatten(d, (n, x.shape[d] // n)) for x, d in pairs), dims


def _with(shape: torch.Size, place: int, size: int) -> list[int]:
    return [*shape[:place], size, *shape[place:]]


def _fake_backward(d_out: Tensor, d_final: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    q, k, v, _, _, cu_seqlens, *_ = inputs
    return *(x.new_empty(x.shape) for x in (q, k, v)), initial_state(q, v, None, cu_seqlens)


def _fake_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    return v.new_empty(v.shape)


TORCH = _define("torch", (ANY,), chunkwise.forward, chunkwise.backward, chunkwise.step)
NUMBA = _define("numba", ("cpu",), chunkwise_numba.forward, chunkwise_numba.backward, decode.step)
TRITON = _define(
    "triton", ("cuda", "cpu"), triton.forward, triton.backward, triton.decode
)  # cpu: interpreted
