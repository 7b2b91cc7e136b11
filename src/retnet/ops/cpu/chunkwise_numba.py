"""Chunkwise retention on the CPU by kernels that numba compiles, forward and explicit backward: backend "numba".

The mathematics are those of `retnet.ops.chunkwise`. A thread walks a few heads of one sequence in the cache of its core:
between matrix products nothing is dispatched and nothing leaves that cache, what comes next is prefetched while they run,
documents packed in one row are walked where they lie, and the half of a chunk's scores that causality removes is not
computed. What is inside a chunk waits for the backward's second walk here, so that of the gradients only dq is written
twice. A head's result does not depend on how many threads share the work.

Where each token has its own decay, the weights of a chunk are made in the cache as well, as running products of the γ, one
row of D from the one before: no exponential is taken, and nothing can overflow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retnet.ops import chunkwise
from retnet.ops.chunkwise import DecayFactors, chunk_length, decay_factors
from retnet.ops.cpu import jit, openmp
from retnet.ops.cpu.gemm import ALL, LOWER_LEFT, LOWER_RESULT, UPPER_LEFT, PackedGemm, compile_packed_gemm
from retnet.ops.inputs import RetentionInputs
from retnet.ops.torch_private import constant_in_traces

CACHE = 1 << 19  # bytes of states that a thread keeps at hand: half of a usual second-level cache
LONGEST = 512  # tokens of a chunk; beyond, its scores no longer fit the caches and torch's loops are as fast


class ChunkwiseTable(NamedTuple):
    """The table of both kernels: sizes, and addresses of contiguous tensors."""

    tokens: int  # M, of all sequences
    heads: int
    key_dim: int
    value_dim: int
    chunk: int  # C
    sequences: int  # N
    together: int  # heads of a sequence that a thread takes at once
    starts: int  # int64 [N], first token of each sequence
    lengths: int  # int64 [N]
    order: int  # int64 [N]: sequences, the longest first, so that all threads end together
    mask: int  # D · scale [H,C,C]
    xi: int  # ξ · scale [H,C]
    zeta: int  # ζ of a full chunk [H,C]
    carry: int  # γ^n [H,C+1]
    gammas: int  # γ [M,H] where each token has its own, and then none of the four before; else 0
    scale: int  # the bits of an fp64 number
    q: int  # [M,H,K]
    k: int  # [M,H,K]
    v: int  # [M,H,V]
    state: int  # [N,H,K,V]; the forward moves it to the end
    out: int = 0  # [M,H,V], written by the forward; what follows is of the backward
    d_out: int = 0  # [M,H,V]
    d_state: int = 0  # [N,H,K,V], moved to the begin
    dq: int = 0  # [M,H,K], written, as the next two
    dk: int = 0
    dv: int = 0


AT = ChunkwiseTable(*range(len(ChunkwiseTable._fields)))  # where each stands in the table


class ChunkwiseKernels(NamedTuple):
    """Both directions, compiled for one type of states."""

    forward: Any
    backward: Any


@constant_in_traces
def hindrance(dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on inputs of this type; None if they can. Compiles them at the first call."""
    if _kernels(torch.promote_types(dtype, torch.float32)) is not None:
        return None
    return jit.hindrance() or "the kernels could not be compiled"


def slower(x: RetentionInputs, form: str, chunk_size: int | None, keep_states: bool) -> str | None:
    """Why torch's batched products would be faster; None if they would not, or while tracing, where sizes are not known."""
    if torch.compiler.is_compiling():
        return None
    heads, threads = x.sequences * x.q.shape[2], torch.get_num_threads()
    if 2 * heads < threads:
        return f"{heads} heads of sequences for {threads} threads"
    T = x.q.shape[1]
    long = T > LONGEST and chunkwise.chunk_of(form, chunk_size, T) > LONGEST
    return f"chunks of more than {LONGEST} tokens" if long else None


