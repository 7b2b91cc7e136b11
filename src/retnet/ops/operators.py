"""Retention's custom operators: chunkwise forward and backward, and decoding step, of the backends torch, numba, triton.

All backends have the same schemas, fake kernels and rules of differentiation, defined here once. Retention is linear in each
of q, k, v and the state, and the decays between tokens n and m enter as e^(b_n − b_m), b_n the sum of all up to n, so
that their derivatives are products with what else is there (`retnet.ops.decay_derivatives`). So every derivative, of any
order, is made of the forward and backward pass again.
"""

# ruff: noqa: ANN401 (torch's contexts of derivatives take any attribute, and its operators any argument)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retnet.ops import chunkwise, decay_derivatives, library
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
    f"({_INPUTS}, float scale, SymInt chunk, Tensor d_out, Tensor? d_final, Tensor? snapshots,"
    " bool wide) -> (Tensor, Tensor, Tensor, Tensor)"
)
_STEP = (
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor(a!) state, Tensor? slots, float scale) -> Tensor"
)


class Operators(NamedTuple):
    """Of one backend.

    Attributes:
        forward: forward(q, k, v, log_decay, state, cu_seqlens, scale, chunk, keep_states): output [B,T,H,V] in v's type,
            final state, and the states at chunk boundaries, empty unless they are kept.
        backward: backward(q, k, v, log_decay, state, cu_seqlens, scale, chunk, d_out, d_final, snapshots, wide): gradients
            of q, k, v and the state; those of q and k in the state's type if they are to be `wide`.
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

    def forward(self, **changed: Any) -> tuple[Tensor, Tensor]:
        out, final, _ = self.ops.forward(*self.inputs._replace(**changed), self.chunk, False)
        return out, final

    def backward(
        self,
        d_out: Tensor,
        d_final: Tensor | None,
        snapshots: Tensor | None = None,
        wide: bool = False,
        **changed: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = self.inputs._replace(**changed)
        found: tuple[Tensor, Tensor, Tensor, Tensor] = self.ops.backward(
            *inputs, self.chunk, d_out, d_final, snapshots, wide
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

    def forward_along_decay(self, direction: Tensor) -> list[Tensor | None]:
        """The change of output and final state, when the decays change in this direction: that of b_n − b_m."""
        run, v = self._wide(), self.inputs.v
        beta, last = decay_derivatives.running(self.inputs, direction)
        out, final = run.forward()
        less_out, less_final = run.forward(k=_times(run.inputs.k, beta), state=None)
        return [(_times(out, beta) - less_out).to(v.dtype), _times(final, last[..., None]) - less_final]

    def backward_along_decay(
        self, d_out: Tensor, d_final: Tensor | None, direction: Tensor
    ) -> list[Tensor | None]:
        """The change of the gradients of q, k, v and the state, when the decays change in this direction."""
        run = self._wide()
        q, k, v, *_ = run.inputs
        beta, last = decay_derivatives.running(self.inputs, direction)
        d_out = d_out.to(v.dtype)
        dq, dk, _, _ = run.backward(d_out, d_final)
        later = None if d_final is None else _times(d_final, last[..., None])
        _, more_dk, more_dv, d_state = run.backward(d_out, later, q=_times(q, beta))
        less_dq, _, less_dv, _ = run.backward(d_out, d_final, k=_times(k, beta), state=None)
        dv = (more_dv - less_dv).to(self.inputs.v.dtype)
        d_state_or_none = None if self.inputs.state is None else d_state
        return [_times(dq, beta) - less_dq, more_dk - _times(dk, beta), dv, d_state_or_none]

    def _wide(self) -> _Call:
        """The same call in the type of the state: what is left of two large numbers would be their rounding else."""
        x = self.inputs
        wide = torch.promote_types(x.q.dtype, torch.float32)
        return self._replace(inputs=x._replace(q=x.q.to(wide), k=x.k.to(wide), v=x.v.to(wide)))


def _times(x: Tensor, beta: Tensor) -> Tensor:
    """β ⊙ x of β [...] and x [...,·], in the type of x."""
    return (x * beta[..., None]).to(x.dtype)


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

    def call(ctx: Any) -> tuple[_Call, Sequence[Any]]:
        """The call whose derivative is wanted, and what else it saved; saved tensors may be looked at once."""
        saved = ctx.saved_tensors
        inputs = RetentionInputs(*(*saved[: INPUTS - 1], ctx.scale))
        return _Call(made, inputs, ctx.chunk), saved[INPUTS - 1 :]

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.scale, ctx.chunk, keep_states = inputs
        ctx.mark_non_differentiable(output[2])
        keep(ctx, *tensors, output[2] if keep_states else None)

    def gradients(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, _: object) -> Any:
        run, (snapshots,) = call(ctx)
        q, k, v, _, state, *_ = run.inputs
        d_out, wide = torch.zeros_like(v) if d_out is None else d_out, ctx.needs_input_grad[3]
        dq, dk, dv, d_state = run.backward(d_out, d_final, snapshots, wide)
        d_log_decay = None
        if wide:
            pair = (q, k, v, state), (dq, dk, dv, d_state)
            d_log_decay = decay_derivatives.gradient(run.inputs, d_final is not None, pair)
        dq, dk = dq.to(q.dtype), dk.to(k.dtype)
        return dq, dk, dv, d_log_decay, None if state is None else d_state, *[None] * 4

    def tangents(ctx: Any, *along: Tensor | None) -> Any:
        a, b, c, direction, e, *_ = along
        run, _ = call(ctx)
        out, final = run.forward_along((a, b, c, e))
        if direction is not None:
            pairs = zip((out, final), run.forward_along_decay(direction), strict=True)
            out, final = (_sum(pair) for pair in pairs)
        zeros = run.inputs._replace(state=None).fresh_state() if final is None else final
        return torch.zeros_like(run.inputs.v) if out is None else out, zeros, None

    def save_backward(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        # the snapshots follow from k, v and the state
        *tensors, ctx.scale, ctx.chunk, d_out, d_final, _, ctx.wide = inputs
        keep(ctx, *tensors, d_out, d_final)

    def second_gradients(ctx: Any, *cotangents: Tensor | None) -> Any:
        run, (d_out, d_final) = call(ctx)
        along = _narrowed(cotangents, run.inputs)
        out, final = run.forward_along(along)
        dq, dk, dv, d_state = run.backward_along(d_out, d_final, along)
        d_log_decay = None
        if ctx.needs_input_grad[3]:
            values = (*run.inputs[:3], run.inputs.state)
            base = run.backward(d_out, d_final, wide=True)
            d_log_decay = decay_derivatives.gradient(
                run.inputs, d_final is not None, (along, base), (values, (dq, dk, dv, d_state))
            )
        final = None if d_final is None else final
        return dq, dk, dv, d_log_decay, d_state, None, None, None, out, final, None, None

    def second_tangents(ctx: Any, *along: Tensor | None) -> Any:
        a, b, c, direction, e, _, _, _, t_out, t_final, _, _ = along
        run, (d_out, d_final) = call(ctx)
        changes = run.backward_along(d_out, d_final, (a, b, c, e))
        if direction is not None:
            more = run.backward_along_decay(d_out, d_final, direction)
            changes = [_sum(pair) for pair in zip(changes, more, strict=True)]
        like = (*run.inputs[:3], run.inputs.fresh_state())
        if t_out is not None or t_final is not None:
            linear = run.backward(torch.zeros_like(like[2]) if t_out is None else t_out, t_final)
            changes = [_sum(pair) for pair in zip(changes, linear, strict=True)]
        found = [torch.zeros_like(x) if y is None else y for x, y in zip(like, changes, strict=True)]
        narrow = like[3].dtype if ctx.wide else like[0].dtype
        return found[0].to(narrow), found[1].to(narrow), *found[2:]

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


def _narrowed(cotangents: Sequence[Tensor | None], x: RetentionInputs) -> Gradients:
    """Cotangents of the gradients of q, k, v and the state, in the types of these."""
    like = (*x[:3], None)
    a, b, c, e = (
        y if y is None or z is None else y.to(z.dtype) for y, z in zip(cotangents, like, strict=True)
    )
    return a, b, c, e


# Where the heads of each tensor are: under vmap the batch becomes more heads, which takes any packing and any decay along.
# A decay has them last, by head or by token.
_SIDES = (2, 2, 2, -1, 1, None, None, None, None), (2, 1, 1)
_SIDES_BACKWARD = (2, 2, 2, -1, 1, None, None, None, 2, 1, 1, None), (2, 2, 2, 1)


def _fold(op: Any, sides: Any, info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
    """The rule of `torch.vmap`: n calls with H heads each are one call with n·H heads."""
    folded, n = [], info.batch_size
    for x, dim, heads in zip(inputs, in_dims, sides[0], strict=True):
        if dim is not None and heads is None:
            raise NotImplementedError("torch.vmap over cu_seqlens of retention; call it for each packing")
        if heads is None or x is None:
            folded.append(x)
            continue
        heads = heads if heads >= 0 else x.dim() - 1 - (dim is not None)
        x = x.movedim(dim, heads) if dim is not None else x.unsqueeze(heads).expand(*_with(x.shape, heads, n))
        folded.append(x.flatten(heads, heads + 1))
    outputs = op(*folded)
    dims = tuple(heads if x.dim() > heads else None for x, heads in zip(outputs, sides[1], strict=True))
    pairs = zip(outputs, dims, strict=True)
    return tuple(x if d is None else x.unflatten(d, (n, x.shape[d] // n)) for x, d in pairs), dims


def _with(shape: torch.Size, place: int, size: int) -> list[int]:
    return [*shape[:place], size, *shape[place:]]


def _fake_backward(x: RetentionInputs, *rest: object) -> tuple[Tensor, ...]:
    d_state = x._replace(state=None).fresh_state()
    narrow = d_state.dtype if rest[-1] else x.q.dtype
    dq, dk = (y.new_empty(y.shape, dtype=narrow) for y in x[:2])
    return dq, dk, x.v.new_empty(x.v.shape), d_state


def _fake_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    return v.new_empty(v.shape)


TORCH = _define("torch", (ANY,), chunkwise.forward, chunkwise.backward, chunkwise.step)
NUMBA = _define("numba", ("cpu",), chunkwise_numba.forward, chunkwise_numba.backward, decode.step)
TRITON = _define(
    "triton", ("cuda", "cpu"), triton.forward, triton.backward, triton.decode
)  # cpu: interpreted
