"""Chunkwise retention on the CPU, compiled: a thread walks a few heads of one sequence, in the cache of its core.

The mathematics are those of `chunkwise`, whose loops over torch's batched products this replaces where numba is
installed. Between products nothing is dispatched and nothing leaves the core's cache, what comes next is fetched
while they run, documents packed in one row are walked where they lie, and the half of a chunk's scores that causality
removes is not computed. What is inside a chunk waits for the backward's second walk here, so that of the gradients
only dq is written twice. A head's result does not depend on how many threads share the work.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retnet.ops.cpu import jit, openmp
from retnet.ops.cpu.gemm import ALL, LOWER_LEFT, LOWER_RESULT, UPPER_LEFT, Panels, compile_panels

CACHE = 1 << 19  # bytes of states that a thread keeps at hand: half of a usual second-level cache
LONGEST = 512  # tokens of a chunk; beyond, its scores no longer fit the caches and torch's loops take over


class Walks(NamedTuple):
    """The sequences to walk, as rows of [M,H,·] tokens, and the factors of `chunkwise` for chunks of C tokens."""

    starts: Tensor  # int64 [N], first token of each
    lengths: Tensor  # int64 [N]
    mask: Tensor  # D · scale [H,C,C]
    xi: Tensor  # ξ · scale [H,C]
    zeta: Tensor  # ζ of a full chunk [H,C]
    carry: Tensor  # γ^n [H,C+1]


class _Kernels(NamedTuple):
    forward: Any
    backward: Any


def available(state: Tensor, chunk: int) -> bool:
    """Whether the kernels can run, and with enough heads for most of the threads; `state` is [N,H,K,V]."""
    heads = state.shape[0] * state.shape[1]
    return chunk <= LONGEST and 2 * heads >= torch.get_num_threads() and _kernels(state.dtype) is not None


def forward(q: Tensor, k: Tensor, v: Tensor, state: Tensor, out: Tensor, walks: Walks) -> None:
    """Fills `out` [M,H,V] and moves `state` [N,H,K,V] to the end, in place; all contiguous, all of the state's type."""
    _run("forward", (q, k, v, state, out), walks)


def backward(
    d_out: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    walks: Walks,
) -> None:
    """Fills `grads` [M,H,·] and moves `d_state` [N,H,K,V] to the begin, in place."""
    _run("backward", (q, k, v, state, d_out, d_state, *grads), walks)


