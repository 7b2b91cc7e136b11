"""Chunkwise retention by torch's batched matrix products, forward and explicit backward: backend "torch", any device.

The forward walks over chunks of C tokens and keeps the running state S in place. The backward walks twice, so that its
memory does not grow with the number of chunks: forwards in time with S (everything inside a chunk, and dq, which needs
the state before the chunk), then backwards in time with dS (the parts of dk and dv that reach later chunks).

For a chunk that starts from S and ends in S' (j, i: places inside the chunk; ξ_j = γ^{j+1}, ζ_j = γ^{C−1−j}):

    A = (q kᵀ) ⊙ D      o = A v + (q ⊙ ξ) S           S' = γ^C S + (k ⊙ ζ)ᵀ v            (o is scaled at the end)
    G = (do vᵀ) ⊙ D     dq = G k + ξ ⊙ (do Sᵀ)        dk = Gᵀ q + ζ ⊙ (v dS'ᵀ)
                        dS = γ^C dS' + (q ⊙ ξ)ᵀ do    dv = Aᵀ do + ζ ⊙ (k dS')

Where each token has its own decay (`TokenDecay`), D, ξ, ζ and γ^C are products of the γ between two tokens, made for each
chunk anew; all the rest is the same.

Products run in fp32 (fp64 for fp64 inputs), whatever the inputs' type. A block of a few chunks at a time is copied to
buffers in which each chunk of each head is contiguous, which is what the batched product wants and stays in the caches.
`retnet.ops.cpu.chunkwise_numba` has the same mathematics in compiled kernels, and shares `DecayFactors` with this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from retnet.ops.decay import decay_sums
from retnet.ops.inputs import RetentionInputs
from retnet.ops.reference import decay_mask

CHUNK = 64  # default C: work inside a chunk grows with it, the calls shrink; measured best or near it from K 64 to 256
KEPT_NUMBERS = (
    1 << 20
)  # of a mask, at most, for factors that are kept from call to call: 4 MB each, 16 of them


class DecayFactors(NamedTuple):
    """D, ξ, ζ and γ^n of the docstring above, for chunks of up to C tokens; the scale of the products rides on D and ξ."""

    mask: Tensor  # D · scale [H,C,C]
    xi: Tensor  # ξ · scale [H,C]
    zeta: Tensor  # ζ of a full chunk [H,C]
    carry: Tensor  # γ^n [H,C+1]

    def inside(self, block: _ChunkBatch) -> Tensor:
        """D·scale of G chunks of n tokens, [H,n,n]."""
        return self.mask[:, : block.length, : block.length]

    def across(self, block: _ChunkBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(ξ·scale [H,n,1], ζ [H,n,1], γ^n [G,H,1,1]) of G chunks of n tokens."""
        length, full = block.length, self.zeta.shape[1]
        xi, zeta = self.xi[:, :length, None], self.zeta[:, full - length :, None]
        return xi, zeta, self.carry[:, length, None, None].expand(block.chunks, -1, 1, 1)

    def at(self, places: Tensor) -> DecayFactors:
        """Of documents whose tokens have these places."""
        return self


