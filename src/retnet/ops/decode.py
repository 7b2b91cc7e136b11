"""Decoding on a CPU: every weight and every state is read once, at the speed of the memory, in few calls.

torch's matrix product with a few rows runs on one thread at a third of that thread's bandwidth, updates a state in three
passes, and dispatches seventy small operators a layer. The kernels here, compiled by numba where it is installed, do the
same in one pass on all of torch's threads. Where they cannot run (no numba, another type, a gradient) the functions return
None, which means "compose it from the parts"; the parts are the law, and the kernels are tested against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retnet.ops import native

MAX_ROWS = 8  # beyond, torch's matrix product is the faster one
MIN_SIZE = 1 << 14  # numbers in a weight; below, torch's overhead is the smaller one

_NORMS = {"none": 0, "group": 1, "rms": 2}
_LAYOUTS = {"none": 0, "interleaved": 1, "halves": 2}


class Core(NamedTuple):
    """Multi-scale retention, as the kernel of a block reads it: weights [out,in] and constants of a mixer."""

    q: Tensor  # [H·K,D]
    k: Tensor  # [H·K,D]
    v: Tensor  # [H·V,D]
    gate: Tensor | None  # [H·V,D]
    out: Tensor  # [D,H·V]
    log_decay: Tensor  # [H] fp32
    theta: Tensor  # [K/2] fp64, empty without rotation
    layout: str  # "interleaved", "halves" or "none"
    bridge: bool  # rows divided by √Σγ before the norm (score_norm "decay")
    norm: str  # "group", "rms" or "none"
    eps: float


class Shell(NamedTuple):
    """What a block has around its mixer: two norms (without bias: RMSNorm) and the FFN."""

    mixer_norm: Tensor  # [D]
    mixer_bias: Tensor | None  # [D]
    ffn_norm: Tensor  # [D]
    ffn_bias: Tensor | None  # [D]
    fc1: Tensor  # [N,D]
    gate: Tensor | None  # [N,D]
    fc2: Tensor  # [D,N]
    norm_eps: float
    act: str  # "gelu" or "silu"


class _Kernels(NamedTuple):
    product: Any
    block: Any
    step: Any


def few_rows(x: Tensor, weight: Tensor) -> Tensor | None:
    """x Wᵀ: fp32 x [B,K] and weight [N,K] → [B,N]; None where the kernel cannot run."""
    if not _eligible(x, weight) or (kernels := _kernels()) is None:
        return None
    x, (N, K) = x.contiguous(), weight.shape
    out = torch.empty(x.shape[0], N)
    native.run(kernels.product, (x, weight, out), (x.shape[0], K, N))
    return out


def retention_block(x: Tensor, position: Tensor, state: Tensor, core: Core, shell: Shell) -> Tensor | None:
    """One step of a whole block (paper §3) in one call: y = x + MSR(norm(x)), then y + FFN(norm(y)).

    Args:
        x: fp32 [B,D].
        position: int64 [B], of this token; moved on by one, in place.
        state: [B,H,K,V] fp32, contiguous, updated in place.
        core: the mixer, fp32, contiguous.
        shell: the rest of the block, fp32, contiguous.

    Returns:
        [B,D], or None, and nothing done, where the kernel cannot run: other types, devices, no numba, a gradient.
    """
    weights = (*shell[:2], *core[:5], *shell[2:7])
    used = (state, core.log_decay, *[w for w in weights if w is not None])
    if not _eligible(x, shell.fc1) or not all(w.dtype is torch.float32 and w.is_contiguous() for w in used):
        return None
    if (kernels := _kernels()) is None:
        return None
    (B, D), (_, H, K, V), N = x.shape, state.shape, shell.fc1.shape[0]
    memory, y = torch.empty(B * (2 * H * (K + V) + H * V + D + N)), torch.empty(B, D)
    x = x.contiguous()
    tensors = (
        x,
        *[x if w is None else w for w in weights],
        memory,
        y,
        position,
        state,
        core.log_decay,
        core.theta,
    )
    flags = (
        core.gate is not None,
        _LAYOUTS[core.layout],
        core.bridge,
        _NORMS[core.norm],
        shell.mixer_bias is not None,
        shell.gate is not None,
        shell.act == "silu",
    )
    native.run(kernels.block, tensors, (B, D, H, K, V, N, *flags), (core.eps, shell.norm_eps))
    return y


def state_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor, scale: float
) -> Tensor | None:
    """`retnet.ops.retention_step` for fp32, in one pass over the state; None where the kernel cannot run.

    Args:
        q: [B,H,K].
        k: [B,H,K].
        v: [B,H,V].
        log_decay: fp32 [H].
        state: [N,H,K,V], contiguous, updated in place.
        slots: int64 [B], the row of `state` of each batch row; −1 is padding, whose output is zero.
        scale: factor of the query-key products.
    """
    if any(x.dtype is not torch.float32 for x in (q, k, v, state)) or (kernels := _kernels()) is None:
        return None
    q, k, v, slots = (x.contiguous() for x in (q, k, v, slots))
    out = torch.empty(v.shape)
    numbers = (*q.shape, v.shape[2], state.shape[0])
    native.run(kernels.step, (q, k, v, log_decay.float(), state, slots, out), numbers, (scale,))
    return out


def _eligible(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype is torch.float32
        and x.dim() == 2
        and x.shape[0] <= MAX_ROWS
        and x.is_cpu
        and weight.numel() >= MIN_SIZE
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def _kernels() -> _Kernels | None:
    """Compiled on first use, a few seconds, and kept on disk beside this file."""
    if (compiler := native.compiler()) is None:
        return None
    rows, advance = _compile_rows(compiler), _compile_advance(compiler)
    return _Kernels(
        _compile_product(compiler, rows),
        _compile_block(compiler, rows, advance),
        _compile_step(compiler, advance),
    )


def _compile_rows(compiler: native.Compiler) -> Callable[..., None]:
    """rows(x, weight, out, first): this thread's share of out[:, first:] = x Wᵀ."""
    thread, threads = compiler.thread, compiler.threads

    @compiler.function
    def rows(x: Any, weight: Any, out: Any, first: int) -> None:  # noqa: ANN401
        N, i, n = weight.shape[0], thread(), threads()
        for r in range(N * i // n, N * (i + 1) // n):
            w, b = weight[r], 0
            while b + 4 <= x.shape[0]:  # a weight that is in a register serves four rows
                x0, x1, x2, x3 = x[b], x[b + 1], x[b + 2], x[b + 3]
                s0, s1, s2, s3 = w[0] * 0, w[0] * 0, w[0] * 0, w[0] * 0
                for j in range(len(w)):
                    s0 += w[j] * x0[j]
                    s1 += w[j] * x1[j]
                    s2 += w[j] * x2[j]
                    s3 += w[j] * x3[j]
                out[b, first + r], out[b + 1, first + r] = s0, s1
                out[b + 2, first + r], out[b + 3, first + r] = s2, s3
                b += 4
            for c in range(b, x.shape[0]):
                row, s = x[c], w[0] * 0
                for j in range(len(w)):
                    s += w[j] * row[j]
                out[c, first + r] = s

    return rows


def _compile_advance(compiler: native.Compiler) -> Callable[..., None]:
    """advance(S, keep, key, value, query, out): S = keep · S + keyᵀ value, out = query S, in one pass over S."""

    @compiler.function
    def advance(S: Any, keep: float, key: Any, value: Any, query: Any, out: Any) -> None:  # noqa: ANN401
        out[:] = 0
        for i in range(len(key)):
            row, ki, qi = S[i], key[i], query[i]
            for j in range(len(value)):
                s = keep * row[j] + ki * value[j]
                row[j] = s
                out[j] += qi * s

    return advance


def _compile_product(compiler: native.Compiler, rows: Callable[..., None]) -> Any:  # noqa: ANN401
    array = compiler.array

    @compiler.kernel
    def kernel(table: Any) -> None:  # noqa: ANN401
        B, K, N = table[3], table[4], table[5]
        x, weight = array(table[0], (B, K), np.float32), array(table[1], (N, K), np.float32)
        rows(x, weight, array(table[2], (B, N), np.float32), 0)

    return kernel


def _compile_block(compiler: native.Compiler, rows: Callable[..., None], advance: Callable[..., None]) -> Any:  # noqa: ANN401
    array, thread, threads, barrier = compiler.array, compiler.thread, compiler.threads, compiler.barrier

    @compiler.function
    def dot(w: Any, x: Any) -> Any:  # noqa: ANN401
        s = w[0] * 0
        for j in range(len(w)):
            s += w[j] * x[j]
        return s

    @compiler.function
    def normed(x: Any, weight: Any, bias: Any, centred: bool, eps: float) -> Any:  # noqa: ANN401
        y = np.empty_like(x)
        for b in range(x.shape[0]):
            row, mean, square = x[b], 0.0, 0.0
            if centred:
                for j in range(len(row)):
                    mean += row[j]
                mean /= len(row)
            for j in range(len(row)):
                square += (row[j] - mean) ** 2
            shrink = 1 / math.sqrt(square / len(row) + eps)
            for j in range(len(row)):
                y[b, j] = (row[j] - mean) * shrink * weight[j] + (bias[j] if centred else 0)
        return y

    @compiler.function
    def turn(query: Any, key: Any, position: int, theta: Any, layout: int) -> None:  # noqa: ANN401
        half = len(theta)
        for i in range(half if layout > 0 else 0):
            angle = (position * theta[i]) % (2 * math.pi)
            cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
            m, n = (2 * i, 2 * i + 1) if layout == 1 else (i, i + half)
            query[m], query[n] = query[m] * cos - query[n] * sin, query[n] * cos + query[m] * sin
            key[m], key[n] = key[m] * cos - key[n] * sin, key[n] * cos + key[m] * sin

    @compiler.function
    def normalise(y: Any, norm: int, eps: float, log_decay: float, seen: int, bridge: bool) -> None:  # noqa: ANN401
        shrink, mean, square = 1.0, 0.0, 0.0
        if bridge:
            full = seen if log_decay == 0 else math.expm1(seen * log_decay) / math.expm1(log_decay)
            shrink = 1 / math.sqrt(full)
        if norm == 1:
            for j in range(len(y)):
                mean += y[j]
            mean /= len(y)
        if norm > 0:
            for j in range(len(y)):
                square += (y[j] - mean) ** 2
            shrink /= math.sqrt(square / len(y) * shrink * shrink + eps)
        for j in range(len(y)):
            y[j] = (y[j] - mean) * shrink

    @compiler.kernel
    def kernel(table: Any) -> None:  # noqa: ANN401
        B, D, H, K, V, N = table[19], table[20], table[21], table[22], table[23], table[24]
        gated, layout, bridge, norm = table[25], table[26], table[27], table[28]
        centred, ffn_gated, silu = table[29], table[30], table[31]
        reals = array(table[32], (2,), np.float64)
        x = array(table[0], (B, D), np.float32)
        mixer_norm, mixer_bias = array(table[1], (D,), np.float32), array(table[2], (D,), np.float32)
        wq, wk = array(table[3], (H * K, D), np.float32), array(table[4], (H * K, D), np.float32)
        wv, wg = array(table[5], (H * V, D), np.float32), array(table[6], (H * V, D), np.float32)
        wo = array(table[7], (D, H * V), np.float32)
        ffn_norm, ffn_bias = array(table[8], (D,), np.float32), array(table[9], (D,), np.float32)
        fc1, fc_gate = array(table[10], (N, D), np.float32), array(table[11], (N, D), np.float32)
        fc2 = array(table[12], (D, N), np.float32)
        memory = array(table[13], (B * (2 * H * (K + V) + H * V + D + N),), np.float32)
        out, position = array(table[14], (B, D), np.float32), array(table[15], (B,), np.int64)
        state, log_decay = array(table[16], (B, H, K, V), np.float32), array(table[17], (H,), np.float32)
        theta = array(table[18], (K // 2,), np.float64)
        heads_at = B * 2 * H * (K + V)
        mixed_at = heads_at + B * H * V
        hidden_at = mixed_at + B * D
        projected = memory[:heads_at].reshape(B, 2 * H * (K + V))
        heads = memory[heads_at:mixed_at].reshape(B, H * V)
        mixed = memory[mixed_at:hidden_at].reshape(B, D)
        hidden = memory[hidden_at:].reshape(B, N)

        z = normed(x, mixer_norm, mixer_bias, centred, reals[1])
        rows(z, wq, projected, 0)
        rows(z, wk, projected, H * K)
        rows(z, wv, projected, 2 * H * K)
        if gated:
            rows(z, wg, projected, H * (2 * K + V))
        barrier()
        for task in range(thread(), B * H, threads()):
            b, h = task // H, task % H
            row = projected[b]
            start = 2 * H * K + h * V
            v, g, o = (
                row[start : start + V],
                row[start + H * V : start + (H + 1) * V],
                heads[b][h * V : (h + 1) * V],
            )
            query, key = row[h * K : (h + 1) * K], row[(H + h) * K : (H + h + 1) * K]
            turn(query, key, position[b], theta, layout)
            for i in range(K):
                query[i] *= np.float32(1 / math.sqrt(K))
            advance(state[b, h], np.float32(math.exp(log_decay[h])), key, v, query, o)
            normalise(o, norm, reals[0], log_decay[h], position[b] + 1, bridge)
            if gated:
                for j in range(V):
                    o[j] *= g[j] / (1 + math.exp(-g[j]))
        barrier()
        rows(heads, wo, mixed, 0)
        barrier()
        if thread() == 0:
            for b in range(B):
                position[b] += 1
        y = x + mixed
        z = normed(y, ffn_norm, ffn_bias, centred, reals[1])
        rows(z, fc1, hidden, 0)
        for r in range(
            N * thread() // threads(), N * (thread() + 1) // threads()
        ):  # what this thread has made
            for b in range(B):
                h = hidden[b, r]
                a = h / (1 + math.exp(-h)) if silu else 0.5 * h * (1 + math.erf(h * math.sqrt(0.5)))
                hidden[b, r] = a * dot(fc_gate[r], z[b]) if ffn_gated else a
        barrier()
        rows(hidden, fc2, out, 0)
        for b in range(B):
            for r in range(D * thread() // threads(), D * (thread() + 1) // threads()):
                out[b, r] += y[b, r]

    return kernel


def _compile_step(compiler: native.Compiler, advance: Callable[..., None]) -> Any:  # noqa: ANN401
    array, thread, threads = compiler.array, compiler.thread, compiler.threads

    @compiler.kernel
    def kernel(table: Any) -> None:  # noqa: ANN401
        B, H, K, V, N = table[7], table[8], table[9], table[10], table[11]
        scale = np.float32(array(table[12], (1,), np.float64)[0])
        q, k = array(table[0], (B, H, K), np.float32), array(table[1], (B, H, K), np.float32)
        v, log_decay = array(table[2], (B, H, V), np.float32), array(table[3], (H,), np.float32)
        state, slots = array(table[4], (N, H, K, V), np.float32), array(table[5], (B,), np.int64)
        out = array(table[6], (B, H, V), np.float32)
        for task in range(thread(), B * H, threads()):
            b, h = task // H, task % H
            if slots[b] < 0:
                out[b, h, :] = 0
                continue
            keep = np.float32(math.exp(log_decay[h]))
            advance(state[slots[b], h], keep, k[b, h], v[b, h], q[b, h] * scale, out[b, h])

    return kernel
