"""Chunkwise retention on the CPU, with an explicit backward, as custom operators of torch.

The forward walks over chunks of C tokens and keeps the running state S in place. The backward walks twice, so that its
memory does not grow with the number of chunks: forwards in time with S (everything inside a chunk, and dq, which needs
the state before the chunk), then backwards in time with dS (the parts of dk and dv that reach later chunks).

For a chunk that starts from S and ends in S' (j, i: places inside the chunk; ξ_j = γ^{j+1}, ζ_j = γ^{C−1−j}):

    A = (q kᵀ) ⊙ D      o = A v + (q ⊙ ξ) S           S' = γ^C S + (k ⊙ ζ)ᵀ v            (o is scaled at the end)
    G = (do vᵀ) ⊙ D     dq = G k + ξ ⊙ (do Sᵀ)        dk = Gᵀ q + ζ ⊙ (v dS'ᵀ)
                        dS = γ^C dS' + (q ⊙ ξ)ᵀ do    dv = Aᵀ do + ζ ⊙ (k dS')

Products run in fp32 (fp64 for fp64 inputs), whatever the inputs' type. A block of a few chunks at a time is copied to
buffers in which each chunk of each head is contiguous, which is what the batched product wants and stays in the caches.
Where numba is installed, `retnet.ops.cpu.chunkwise_numba` does the same without torch's operators.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retnet.ops.cpu import chunkwise_numba, decode
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

    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """D·scale [H,C,C], ξ·scale [H,C], ζ [H,C] of a full chunk, and γ^n [H,C+1]; contiguous."""
        n = torch.arange(self._chunk + 1)
        carry = torch.exp(self._log_decay[:, None] * n).to(self._xi.dtype)
        return self._mask.contiguous(), self._xi.flatten(1), self._zeta.flatten(1), carry


class _Buffers:
    """Reused memory for the blocks of one call, laid out [G,B,H,n,width]: G chunks of n tokens, each chunk contiguous."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._like, self._dtype = like, dtype
        self._memory: dict[str, Tensor] = {}

    def get(self, name: str, *shape: int) -> Tensor:
        """Memory of this shape, its content undefined."""
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = self._like.new_empty(size, dtype=self._dtype)
        return self._memory[name][:size].view(shape)

    def load(self, name: str, x: Tensor, block: _Block) -> Tensor:
        """The block's tokens of x [B,T,H,W], as [G,B,H,n,W]."""
        source = block.of(x)
        return self.get(name, *source.shape).copy_(source)


class _Block(NamedTuple):
    """`chunks` neighbouring chunks of `length` tokens; what needs no state is computed for all of them at once."""

    start: int
    chunks: int
    length: int

    def of(self, x: Tensor) -> Tensor:
        """A view of x [B,T,H,W] as [G,B,H,n,W]."""
        part = x[:, self.start : self.start + self.chunks * self.length]
        return part.unflatten(1, (self.chunks, self.length)).permute(1, 0, 3, 2, 4)


