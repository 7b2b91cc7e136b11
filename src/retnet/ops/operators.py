"""Retention's custom operators: chunkwise forward and backward, and decoding step, of the backends torch, numba, triton.

All backends have the same schemas, fake kernels and rules of differentiation, defined here once. With a constant decay
retention is linear in each of q, k, v and the state, so every derivative, of any order, is made of its forward and
backward pass again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retnet.ops import chunkwise, library
from retnet.ops.cpu import chunkwise_numba, decode
from retnet.ops.inputs import RetentionInputs
from retnet.ops.torch_private import keep
from retnet.ops.triton import operators as triton
from retnet.ops.triton import tile_table

ANY = "CompositeExplicitAutograd"
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of q, k, v and the state

INPUTS = len(RetentionInputs._fields)
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? state, Tensor? cu_seqlens"
_FORWARD = f"({_INPUTS}, float scale, SymInt chunk, bool keep_states) -> (Tensor, Tensor, Tensor)"
_BACKWARD = (
    f"({_INPUTS}, float scale, SymInt chunk, Tensor d_out, Tensor? d_final, Tensor? snapshots)"
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
        backward: backward(q, k, v, log_decay, state, cu_seqlens, scale, chunk, d_out, d_final, snapshots): gradients of
            q, k, v and the state.
        step: step(q, k, v, log_decay, state, slots, scale): output; the state changes in place.
    """

    forward: Any
    backward: Any
    step: Any


