"""Chunkwise retention on the CPU, with an explicit backward, as custom operators of torch.

The forward walks over chunks of C tokens and keeps the running state S in place. The backward walks twice, so that its
memory does not grow with the number of chunks: forwards in time with S (everything inside a chunk, and dq, which needs
the state before the chunk), then backwards in time with dS (the parts of dk and dv that reach later chunks).

For a chunk that starts from S and ends in S' (j, i: places inside the chunk; ξ_j = γ^{j+1}, ζ_j = γ^{C−1−j}):

    A = (q kᵀ) ⊙ D      o = A v + (q ⊙ ξ) S           S' = γ^C S + (k ⊙ ζ)ᵀ v            (o is scaled at the end)
    G = (do vᵀ) ⊙ D     dq = G k + ξ ⊙ (do Sᵀ)        dk = Gᵀ q + ζ ⊙ (v dS'ᵀ)
                        dS = γ^C dS' + (q ⊙ ξ)ᵀ do    dv = Aᵀ do + ζ ⊙ (k dS')

Matrix products run in fp32 (fp64 for fp64 inputs): on CPUs half types are slower, not faster. Each chunk is copied to
a contiguous [B·H, C, …] buffer first, which is what the batched product wants and stays in the caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from retnet.ops.reference import decay_mask


class _Factors:
    """D, ξ, ζ and γ^C of the docstring above, for chunks of up to `chunk` tokens; the scale rides on D and ξ."""

    def __init__(self, log_decay: Tensor, chunk: int, scale: float, dtype: torch.dtype) -> None:
        log_decay = log_decay.double()
        j = torch.arange(chunk, device=log_decay.device)
        self._log_decay = log_decay
        self._chunk = chunk
        self._mask = (decay_mask(log_decay, chunk) * scale).to(dtype)  # [H,C,C]
        self._xi = (torch.exp(log_decay[:, None] * (j + 1)) * scale).to(dtype)[..., None]  # [H,C,1]
        self._zeta = torch.exp(log_decay[:, None] * (chunk - 1 - j)).to(dtype)[..., None]  # [H,C,1]

    def of(self, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(D·scale [H,n,n], ξ·scale [H,n,1], ζ [H,n,1], γ^n [H,1,1]) of a chunk of n tokens."""
        carry = torch.exp(self._log_decay * length).to(self._xi.dtype)[:, None, None]
        zeta = self._zeta[:, self._chunk - length :]
        return self._mask[:, :length, :length], self._xi[:, :length], zeta, carry


class _Buffers:
    """Reused memory for the chunks of one call: `get(name, n, width)` is a contiguous-by-head [B,H,n,width]."""

    def __init__(self, like: Tensor, batch: int, heads: int, dtype: torch.dtype) -> None:
        self._like, self._lead, self._dtype = like, batch * heads, dtype
        self._batch, self._heads = batch, heads
        self._memory: dict[str, Tensor] = {}

    def get(self, name: str, length: int, width: int) -> Tensor:
        size = self._lead * length * width
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = self._like.new_empty(size, dtype=self._dtype)
        return self._memory[name][:size].view(self._batch, self._heads, length, width)

    def load(self, name: str, x: Tensor) -> Tensor:
        """x [B,n,H,W] copied to [B,H,n,W]."""
        return self.get(name, x.shape[1], x.shape[3]).copy_(x.transpose(1, 2))


def _chunks(length: int, chunk: int) -> Iterator[slice]:
    for start in range(0, length, chunk):
        yield slice(start, min(start + chunk, length))


def _bmm(a: Tensor, b: Tensor, out: Tensor, beta: float = 0.0) -> Tensor:
    """out = a @ b + beta · out on [B,H,·,·] tensors that are contiguous up to a transposition of the last two."""
    flat = out.flatten(0, 1)
    torch.baddbmm(flat, a.flatten(0, 1), b.flatten(0, 1), beta=beta, out=flat)
    return out