def _blocks(q: Tensor, chunk: int) -> list[_Block]:
    """Cuts T tokens into blocks of full chunks, and what is left into a shorter chunk of its own.

    A block holds about 16 matrices of a product: enough for all threads and few calls, small enough for the caches.
    """
    (B, T, H, _), blocks, start = q.shape, [], 0
    most = max(1, 16 // max(1, B * H))
    while start < T:
        full = (T - start) // chunk
        block = _Block(start, min(most, full), chunk) if full else _Block(start, 1, T - start)
        blocks.append(block)
        start += block.chunks * block.length
    return blocks


def _bmm(a: Tensor, b: Tensor, out: Tensor, beta: float = 0.0) -> Tensor:
    """out = a @ b + beta · out, on contiguous tensors [...,·,·] or their transposes."""
    flat = out.flatten(0, -3)
    torch.baddbmm(flat, a.flatten(0, -3), b.flatten(0, -3), beta=beta, out=flat)
    return out


def _forward(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, factors: _Factors, chunk: int, out: Tensor
) -> None:
    """Fills `out` [B,T,H,V] and moves `state` [B,H,K,V] to the end, in place."""
    buffers = _Buffers(q, state.dtype)
    for block in _blocks(q, chunk):
        D, xi, zeta, carry = factors.of(block.length)
        qc, kc, vc = (buffers.load(name, x, block) for name, x in (("q", q), ("k", k), ("v", v)))
        A = _bmm(qc, kc.mT, buffers.get("A", *qc.shape[:-1], block.length)).mul_(D)
        o = _bmm(A, vc, buffers.get("o", *vc.shape))
        qc.mul_(xi)
        kc.mul_(zeta)
        for i in range(block.chunks):
            _bmm(qc[i], state, o[i], beta=1.0)
            _bmm(kc[i].mT, vc[i], state.mul_(carry), beta=1.0)
        block.of(out).copy_(o)


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
    dq, dk, dv = grads
    buffers = _Buffers(q, state.dtype)
    inputs = (("q", q), ("k", k), ("v", v), ("g", d_out))
    blocks = _blocks(q, chunk)
    for block in blocks:  # forwards in time, S runs along
        D, xi, zeta, carry = factors.of(block.length)
        qc, kc, vc, gc = (buffers.load(name, x, block) for name, x in inputs)
        A = _bmm(qc, kc.mT, buffers.get("A", *qc.shape[:-1], block.length)).mul_(D)
        block.of(dv).copy_(_bmm(A.mT, gc, buffers.get("dv", *vc.shape)))
        G = _bmm(gc, vc.mT, A).mul_(D)
        block.of(dk).copy_(_bmm(G.mT, qc, buffers.get("dk", *kc.shape)))
        dqc = _bmm(G, kc, buffers.get("dq", *qc.shape))
        gc.mul_(xi)
        kc.mul_(zeta)
        for i in range(block.chunks):
            _bmm(gc[i], state.mT, dqc[i], beta=1.0)
            _bmm(kc[i].mT, vc[i], state.mul_(carry), beta=1.0)
        block.of(dq).copy_(dqc)
    for block in reversed(blocks):  # backwards in time, dS runs along
        _, xi, zeta, carry = factors.of(block.length)
        qc, kc, vc, gc = (buffers.load(name, x, block) for name, x in inputs)
        qc.mul_(xi)
        kc.mul_(zeta)
        vc.mul_(zeta)
        dkc, dvc = buffers.get("dk", *kc.shape), buffers.get("dv", *vc.shape)
        for i in reversed(range(block.chunks)):
            _bmm(vc[i], d_state.mT, dkc[i])
            _bmm(kc[i], d_state, dvc[i])
            _bmm(qc[i].mT, gc[i], d_state.mul_(carry), beta=1.0)
        block.of(dk).add_(dkc)
        block.of(dv).add_(dvc)


def _walks(factors: _Factors, q: Tensor, cu_seqlens: Tensor | None) -> chunkwise_numba.Walks:
    """All sequences of q, [B,T,H,K] or packed, for the compiled kernels."""
    B, T = q.shape[:2]
    bounds = torch.arange(B + 1) * T if cu_seqlens is None else cu_seqlens.long()
    return chunkwise_numba.Walks(bounds[:-1], bounds.diff(), *factors.tables())


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """[B,T,H,W] → [B·T,H,W], contiguous, in the type of `like`."""
    return x.to(like.dtype).contiguous().flatten(0, 1)


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
    chunk = max(1, min(chunk, q.shape[1]))
    factors = _Factors(log_decay, chunk, scale, final.dtype)
    if chunkwise_numba.available(final, chunk):
        qr, kr, vr = (_rows(x, final) for x in (q, k, v))
        rows = torch.empty_like(vr)
        chunkwise_numba.forward(qr, kr, vr, final, rows, _walks(factors, q, cu_seqlens))
        return rows.view(v.shape).to(v.dtype), final
    out = v.new_empty(v.shape)
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
    chunk = max(1, min(chunk, q.shape[1]))
    factors = _Factors(log_decay, chunk, scale, before.dtype)
    if chunkwise_numba.available(before, chunk):
        qr, kr, vr, gr = (_rows(x, before) for x in (q, k, v, d_out))
        dq, dk, dv = (torch.empty_like(x) for x in (qr, kr, vr))
        chunkwise_numba.backward(
            gr, d_state, qr, kr, vr, before, (dq, dk, dv), _walks(factors, q, cu_seqlens)
        )
        return dq.view_as(q).to(q.dtype), dk.view_as(k).to(k.dtype), dv.view_as(v).to(v.dtype), d_state
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
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
    rows = None if slots is None else slots.long()
    if (out := decode.state_step(q, k, v, log_decay, state, rows, scale)) is not None:
        return out
    if rows is not None:
        real = (rows >= 0).nonzero().squeeze(1)
        part, out = state[rows[real]], torch.zeros_like(v)
        out[real] = _step(q[real], k[real], v[real], log_decay, part, scale)
        state[rows[real]] = part
        return out
    return _step(q, k, v, log_decay, state[: len(q)], scale)


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float) -> Tensor:
    """One token for every row of `state` [B,H,K,V], by torch's operators."""
    wide = state.dtype
    part = state.mul_(log_decay.to(wide).exp()[:, None, None]).flatten(0, 1)  # [BH,K,V], a view
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
