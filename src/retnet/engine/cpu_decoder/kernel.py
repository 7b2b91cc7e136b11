"""The compiled step of a model: one token a row through all blocks, and through the ends, in one call.

A team of threads enters once a token. A thread waits for the others only where it needs what they have computed. The
residual stream is small, so every thread keeps one of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from retnet.ops.cpu.gemv import Matvec
from retnet.ops.cpu.jit import Compiler


def compile_walk(compiler: Compiler, matvec: Matvec, advance: Callable[..., None]) -> Any:  # noqa: ANN401
    """A token through blocks.

    The kernel's table: address of the plan's table (`table.make_plan`), B, x [B,D] or tokens [B], out [B,D] or
    logits, working memory; then of each block its state [B,H,K,V] and positions [B], which move on by one.
    """
    array, thread, barrier = compiler.array, compiler.thread, compiler.barrier
    matrix, rows = matvec
    real = compiler.real
    normed, mix, activate, enter = _compile_parts(compiler, matvec, advance)

    @compiler.function
    def share(memory: int, B: int, plan: Any) -> Any:  # noqa: ANN401
        """What threads give each other: projections [B,2·H·(K+V)], heads [B,H·V], sums [B,D], hidden and its gates [B,N]."""
        D, H, K, V, N = plan[0], plan[1], plan[2], plan[3], plan[4]
        heads = memory + 4 * B * 2 * H * (K + V)
        sums = heads + 4 * B * H * V
        hidden = sums + 4 * B * D
        return (
            array(memory, (B, 2 * H * (K + V)), np.float32),
            array(heads, (B, H * V), np.float32),
            array(sums, (B, D), np.float32),
            array(hidden, (B, N), np.float32),
            array(hidden + 4 * B * N, (B, N), np.float32),
        )

    @compiler.kernel
    def kernel(table: Any) -> None:  # noqa: ANN401
        B, plan, ends = table[1], array(table[0], (15,), np.int64), array(table[0] + 8 * 15, (10,), np.int64)
        D, H, K, V, N, count = plan[0], plan[1], plan[2], plan[3], plan[4], plan[13]
        eps, whole = real(plan[12]), plan[14]
        blocks = array(table[0] + 8 * 25, (count, 22), np.int64)
        projected, heads, sums, hidden, gates = share(table[4], B, plan)
        x, z = np.empty((B, D), np.float32), np.empty((B, D), np.float32)
        cos, sin = np.empty((B, K // 2), np.float32), np.empty((B, K // 2), np.float32)
        known = np.full(K // 2 + B, np.nan)  # what cos and sin are of: theta, positions
        if whole:
            enter(plan, ends, array(table[2], (B,), np.int64), x, z)
        else:
            x[:] = array(table[2], (B, D), np.float32)
        for layer in range(count):
            block = blocks[layer]
            S, at = (
                array(table[5 + 2 * layer], (B, H, K, V), np.float32),
                array(table[6 + 2 * layer], (B,), np.int64),
            )
            wo, fc1 = matrix(block[8], block[18], D, H * V), matrix(block[9], block[19], N, D)
            fc2 = matrix(block[11], block[21], D, N)
            normed(x, block[0], block[1], eps, z)
            mix(plan, block, z, S, at, (projected, heads, known, cos, sin))
            barrier()
            rows(heads, wo, sums, 0)
            barrier()
            if thread() == 0:
                for b in range(B):
                    at[b] += 1
            x += sums
            normed(x, block[2], block[3], eps, z)
            rows(z, fc1, hidden, 0)
            if plan[9]:
                rows(z, matrix(block[10], block[20], N, D), gates, 0)
            activate(plan, hidden, gates)
            barrier()
            rows(hidden, fc2, sums, 0)
            barrier()
            x += sums
        if whole:
            normed(x, ends[6], ends[7], eps, z)
            rows(z, matrix(ends[8], ends[9], ends[1], D), array(table[3], (B, ends[1]), np.float32), 0)
        elif thread() == 0:
            array(table[3], (B, D), np.float32)[:] = x

    return kernel


def _compile_parts(compiler: Compiler, matvec: Matvec, advance: Callable[..., None]) -> Any:  # noqa: ANN401
    array, thread, threads, barrier = compiler.array, compiler.thread, compiler.threads, compiler.barrier
    matrix, rows = matvec
    real = compiler.real

    @compiler.function
    def normed(x: Any, weight: int, bias: int, eps: float, y: Any) -> None:  # noqa: ANN401
        """LayerNorm, or without bias RMSNorm."""
        D = x.shape[1]
        weights, biases = array(weight, (D,), np.float32), array(bias, (D,), np.float32)
        for b in range(x.shape[0]):
            row, to, mean, square = x[b], y[b], 0.0, 0.0
            if bias:
                for j in range(D):
                    mean += row[j]
                mean /= D
            for j in range(D):
                square += (row[j] - mean) ** 2
            shrink = 1 / math.sqrt(square / D + eps)
            for j in range(D):
                to[j] = (row[j] - mean) * shrink * weights[j] + (biases[j] if bias else 0)

    @compiler.function
    def find_angles(theta: Any, position: Any, known: Any, cos: Any, sin: Any) -> None:  # noqa: ANN401
        """Of position · theta [B,K/2], unless they are those of the block before."""
        half, same = len(theta), True
        for i in range(half):
            same &= known[i] == theta[i]
        for b in range(len(position)):
            if same and known[half + b] == position[b]:
                continue
            for i in range(half):
                angle = position[b] * theta[i]
                cos[b, i], sin[b, i] = math.cos(angle), math.sin(angle)
            known[half + b] = position[b]
        known[:half] = theta

    @compiler.function
    def turn(x: Any, cos: Any, sin: Any, layout: int) -> None:  # noqa: ANN401
        half = len(cos)
        for i in range(half):
            m, n = (2 * i, 2 * i + 1) if layout == 1 else (i, i + half)
            x[m], x[n] = x[m] * cos[i] - x[n] * sin[i], x[n] * cos[i] + x[m] * sin[i]

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

    @compiler.function
    def mix(plan: Any, block: Any, z: Any, S: Any, position: Any, memory: Any) -> None:  # noqa: ANN401
        """MSR(z) but for its last product: this thread's share of the heads, normalised and gated."""
        (B, H, K, V), D, i, n = S.shape, z.shape[1], thread(), threads()
        gated, layout, bridge, norm, eps = plan[5], plan[6], plan[7] != 0, plan[8], real(plan[11])
        log_decay, theta = array(block[12], (H,), np.float32), array(block[13], (K // 2,), np.float64)
        projected, heads, known, cos, sin = memory
        rows(z, matrix(block[4], block[14], H * K, D), projected, 0)
        rows(z, matrix(block[5], block[15], H * K, D), projected, H * K)
        rows(z, matrix(block[6], block[16], H * V, D), projected, 2 * H * K)
        if gated:
            rows(z, matrix(block[7], block[17], H * V, D), projected, H * (2 * K + V))
        if H % n:  # else a thread has computed all that its heads need
            barrier()
        if layout:
            find_angles(theta, position, known, cos, sin)
        for task in range(B * H * i // n, B * H * (i + 1) // n):
            h, b = task // B, task % B
            row, first = projected[b], 2 * H * K + h * V
            query, key = row[h * K : (h + 1) * K], row[(H + h) * K : (H + h + 1) * K]
            o = heads[b][h * V : (h + 1) * V]
            if layout:
                turn(query, cos[b], sin[b], layout)
                turn(key, cos[b], sin[b], layout)
            for j in range(K):
                query[j] *= np.float32(1 / math.sqrt(K))
            advance(S[b, h], np.float32(math.exp(log_decay[h])), key, row[first : first + V], query, o)
            normalise(o, norm, eps, log_decay[h], position[b] + 1, bridge)
            if gated:
                gate = row[first + H * V : first + (H + 1) * V]
                for j in range(V):
                    o[j] *= gate[j] / (1 + math.exp(-gate[j]))

    @compiler.function
    def activate(plan: Any, hidden: Any, gates: Any) -> None:  # noqa: ANN401
        """What is between the FFN's products, for this thread's share of the first."""
        N, gated, silu, i, n = plan[4], plan[9], plan[10], thread(), threads()
        for b in range(hidden.shape[0]):
            for r in range(N * i // n, N * (i + 1) // n):
                h = hidden[b, r]
                a = h / (1 + math.exp(-h)) if silu else 0.5 * h * (1 + math.erf(h * math.sqrt(0.5)))
                hidden[b, r] = a * gates[b, r] if gated else a

    @compiler.function
    def enter(plan: Any, ends: Any, tokens: Any, x: Any, z: Any) -> None:  # noqa: ANN401
        """x = what the first block reads."""
        scale, D = np.float32(real(ends[2])), x.shape[1]
        embedding = array(ends[3], (ends[0], D), np.float32)
        for b in range(len(tokens)):
            row = embedding[tokens[b]]
            for j in range(D):
                x[b, j] = row[j] * scale
        if ends[4]:
            normed(x, ends[4], ends[5], real(plan[12]), z)
            x[:] = z

    return normed, mix, activate, enter