def _run(name: str, tensors: tuple[Tensor, ...], walks: Walks) -> None:
    q, _, v, *_ = tensors
    kernels = _kernels(q.dtype)
    assert kernels is not None
    order = walks.lengths.argsort(
        descending=True, stable=True
    )  # the long first, so that all threads end together
    (M, H, K), V, N = q.shape, v.shape[2], len(order)
    threads = max(1, min(torch.get_num_threads(), H * N))
    together = max(1, min(H, H * N // threads, CACHE // (K * V * v.itemsize)))
    sizes = (M, H, K, V, walks.mask.shape[1], N, together)
    addresses = (x.data_ptr() for x in (*tensors, *walks, order))
    openmp.run(getattr(kernels, name), (*addresses, *sizes), threads)


@cache
def _kernels(dtype: torch.dtype) -> _Kernels | None:
    """Compiled on first use, some seconds, and kept on disk beside this file."""
    if (compiler := jit.compiler()) is None:
        return None
    number = np.float32 if dtype is torch.float32 else np.float64
    panels = compile_panels(compiler, number)
    return _Kernels(_compile_forward(compiler, panels, number), _compile_backward(compiler, panels, number))


def _compile_place(compiler: jit.Compiler) -> Any:  # noqa: ANN401
    """place(step, heads, first, start, last, C): (begin, n, h) of a step, which is a chunk of a head; heads alternate.

    Steps beyond either end have no tokens.
    """

    @compiler.function
    def place(step: int, heads: int, first: int, start: int, last: int, C: int) -> tuple[int, int, int]:
        begin = start + step // heads * C
        return begin, (max(0, min(C, last - begin)) if step >= 0 else 0), first + step % heads

    return place


def _compile_forward(compiler: jit.Compiler, panels: Panels, number: type) -> Any:  # noqa: ANN401
    array, thread, threads = compiler.array, compiler.thread, compiler.threads
    empty, take, rows, load, store, transpose, scale, mask_scores, product = panels
    place = _compile_place(compiler)

    @compiler.kernel
    def kernel(table: Any) -> None:  # noqa: ANN401
        M, H, K, V, C, N = table[12], table[13], table[14], table[15], table[16], table[17]
        together = table[18]
        q, k = array(table[0], (M, H, K), number), array(table[1], (M, H, K), number)
        v, state = array(table[2], (M, H, V), number), array(table[3], (N * H, K, 1, V), number)
        out = array(table[4], (M, H, V), number)
        starts, lengths = array(table[5], (N,), np.int64), array(table[6], (N,), np.int64)
        mask, xi = array(table[7], (H, C, C), number), array(table[8], (H, C), number)
        zeta, carry = array(table[9], (H, C), number), array(table[10], (H, C + 1), number)
        order = array(table[11], (N,), np.int64)
        ones = np.ones(max(C, K), number)
        scores, values, outs = empty(1, C, C)[0], empty(1, C, V)[0], empty(1, C, V)[0]
        queries, keys, keys_t = empty(1, C, K)[0], empty(1, C, K)[0], empty(1, K, C)[0]
        groups = (H + together - 1) // together
        states = empty(together, K, V)
        for task in range(thread(), N * groups, threads()):
            row, first = order[task // groups], task % groups * together
            heads, start, last = min(together, H - first), starts[row], starts[row] + lengths[row]
            for i in range(heads):
                load(take(states[i], K, V), state[row * H + first + i], 0, K, 0, ones)
            for step in range((last - start + C - 1) // C * heads):
                begin, n, h = place(step, heads, first, start, last, C)
                after = place(step + 1, heads, first, start, last, C)
                S = take(states[step % heads], K, V)
                A, vc, oc = take(scores, n, n), take(values, n, V), take(outs, n, V)
                qc, kc, kt = take(queries, n, K), take(keys, n, K), take(keys_t, K, n)
                load(qc, q, begin, n, h, ones)
                load(kc, k, begin, n, h, ones)
                transpose(kc, kt)
                load(vc, v, begin, n, h, ones)
                product(qc, False, kt, A, 0.0, LOWER_RESULT, (rows(out, begin, n, h),))
                mask_scores(A, mask[h], n)
                product(A, False, vc, oc, 0.0, LOWER_LEFT, (rows(q, *after),))
                scale(qc, xi[h], n)
                product(qc, False, S, oc, 1.0, ALL, (rows(k, *after),))
                store(oc, out, begin, n, h, False)
                scale(kc, zeta[h, C - n :], n)
                product(kc, True, vc, S, carry[h, n], ALL, (rows(v, *after),))
            for i in range(heads):
                store(take(states[i], K, V), state[row * H + first + i], 0, K, 0, False)

    return kernel


def _compile_backward(compiler: jit.Compiler, panels: Panels, number: type) -> Any:  # noqa: ANN401
    array, thread, threads = compiler.array, compiler.thread, compiler.threads
    empty, take, rows, load, store, transpose, scale, mask_scores, product = panels
    place = _compile_place(compiler)

    @compiler.kernel
    def kernel(table: Any) -> None:  # noqa: ANN401
        M, H, K, V, C, N = table[16], table[17], table[18], table[19], table[20], table[21]
        together = table[22]
        q, k = array(table[0], (M, H, K), number), array(table[1], (M, H, K), number)
        v, state = array(table[2], (M, H, V), number), array(table[3], (N * H, K, 1, V), number)
        g, d_state = array(table[4], (M, H, V), number), array(table[5], (N * H, K, 1, V), number)
        dq, dk = array(table[6], (M, H, K), number), array(table[7], (M, H, K), number)
        dv = array(table[8], (M, H, V), number)
        starts, lengths = array(table[9], (N,), np.int64), array(table[10], (N,), np.int64)
        mask, xi = array(table[11], (H, C, C), number), array(table[12], (H, C), number)
        zeta, carry = array(table[13], (H, C), number), array(table[14], (H, C + 1), number)
        order = array(table[15], (N,), np.int64)
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
                load(take(spare, K, V), state[row * H + first + i], 0, K, 0, ones)
                transpose(take(spare, K, V), take(states[i], V, K))
            chunks = (last - start + C - 1) // C
            # Forwards in time, S runs along: what it gives to dq.
            for step in range(chunks * heads):
                begin, n, h = place(step, heads, first, start, last, C)
                after = place(step + 1, heads, first, start, last, C)
                S_t = take(states[step % heads], V, K)
                kc, vc = take(keys, n, K), take(values, n, V)
                gc, dkc = take(d_outs, n, V), take(d_keys, n, K)
                load(gc, g, begin, n, h, ones)
                product(gc, False, S_t, dkc, 0.0, ALL, (rows(dq, begin, n, h), rows(k, *after)))
                scale(dkc, xi[h], n)
                store(dkc, dq, begin, n, h, False)
                if begin + n < last:
                    load(kc, k, begin, n, h, zeta[h, C - n :])
                    load(vc, v, begin, n, h, ones)
                    product(vc, True, kc, S_t, carry[h, n], ALL, (rows(v, *after), rows(g, *after)))
            for i in range(heads):
                load(take(states[i], K, V), d_state[row * H + first + i], 0, K, 0, ones)
            # Backwards in time, dS runs along: everything else.
            for step in range(chunks * heads - 1, -1, -1):
                begin, n, h = place(step, heads, first, start, last, C)
                after = place(step - 1, heads, first, start, last, C)
                dS = take(states[step % heads], K, V)
                A, G = take(scores, n, n), take(d_scores, n, n)
                qc, kc, kt = take(queries, n, K), take(keys, n, K), take(keys_t, K, n)
                vt, gc = take(values_t, V, n), take(d_outs, n, V)
                vc, dkc = take(values, n, V), take(d_keys, n, K)
                load(qc, q, begin, n, h, ones)
                load(kc, k, begin, n, h, ones)
                load(vc, v, begin, n, h, ones)
                load(gc, g, begin, n, h, ones)
                transpose(vc, vt)
                product(gc, False, vt, G, 0.0, LOWER_RESULT, (rows(dq, begin, n, h),))
                mask_scores(G, mask[h], n)
                product(G, False, kc, dkc, 0.0, LOWER_LEFT, nothing)
                store(dkc, dq, begin, n, h, True)
                transpose(kc, kt)
                product(qc, False, kt, A, 0.0, LOWER_RESULT, nothing)
                mask_scores(A, mask[h], n)
                product(dS, False, vt, kt, 0.0, ALL, (rows(dk, begin, n, h), rows(q, *after)))
                transpose(kt, dkc)
                scale(dkc, zeta[h, C - n :], n)
                product(G, True, qc, dkc, 1.0, UPPER_LEFT, nothing)
                store(dkc, dk, begin, n, h, False)
                scale(kc, zeta[h, C - n :], n)
                product(kc, False, dS, vc, 0.0, ALL, (rows(dv, begin, n, h), rows(k, *after)))
                product(A, True, gc, vc, 1.0, UPPER_LEFT, (rows(v, *after),))
                store(vc, dv, begin, n, h, False)
                scale(qc, xi[h], n)
                product(qc, True, gc, dS, carry[h, n], ALL, (rows(g, *after),))
            for i in range(heads):
                store(take(states[i], K, V), d_state[row * H + first + i], 0, K, 0, False)

    return kernel