def forward(x: RetentionInputs, chunk: int, keep_states: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunkwise.forward`, which takes over where the kernels cannot run: a program may have been exported elsewhere."""
    final = x.fresh_state()
    if (kernels := _kernels(final.dtype)) is None:
        return chunkwise.forward(x, chunk)
    q, k, v = _rows(final, x.q, x.k, x.v)
    out = torch.empty_like(v)
    _run(kernels.forward, {"q": q, "k": k, "v": v, "state": final, "out": out}, x, chunk)
    return out.view(x.v.shape).to(x.v.dtype), final, final.new_empty(0)


def backward(
    x: RetentionInputs,
    chunk: int,
    d_out: Tensor,
    d_final: Tensor | None,
    snapshots: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `chunkwise.backward`, which takes over where the kernels cannot run."""
    before = x.fresh_state()
    if (kernels := _kernels(before.dtype)) is None:
        return chunkwise.backward(x, chunk, d_out, d_final, None, wide)
    d_state = x._replace(state=d_final).fresh_state()
    q, k, v, g = _rows(before, x.q, x.k, x.v, d_out)
    grads = [torch.empty_like(y) for y in (q, k, v)]
    inputs = {"q": q, "k": k, "v": v, "state": before, "d_out": g, "d_state": d_state}
    _run(kernels.backward, inputs | dict(zip(("dq", "dk", "dv"), grads, strict=True)), x, chunk)
    dq, dk, dv = (d.view_as(y) for d, y in zip(grads, x[:3], strict=True))
    narrow = before.dtype if wide else x.q.dtype
    return dq.to(narrow), dk.to(narrow), dv.to(x.v.dtype), d_state


def _rows(like: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Each [B,T,H,W] → [B·T,H,W], contiguous, in the type of `like`."""
    return [x.to(like.dtype).contiguous().flatten(0, 1) for x in tensors]


def _run(kernel: Any, tensors: dict[str, Tensor], x: RetentionInputs, chunk: int) -> None:  # noqa: ANN401
    """Runs a kernel on these tensors of its table."""
    B, T = x.q.shape[:2]
    dtype, C = tensors["state"].dtype, chunk_length(chunk, T)
    factors = None if x.gated else decay_factors(x.log_decay, C, x.scale, dtype)
    gammas = x.log_decay.to(torch.float64).exp().to(dtype).contiguous() if x.gated else None
    bounds = torch.arange(B + 1) * T if x.cu_seqlens is None else x.cu_seqlens.long()
    lengths = bounds.diff()
    order = lengths.argsort(descending=True, stable=True)
    N, H, K, V = tensors["state"].shape
    threads = max(1, min(torch.get_num_threads(), H * N))
    table = ChunkwiseTable(
        tokens=B * T,
        heads=H,
        key_dim=K,
        value_dim=V,
        chunk=C,
        sequences=N,
        together=max(1, min(H, H * N // threads, CACHE // (K * V * dtype.itemsize))),
        starts=bounds.data_ptr(),
        lengths=lengths.data_ptr(),
        order=order.data_ptr(),
        **{name: getattr(factors, name).data_ptr() if factors else 0 for name in DecayFactors._fields},
        gammas=0 if gammas is None else gammas.data_ptr(),
        scale=openmp.bits(x.scale),
        **{name: x.data_ptr() for name, x in tensors.items()},
    )
    openmp.run(kernel, table, threads)


@jit.optional
def _kernels(compiler: jit.Compiler, dtype: torch.dtype) -> ChunkwiseKernels:
    """Compiled on first use, some seconds, and kept on disk beside this file."""
    number = np.float32 if dtype is torch.float32 else np.float64
    gemm = compile_packed_gemm(compiler, number)
    return ChunkwiseKernels(
        _compile_forward(compiler, gemm, number), _compile_backward(compiler, gemm, number)
    )


def _compile_chunk_at(compiler: jit.Compiler) -> Any:  # noqa: ANN401
    """chunk_at(step, heads, first, start, last, C): (begin, n, h) of a step, which is a chunk of a head; heads alternate.

    Steps beyond either end have no tokens.
    """

    @compiler.function
    def chunk_at(step: int, heads: int, first: int, start: int, last: int, C: int) -> tuple[int, int, int]:
        begin = start + step // heads * C
        return begin, (max(0, min(C, last - begin)) if step >= 0 else 0), first + step % heads

    return chunk_at


def _compile_inputs(compiler: jit.Compiler, number: type) -> Any:  # noqa: ANN401
    """inputs(table): its sizes H, N, C, K, V and heads together; then as arrays what both directions read."""
    array = compiler.array

    @compiler.function
    def inputs(table: Any) -> Any:  # noqa: ANN401
        M, H, N, C = table[AT.tokens], table[AT.heads], table[AT.sequences], table[AT.chunk]
        K, V, together = table[AT.key_dim], table[AT.value_dim], table[AT.together]
        q, k = array(table[AT.q], (M, H, K), number), array(table[AT.k], (M, H, K), number)
        v = array(table[AT.v], (M, H, V), number)
        state = array(table[AT.state], (N * H, K, 1, V), number)
        starts = array(table[AT.starts], (N,), np.int64)
        lengths = array(table[AT.lengths], (N,), np.int64)
        order = array(table[AT.order], (N,), np.int64)
        mask, xi = array(table[AT.mask], (H, C, C), number), array(table[AT.xi], (H, C), number)
        zeta = array(table[AT.zeta], (H, C), number)
        carry = array(table[AT.carry], (H, C + 1), number)
        return (H, N, C, K, V, together), (q, k, v, state), (starts, lengths, order), (mask, xi, zeta, carry)

    return inputs


def _compile_decays(compiler: jit.Compiler, number: type) -> Any:  # noqa: ANN401
    """decays(table): what `weights` needs. weights(decays, begin, n, h): D, ξ, ζ, γ^n of a chunk, and whose of them it is.

    Those of heads were made beforehand. Those of tokens are made here, where they were of the chunk before.
    """
    array, real = compiler.array, compiler.real

    @compiler.function
    def decays(table: Any) -> Any:  # noqa: ANN401
        M, H, C = table[AT.tokens], table[AT.heads], table[AT.chunk]
        gammas, scale = array(table[AT.gammas], (M, H), number), number(real(table[AT.scale]))
        own = (
            np.empty((1, C, C), number),
            np.empty((1, C), number),
            np.empty((1, C), number),
            np.empty((1, C + 1), number),
        )
        return own, gammas, scale, table[AT.gammas] != 0

    @compiler.function
    def weights(factors: Any, decays: Any, begin: int, n: int, h: int) -> Any:  # noqa: ANN401
        own, gammas, scale, by_token = decays
        if not by_token:
            return factors, h
        mask, xi, zeta, carry = own
        C, keep, rest = xi.shape[1], number(1), number(1)
        for j in range(n):
            gamma, row, before = gammas[begin + j, h], mask[0, j], mask[0, max(j - 1, 0)]
            for i in range(j):
                row[i] = before[i] * gamma
            row[j] = scale
            keep *= gamma
            xi[0, j] = keep * scale
        for j in range(n - 1, -1, -1):
            zeta[0, C - n + j] = rest
            rest *= gammas[begin + j, h]
        carry[0, n] = keep
        return own, 0

    return decays, weights


def _compile_forward(compiler: jit.Compiler, gemm: PackedGemm, number: type) -> Any:  # noqa: ANN401
    array, thread, threads = compiler.array, compiler.thread, compiler.threads
    empty, view, rows, load, store, transpose, scale, mask_scores, product = gemm
    inputs, chunk_at = _compile_inputs(compiler, number), _compile_chunk_at(compiler)
    decays, weights = _compile_decays(compiler, number)

    @compiler.kernel
    def retention_chunkwise_forward_numba(table: Any) -> None:  # noqa: ANN401
        (H, N, C, K, V, together), (q, k, v, state), (starts, lengths, order), factors = inputs(table)
        by_token = decays(table)
        out = array(table[AT.out], v.shape, number)
        ones = np.ones(max(C, K), number)
        scores, values, outs = empty(1, C, C)[0], empty(1, C, V)[0], empty(1, C, V)[0]
        queries, keys, keys_t = empty(1, C, K)[0], empty(1, C, K)[0], empty(1, K, C)[0]
        groups = (H + together - 1) // together
        states = empty(together, K, V)
        for task in range(thread(), N * groups, threads()):
            row, first = order[task // groups], task % groups * together
            heads, start, last = min(together, H - first), starts[row], starts[row] + lengths[row]
            for i in range(heads):
                load(view(states[i], K, V), state[row * H + first + i], 0, K, 0, ones)
            for step in range((last - start + C - 1) // C * heads):
                begin, n, h = chunk_at(step, heads, first, start, last, C)
                after = chunk_at(step + 1, heads, first, start, last, C)
                (mask, xi, zeta, carry), w = weights(factors, by_token, begin, n, h)
                S = view(states[step % heads], K, V)
                A, vc, oc = view(scores, n, n), view(values, n, V), view(outs, n, V)
                qc, kc, kt = view(queries, n, K), view(keys, n, K), view(keys_t, K, n)
                load(qc, q, begin, n, h, ones)
                load(kc, k, begin, n, h, ones)
                transpose(kc, kt)
                load(vc, v, begin, n, h, ones)
                product(qc, False, kt, A, 0.0, LOWER_RESULT, (rows(out, begin, n, h),))
                mask_scores(A, mask[w], n)
                product(A, False, vc, oc, 0.0, LOWER_LEFT, (rows(q, *after),))
                scale(qc, xi[w], n)
                product(qc, False, S, oc, 1.0, ALL, (rows(k, *after),))
                store(oc, out, begin, n, h, False)
                scale(kc, zeta[w, C - n :], n)
                product(kc, True, vc, S, carry[w, n], ALL, (rows(v, *after),))
            for i in range(heads):
                store(view(states[i], K, V), state[row * H + first + i], 0, K, 0, False)

    return retention_chunkwise_forward_numba


def _compile_backward(compiler: jit.Compiler, gemm: PackedGemm, number: type) -> Any:  # noqa: ANN401
    array, thread, threads = compiler.array, compiler.thread, compiler.threads
    empty, view, rows, load, store, transpose, scale, mask_scores, product = gemm
    inputs, chunk_at = _compile_inputs(compiler, number), _compile_chunk_at(compiler)
    decays, weights = _compile_decays(compiler, number)

    @compiler.kernel
    def retention_chunkwise_backward_numba(table: Any) -> None:  # noqa: ANN401
        (H, N, C, K, V, together), (q, k, v, state), (starts, lengths, order), factors = inputs(table)
        by_token = decays(table)
        g, d_state = array(table[AT.d_out], v.shape, number), array(table[AT.d_state], state.shape, number)
        dq, dk = array(table[AT.dq], q.shape, number), array(table[AT.dk], k.shape, number)
        dv = array(table[AT.dv], v.shape, number)
        ones = np.ones(max(C, K), number)
        scores, d_scores = empty(1, C, C)[0], empty(1, C, C)[0]
        queries, keys, keys_t, d_keys = (
            empty(1, C, K)[0],
            empty(1, C, K)[0],
            empty(1, K, C)[0],
            empty(1, C, K)[0],
        )
        values, values_t, d_outs = empty(1, C, V)[0], empty(1, V, C)[0], empty(1, C, V)[0]
        groups = (H + together - 1) // together
        states, spare = empty(together, K, V), empty(1, K, V)[0]
        nothing = (rows(q, 0, 0, 0),)
        for task in range(thread(), N * groups, threads()):
            row, first = order[task // groups], task % groups * together
            heads, start, last = min(together, H - first), starts[row], starts[row] + lengths[row]
            for i in range(heads):
                load(view(spare, K, V), state[row * H + first + i], 0, K, 0, ones)
                transpose(view(spare, K, V), view(states[i], V, K))
            chunks = (last - start + C - 1) // C
            # Forwards in time, S runs along: what it gives to dq.
            for step in range(chunks * heads):
                begin, n, h = chunk_at(step, heads, first, start, last, C)
                after = chunk_at(step + 1, heads, first, start, last, C)
                (_, xi, zeta, carry), w = weights(factors, by_token, begin, n, h)
                S_t = view(states[step % heads], V, K)
                kc, vc = view(keys, n, K), view(values, n, V)
                gc, dkc = view(d_outs, n, V), view(d_keys, n, K)
                load(gc, g, begin, n, h, ones)
                product(gc, False, S_t, dkc, 0.0, ALL, (rows(dq, begin, n, h), rows(k, *after)))
                scale(dkc, xi[w], n)
                store(dkc, dq, begin, n, h, False)
                if begin + n < last:
                    load(kc, k, begin, n, h, zeta[w, C - n :])
                    load(vc, v, begin, n, h, ones)
                    product(vc, True, kc, S_t, carry[w, n], ALL, (rows(v, *after), rows(g, *after)))
            for i in range(heads):
                load(view(states[i], K, V), d_state[row * H + first + i], 0, K, 0, ones)
            # Backwards in time, dS runs along: everything else.
            for step in range(chunks * heads - 1, -1, -1):
                begin, n, h = chunk_at(step, heads, first, start, last, C)
                after = chunk_at(step - 1, heads, first, start, last, C)
                (mask, xi, zeta, carry), w = weights(factors, by_token, begin, n, h)
                dS = view(states[step % heads], K, V)
                A, G = view(scores, n, n), view(d_scores, n, n)
                qc, kc, kt = view(queries, n, K), view(keys, n, K), view(keys_t, K, n)
                vt, gc = view(values_t, V, n), view(d_outs, n, V)
                vc, dkc = view(values, n, V), view(d_keys, n, K)
                load(qc, q, begin, n, h, ones)
                load(kc, k, begin, n, h, ones)
                load(vc, v, begin, n, h, ones)
                load(gc, g, begin, n, h, ones)
                transpose(vc, vt)
                product(gc, False, vt, G, 0.0, LOWER_RESULT, (rows(dq, begin, n, h),))
                mask_scores(G, mask[w], n)
                product(G, False, kc, dkc, 0.0, LOWER_LEFT, nothing)
                store(dkc, dq, begin, n, h, True)
                transpose(kc, kt)
                product(qc, False, kt, A, 0.0, LOWER_RESULT, nothing)
                mask_scores(A, mask[w], n)
                product(dS, False, vt, kt, 0.0, ALL, (rows(dk, begin, n, h), rows(q, *after)))
                transpose(kt, dkc)
                scale(dkc, zeta[w, C - n :], n)
                product(G, True, qc, dkc, 1.0, UPPER_LEFT, nothing)
                store(dkc, dk, begin, n, h, False)
                scale(kc, zeta[w, C - n :], n)
                product(kc, False, dS, vc, 0.0, ALL, (rows(dv, begin, n, h), rows(k, *after)))
                product(A, True, gc, vc, 1.0, UPPER_LEFT, (rows(v, *after),))
                store(vc, dv, begin, n, h, False)
                scale(qc, xi[w], n)
                product(qc, True, gc, dS, carry[w, n], ALL, (rows(g, *after),))
            for i in range(heads):
                store(view(states[i], K, V), d_state[row * H + first + i], 0, K, 0, False)

    return retention_chunkwise_backward_numba