class _Call(NamedTuple):
    """One call of the operators of a backend, to be made again with some of its tensors changed."""

    ops: Operators
    inputs: RetentionInputs
    chunk: int

    def forward(self, **changed: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        out, final, _ = self.ops.forward(*self.inputs._replace(**changed), self.chunk, False)
        return out, final

    def backward(
        self,
        d_out: Tensor,
        d_final: Tensor | None,
        snapshots: Tensor | None = None,
        **changed: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = self.inputs._replace(**changed)
        found: tuple[Tensor, Tensor, Tensor, Tensor] = self.ops.backward(
            *inputs, self.chunk, d_out, d_final, snapshots
        )
        return found

    def forward_along(self, directions: Gradients) -> list[Tensor | None]:
        """The change of output and final state, when q, k, v and the state change in these directions."""
        a, b, c, e = directions
        found: list[tuple[Tensor | None, Tensor | None]] = []
        if a is not None:
            found.append((self.forward(q=a)[0], None))
        if b is not None or e is not None:
            found.append(self.forward(k=torch.zeros_like(self.inputs.k) if b is None else b, state=e))
        if c is not None:
            found.append(self.forward(v=c, state=None))
        return [_sum(part) for part in zip(*found, strict=True)] if found else [None, None]

    def backward_along(
        self, d_out: Tensor | None, d_final: Tensor | None, directions: Gradients
    ) -> list[Tensor | None]:
        """The change of the gradients of q, k, v and the state, when these change in these directions."""
        a, b, c, e = directions
        d_out = torch.zeros_like(self.inputs.v) if d_out is None else d_out
        found: list[Gradients] = []
        if a is not None:
            _, dk, dv, d_state = self.backward(d_out, None, q=a)
            found.append((None, dk, dv, None if self.inputs.state is None else d_state))
        if b is not None or e is not None:
            along = torch.zeros_like(self.inputs.k) if b is None else b
            dq, _, dv, _ = self.backward(d_out, d_final, k=along, state=e)
            found.append((dq, None, dv if b is not None else None, None))
        if c is not None:
            dq, dk, _, _ = self.backward(d_out, d_final, v=c, state=None)
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

    def recorded(kernel: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *flat: kernel(RetentionInputs(*flat[:INPUTS]), *flat[INPUTS:])

    def call(ctx: Any) -> tuple[_Call, Sequence[Any]]:  # noqa: ANN401
        """The call whose derivative is wanted, and what else it saved; saved tensors may be looked at once."""
        saved = ctx.saved_tensors
        inputs = RetentionInputs(*(*saved[: INPUTS - 1], ctx.scale))
        return _Call(made, inputs, ctx.chunk), saved[INPUTS - 1 :]

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
        *tensors, ctx.scale, ctx.chunk, keep_states = inputs
        ctx.mark_non_differentiable(output[2])
        keep(ctx, *tensors, output[2] if keep_states else None)

    def gradients(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, _: object) -> Any:  # noqa: ANN401
        _refuse_decay(ctx.needs_input_grad[3])
        run, (snapshots,) = call(ctx)
        d_out = torch.zeros_like(run.inputs.v) if d_out is None else d_out
        dq, dk, dv, d_state = run.backward(d_out, d_final, snapshots)
        return dq, dk, dv, None, None if run.inputs.state is None else d_state, *[None] * 4

    def tangents(ctx: Any, *along: Tensor | None) -> Any:  # noqa: ANN401
        a, b, c, d_log_decay, e, *_ = along
        _refuse_decay(d_log_decay is not None)
        run, _ = call(ctx)
        out, final = run.forward_along((a, b, c, e))
        zeros = run.inputs._replace(state=None).fresh_state() if final is None else final
        return torch.zeros_like(run.inputs.v) if out is None else out, zeros, None

    def save_backward(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ANN401
        *tensors, ctx.scale, ctx.chunk, d_out, d_final, _ = (
            inputs  # the snapshots follow from k, v and the state
        )
        keep(ctx, *tensors, d_out, d_final)

    def second_gradients(ctx: Any, *cotangents: Tensor | None) -> Any:  # noqa: ANN401
        _refuse_decay(ctx.needs_input_grad[3])
        run, (d_out, d_final) = call(ctx)
        a, b, c, e = cotangents
        out, final = run.forward_along((a, b, c, e))
        dq, dk, dv, d_state = run.backward_along(d_out, d_final, (a, b, c, e))
        final = None if d_final is None else final
        return dq, dk, dv, None, d_state, None, None, None, out, final, None

    def second_tangents(ctx: Any, *along: Tensor | None) -> Any:  # noqa: ANN401
        a, b, c, d_log_decay, e, _, _, _, t_out, t_final, _ = along
        _refuse_decay(d_log_decay is not None)
        run, (d_out, d_final) = call(ctx)
        changes = run.backward_along(d_out, d_final, (a, b, c, e))
        like = (*run.inputs[:3], run.inputs.fresh_state())
        if t_out is not None or t_final is not None:
            linear = run.backward(torch.zeros_like(like[2]) if t_out is None else t_out, t_final)
            changes = [_sum(pair) for pair in zip(changes, linear, strict=True)]
        return tuple(torch.zeros_like(x) if y is None else y for x, y in zip(like, changes, strict=True))

    def fake_forward(x: RetentionInputs, chunk: int, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
        final, out = x.fresh_state(), x.v.new_empty(x.v.shape)
        if not (keep_states and backend == "triton"):
            return out, final, final.new_empty(0)
        documents = None if x.cu_seqlens is None else x.sequences
        total = tile_table.count_chunks(x.q.shape[0], x.q.shape[1], documents, chunk)
        kept = x.q.new_empty(total, *final.shape[1:], dtype=tile_table.snapshot_dtype(x.q.dtype))
        return out, final, kept

    rules = library.Derivatives(save, gradients, tangents, lambda *x: _fold(made.forward, _SIDES, *x))
    rules_of_backward = library.Derivatives(
        save_backward, second_gradients, second_tangents, lambda *x: _fold(made.backward, _SIDES_BACKWARD, *x)
    )
    made = Operators(
        library.define(name, _FORWARD, each(recorded(forward)), recorded(fake_forward), rules, casts=3),
        library.define(
            f"{name}_backward",
            _BACKWARD,
            each(recorded(backward)),
            recorded(_fake_backward),
            rules_of_backward,
        ),
        library.define(
            f"retention_step_{backend}",
            _STEP,
            each(step),
            _fake_step,
            instead="`retention`, or backend 'reference'",
        ),
    )
    return made


def _refuse_decay(wanted: bool) -> None:
    if wanted:
        raise NotImplementedError(
            "a derivative of log_decay is wanted, which explicit backward passes do not compute; use backend 'reference'"
        )


# Where the heads of each tensor are: under vmap the batch becomes more heads, which takes any packing and any decay along.
_SIDES = (2, 2, 2, 0, 1, None, None, None, None), (2, 1, 1)
_SIDES_BACKWARD = (2, 2, 2, 0, 1, None, None, None, 2, 1, 1), (2, 2, 2, 1)


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


def _fake_backward(x: RetentionInputs, *_: object) -> tuple[Tensor, ...]:
    return *(y.new_empty(y.shape) for y in x[:3]), x._replace(state=None).fresh_state()


def _fake_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    return v.new_empty(v.shape)


TORCH = _define("torch", (ANY,), chunkwise.forward, chunkwise.backward, chunkwise.step)
NUMBA = _define("numba", ("cpu",), chunkwise_numba.forward, chunkwise_numba.backward, decode.step)
TRITON = _define(
    "triton", ("cuda", "cpu"), triton.forward, triton.backward, triton.decode
)  # cpu: interpreted