class TokenDecay(NamedTuple):
    """What `DecayFactors` is, of decays by token."""

    log_decay: Tensor  # [B,T,H]
    scale: float
    dtype: torch.dtype

    def inside(self, block: _ChunkBatch) -> Tensor:
        """D·scale of G chunks of n tokens, [G,B,H,n,n]."""
        a = self._sums(block)
        later = torch.ones(block.length, block.length, dtype=torch.bool, device=a.device).triu_(1)
        exponents = (a - a.mT).to(self.dtype).masked_fill_(later, -torch.inf)
        return exponents.exp_().mul_(self.scale)

    def across(self, block: _ChunkBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(ξ·scale [G,B,H,n,1], ζ [G,B,H,n,1], the product of all γ [G,B,H,1,1]) of G chunks of n tokens."""
        a = self._sums(block)
        last = a[..., -1:, :]
        xi, zeta, carry = (x.to(self.dtype).exp() for x in (a, last - a, last))
        return xi.mul_(self.scale), zeta, carry

    def _sums(self, block: _ChunkBatch) -> Tensor:
        """Σ ln γ from the begin of its chunk up to each token, [G,B,H,n,1]."""
        return decay_sums(block.of(self.log_decay[..., None]))[..., 1:, :]

    def at(self, places: Tensor) -> TokenDecay:
        """Of documents whose tokens have these places, [n,L]."""
        return self._replace(log_decay=self.log_decay[0, places])


def factors_of(x: RetentionInputs, chunk: int, dtype: torch.dtype) -> DecayFactors | TokenDecay:
    """The weights of the decays of a call."""
    if x.gated:
        return TokenDecay(x.log_decay, x.scale, dtype)
    return decay_factors(x.log_decay, chunk, x.scale, dtype)


def decay_factors(log_decay: Tensor, chunk: int, scale: float, dtype: torch.dtype) -> DecayFactors:
    """The factors of a decay [H], kept by value where that is small and needs no wait for a device."""
    if log_decay.is_cpu and len(log_decay) * chunk * chunk <= KEPT_NUMBERS:
        return _kept_factors(tuple(log_decay.tolist()), chunk, scale, dtype)
    return _make_factors(log_decay, chunk, scale, dtype)


@lru_cache(maxsize=16)
def _kept_factors(log_decay: tuple[float, ...], chunk: int, scale: float, dtype: torch.dtype) -> DecayFactors:
    with torch.inference_mode(False):  # what is kept may be used outside of it
        return _make_factors(torch.tensor(log_decay, dtype=torch.float64, device="cpu"), chunk, scale, dtype)


def _make_factors(log_decay: Tensor, chunk: int, scale: float, dtype: torch.dtype) -> DecayFactors:
    """In fp64, on the device of `log_decay` where that has fp64 (Apple's has not)."""
    device = log_decay.device
    wide = log_decay.to("cpu" if device.type == "mps" else device, torch.float64)
    n = torch.arange(chunk + 1, device=wide.device)
    powers = torch.exp(wide[:, None] * n)  # [H,C+1]
    mask, xi = decay_mask(wide, chunk) * scale, powers[:, 1:] * scale
    factors = (mask, xi, powers[:, :chunk].flip(1), powers)
    return DecayFactors(*(x.to(dtype).to(device).contiguous() for x in factors))


def chunk_of(form: str, chunk_size: int | None, tokens: int) -> int:
    """C of a form: all tokens are one chunk in the parallel one, each is one in the recurrent one."""
    return {"parallel": max(1, tokens), "recurrent": 1, "chunkwise": chunk_size or CHUNK}[form]


def chunk_length(chunk: int, tokens: int) -> int:
    """C for a sequence: not much longer than it, and of few different lengths, so that factors are found again."""
    return max(1, min(chunk, -(-tokens // 16) * 16))


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

    def load(self, name: str, x: Tensor, block: _ChunkBatch) -> Tensor:
        """The block's tokens of x [B,T,H,W], as [G,B,H,n,W]."""
        source = block.of(x)
        return self.get(name, *source.shape).copy_(source)


class _ChunkBatch(NamedTuple):
    """`chunks` neighbouring chunks of `length` tokens; what needs no state is computed for all of them at once."""

    start: int
    chunks: int
    length: int

    def of(self, x: Tensor) -> Tensor:
        """A view of x [B,T,H,W] as [G,B,H,n,W]."""
        part = x[:, self.start : self.start + self.chunks * self.length]
        return part.unflatten(1, (self.chunks, self.length)).permute(1, 0, 3, 2, 4)


def _blocks(q: Tensor, chunk: int) -> list[_ChunkBatch]:
    """Cuts T tokens into blocks of full chunks, and what is left into a shorter chunk of its own.

    A block holds about 16 matrices of a product: enough for all threads and few calls, small enough for the caches.
    """
    (B, T, H, _), blocks, start = q.shape, [], 0
    most = max(1, 16 // max(1, B * H))
    while start < T:
        full = (T - start) // chunk
        block = _ChunkBatch(start, min(most, full), chunk) if full else _ChunkBatch(start, 1, T - start)
        blocks.append(block)
        start += block.chunks * block.length
    return blocks


def _bmm(a: Tensor, b: Tensor, out: Tensor, beta: float = 0.0) -> Tensor:
    """out = a @ b + beta · out, on contiguous tensors [...,·,·] or their transposes."""
    flat = out.flatten(0, -3)
    torch.baddbmm(flat, a.flatten(0, -3), b.flatten(0, -3), beta=beta, out=flat)
    return out


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    factors: DecayFactors | TokenDecay,
    chunk: int,
    out: Tensor,
) -> None:
    """Fills `out` [B,T,H,V] and moves `state` [B,H,K,V] to the end, in place."""
    buffers = _Buffers(q, state.dtype)
    for block in _blocks(q, chunk):
        D, (xi, zeta, carry) = factors.inside(block), factors.across(block)
        qc, kc, vc = (buffers.load(name, x, block) for name, x in (("q", q), ("k", k), ("v", v)))
        A = _bmm(qc, kc.mT, buffers.get("A", *qc.shape[:-1], block.length)).mul_(D)
        o = _bmm(A, vc, buffers.get("o", *vc.shape))
        qc.mul_(xi)
        kc.mul_(zeta)
        for i in range(block.chunks):
            _bmm(qc[i], state, o[i], beta=1.0)
            _bmm(kc[i].mT, vc[i], state.mul_(carry[i]), beta=1.0)
        block.of(out).copy_(o)


def _backward(
    d_out: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    factors: DecayFactors | TokenDecay,
    chunk: int,
    grads: tuple[Tensor, ...],
) -> None:
    """Fills `grads` (of q, k, v) and moves `d_state` [B,H,K,V] to the begin, in place. `state` is overwritten."""
    dq, dk, dv = grads
    buffers = _Buffers(q, state.dtype)
    inputs = (("q", q), ("k", k), ("v", v), ("g", d_out))
    blocks = _blocks(q, chunk)
    for block in blocks:  # forwards in time, S runs along
        D, (xi, zeta, carry) = factors.inside(block), factors.across(block)
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
            _bmm(kc[i].mT, vc[i], state.mul_(carry[i]), beta=1.0)
        block.of(dq).copy_(dqc)
    for block in reversed(blocks):  # backwards in time, dS runs along
        xi, zeta, carry = factors.across(block)
        qc, kc, vc, gc = (buffers.load(name, x, block) for name, x in inputs)
        qc.mul_(xi)
        kc.mul_(zeta)
        vc.mul_(zeta)
        dkc, dvc = buffers.get("dk", *kc.shape), buffers.get("dv", *vc.shape)
        for i in reversed(range(block.chunks)):
            _bmm(vc[i], d_state.mT, dkc[i])
            _bmm(kc[i], d_state, dvc[i])
            _bmm(qc[i].mT, gc[i], d_state.mul_(carry[i]), beta=1.0)
        block.of(dk).add_(dkc)
        block.of(dv).add_(dvc)


def _documents(cu_seqlens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Packed documents grouped by equal length, as (rows of the state [n], places of their tokens [n,L]).

    Documents of one length form a batch: a packed row of whole windows runs as fast as an unpacked batch of them.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().squeeze(1)
        yield rows, starts[rows, None] + torch.arange(length, device=starts.device)


def forward(x: RetentionInputs, chunk: int, keep_states: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B,T,H,V] in v's type, final state, and nothing in place of states at chunk boundaries."""
    q, k, v = x.q, x.k, x.v
    final = x.fresh_state()
    chunk = chunk_length(chunk, q.shape[1])
    factors = factors_of(x, chunk, final.dtype)
    out = v.new_empty(v.shape)
    if x.cu_seqlens is None:
        _forward(q, k, v, final, factors, chunk, out)
        return out, final, final.new_empty(0)
    for rows, places in _documents(x.cu_seqlens):
        part, part_state = v.new_empty(*places.shape, *v.shape[2:]), final[rows]
        _forward(q[0, places], k[0, places], v[0, places], part_state, factors.at(places), chunk, part)
        out[0, places], final[rows] = part, part_state
    return out, final, final.new_empty(0)


def backward(
    x: RetentionInputs,
    chunk: int,
    d_out: Tensor,
    d_final: Tensor | None,
    snapshots: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial state, given those of the output and the final state.

    Those of q and k have the type of the state if they are to be `wide`, else that of q.
    """
    q, k, v = x.q, x.k, x.v
    before, d_state = x.fresh_state(), x._replace(state=d_final).fresh_state()
    chunk = chunk_length(chunk, q.shape[1])
    factors = factors_of(x, chunk, before.dtype)
    narrow = before.dtype if wide else q.dtype
    grads = q.new_empty(q.shape, dtype=narrow), k.new_empty(k.shape, dtype=narrow), v.new_empty(v.shape)
    if x.cu_seqlens is None:
        _backward(d_out, d_state, q, k, v, before, factors, chunk, grads)
        return *grads, d_state
    for rows, places in _documents(x.cu_seqlens):
        qd, kd, vd = (y[0, places] for y in (q, k, v))
        parts = tuple(grad.new_empty(y.shape) for grad, y in zip(grads, (qd, kd, vd), strict=True))
        part_d_state = d_state[rows]
        own = factors.at(places)
        _backward(d_out[0, places], part_d_state, qd, kd, vd, before[rows], own, chunk, parts)
        for grad, part in zip(grads, parts, strict=True):
            grad[0, places] = part
        d_state[rows] = part_d_state
    return *grads, d_state


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    """One token for each of B rows of `state` [N,H,K,V], which change in place; slot −1 is padding, its output zero.

    log_decay is [H], or [B,H] by token.
    """
    if slots is None:
        return _step(q, k, v, log_decay, state[: len(q)], scale)
    rows = slots.long()
    real = (rows >= 0).nonzero().squeeze(1)
    part, out = state[rows[real]], torch.zeros_like(v)
    decay = log_decay[real] if log_decay.dim() == 2 else log_decay
    out[real] = _step(q[real], k[real], v[real], decay, part, scale)
    state[rows[real]] = part
    return out


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float) -> Tensor:
    """One token for every row of `state` [B,H,K,V]."""
    wide = state.dtype
    part = state.mul_(log_decay.to(wide).exp()[..., None, None]).flatten(0, 1)  # [BH,K,V], a view
    part.baddbmm_(k.to(wide).flatten(0, 1)[:, :, None], v.to(wide).flatten(0, 1)[:, None, :])
    out = torch.bmm((q.to(wide) * scale).flatten(0, 1)[:, None, :], part)
    return out.view(v.shape).to(v.dtype)