def _forward(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, factors: _Factors, chunk: int, out: Tensor
) -> None:
    """Fills `out` [B,T,H,V] and moves `state` [B,H,K,V] to the end, in place."""
    (B, T, H, _), V = q.shape, v.shape[3]
    buffers = _Buffers(q, B, H, state.dtype)
    for part in _chunks(T, chunk):
        n = part.stop - part.start
        D, xi, zeta, carry = factors.of(n)
        qc, kc, vc = (buffers.load(name, x[:, part]) for name, x in (("q", q), ("k", k), ("v", v)))
        A = _bmm(qc, kc.mT, buffers.get("A", n, n)).mul_(D)
        o = _bmm(A, vc, buffers.get("o", n, V))
        _bmm(qc.mul_(xi), state, o, beta=1.0)
        out[:, part] = o.transpose(1, 2)
        _bmm(kc.mul_(zeta).mT, vc, state.mul_(carry), beta=1.0)


def _backward(
    d_out: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    factors: _Factors,
    chunk: int,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fills `grads` (of q, k, v) and moves `d_state` [B,H,K,V] to the begin, in place. `state` is overwritten."""
    B, T, H, K = q.shape
    V = v.shape[3]
    dq, dk, dv = grads
    buffers = _Buffers(q, B, H, state.dtype)
    for part in _chunks(T, chunk):  # forwards in time, S runs along
        n = part.stop - part.start
        D, xi, zeta, carry = factors.of(n)
        qc, kc, vc = (buffers.load(name, x[:, part]) for name, x in (("q", q), ("k", k), ("v", v)))
        gc = buffers.load("g", d_out[:, part])
        A = _bmm(qc, kc.mT, buffers.get("A", n, n)).mul_(D)
        dv[:, part] = _bmm(A.mT, gc, buffers.get("dv", n, V)).transpose(1, 2)
        G = _bmm(gc, vc.mT, A).mul_(D)
        dk[:, part] = _bmm(G.mT, qc, buffers.get("dk", n, K)).transpose(1, 2)
        dqc = _bmm(G, kc, buffers.get("dq", n, K))
        _bmm(gc.mul_(xi), state.mT, dqc, beta=1.0)
        dq[:, part] = dqc.transpose(1, 2)
        _bmm(kc.mul_(zeta).mT, vc, state.mul_(carry), beta=1.0)
    for part in reversed(list(_chunks(T, chunk))):  # backwards in time, dS runs along
        n = part.stop - part.start
        _, xi, zeta, carry = factors.of(n)
        qc, kc, vc = (buffers.load(name, x[:, part]) for name, x in (("q", q), ("k", k), ("v", v)))
        gc = buffers.load("g", d_out[:, part])
        dk[:, part] += _bmm(vc.mul_(zeta), d_state.mT, buffers.get("dk", n, K)).transpose(1, 2)
        dv[:, part] += _bmm(kc.mul_(zeta), d_state, buffers.get("dv", n, V)).transpose(1, 2)
        _bmm(qc.mul_(xi).mT, gc, d_state.mul_(carry), beta=1.0)


def _documents(cu_seqlens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Packed documents grouped by equal length, as (rows of the state [n], places of their tokens [n,L]).

    Documents of one length form a batch: a packed row of whole windows runs as fast as an unpacked batch of them.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().squeeze(1)
        yield rows, starts[rows, None] + torch.arange(length)


def _initial(q: Tensor, v: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The state to start from, fresh memory that may be changed: [B,H,K,V], or [N,H,K,V] if packed."""
    if state is not None:
        return state.clone(memory_format=torch.contiguous_format)
    rows = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_zeros(rows, q.shape[2], q.shape[3], v.shape[3], dtype=wide)


def chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Output [B,T,H,V] in v's type and final state, see the module's docstring."""
    final = _initial(q, v, state, cu_seqlens)
    out = v.new_empty(v.shape)
    factors = _Factors(log_decay, max(1, min(chunk, q.shape[1])), scale, final.dtype)
    if cu_seqlens is None:
        _forward(q, k, v, final, factors, chunk, out)
        return out, final
    for rows, places in _documents(cu_seqlens):
        part, part_state = v.new_empty(*places.shape, *v.shape[2:]), final[rows]
        _forward(q[0, places], k[0, places], v[0, places], part_state, factors, chunk, part)
        out[0, places], final[rows] = part, part_state
    return out, final


def chunk_backward(
    d_out: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial state, given those of the output and the final state."""
    before = _initial(q, v, state, cu_seqlens)
    d_state = d_final.clone(memory_format=torch.contiguous_format)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    factors = _Factors(log_decay, max(1, min(chunk, q.shape[1])), scale, before.dtype)
    if cu_seqlens is None:
        _backward(d_out, d_state, q, k, v, before, factors, chunk, grads)
        return *grads, d_state
    for rows, places in _documents(cu_seqlens):
        qd, kd, vd = (x[0, places] for x in (q, k, v))
        parts = torch.empty_like(qd), torch.empty_like(kd), torch.empty_like(vd)
        part_d_state = d_state[rows]
        _backward(d_out[0, places], part_d_state, qd, kd, vd, before[rows], factors, chunk, parts)
        for grad, part in zip(grads, parts, strict=True):
            grad[0, places] = part
        d_state[rows] = part_d_state
    return *grads, d_state


def retention_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    """One token for each of B rows of `state` [N,H,K,V], which change in place; slot −1 is padding, its output zero."""
    if slots is not None:
        rows = slots.long()
        real = (rows >= 0).nonzero().squeeze(1)
        rows = rows[real]
        part, out = state[rows], torch.zeros_like(v)
        out[real] = retention_step(q[real], k[real], v[real], log_decay, part, None, scale)
        state[rows] = part
        return out
    B = q.shape[0]
    wide = state.dtype
    gamma = log_decay.to(wide).exp()[:, None, None]
    part = state[:B].mul_(gamma).flatten(0, 1)  # [BH,K,V], a view
    part.baddbmm_(k.to(wide).flatten(0, 1)[:, :, None], v.to(wide).flatten(0, 1)[:, None, :])
    out = torch.bmm((q.to(wide) * scale).flatten(0, 1)[:, None, :], part)
    return out.view(v.shape).to(v.dtype)


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? state, Tensor? cu_seqlens, float scale, int chunk"
torch.library.define("retnet::chunk_forward", f"({_TENSORS}) -> (Tensor, Tensor)")
torch.library.define(
    "retnet::chunk_backward",
    f"(Tensor d_out, Tensor d_final, {_TENSORS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "retnet::step",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor(a!) state, Tensor? slots, float scale) -> Tensor",
)
torch.library.impl("retnet::chunk_forward", "cpu", chunk_forward)
torch.library.impl("retnet::chunk_backward", "cpu", chunk_backward)
torch.library.impl("retnet::step", "cpu", retention_step)


@torch.library.register_fake("retnet::chunk_forward")
def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), _initial(q, v, state, cu_seqlens)


@torch.library.register_fake("retnet::chunk_backward")
def _fake_backward(
    d_out: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), _initial(q, v, state, cu_seqlens)


@torch.library.register_fake("retnet::step")
def _fake_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    return torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[object, ...], output: object) -> None:  # noqa: ANN401
    *tensors, scale, chunk = inputs
    ctx.save_for_backward(*tensors)
    ctx.scale, ctx.chunk = scale, chunk


def _gradients(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    inputs = ctx.saved_tensors
    dq, dk, dv, d_state = torch.ops.retnet.chunk_backward(d_out, d_final, *inputs, ctx.scale, ctx.chunk)
    state = inputs[4]
    return dq, dk, dv, None, d_state if state is not None else None, None, None, None


torch.library.register_autograd("retnet::chunk_forward", _gradients, setup_context=_save)

# The operators, as everything outside calls them.
chunked = torch.ops.retnet.chunk_forward
step = torch.ops.retnet.step
