"""The compiled step of states alone: S ← γ S + kᵀ v, o = q S, in one pass over S."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from retnet.ops.cpu import jit


def compile_advance(compiler: jit.Compiler) -> Callable[..., None]:
    """advance(S, keep, key, value, query, out): S = keep · S + keyᵀ value, out = query S."""

    @compiler.function
    def advance(S: Any, keep: float, key: Any, value: Any, query: Any, out: Any) -> None:  # noqa: ANN401
        out[:] = 0
        # Four rows at a time, far apart: as many streams for the memory, and `out` is touched less.
        n = len(key) // 4
        for i in range(n):
            a, b, c, d = S[i], S[i + n], S[i + 2 * n], S[i + 3 * n]
            ka, kb, kc, kd = key[i], key[i + n], key[i + 2 * n], key[i + 3 * n]
            qa, qb, qc, qd = query[i], query[i + n], query[i + 2 * n], query[i + 3 * n]
            for j in range(len(value)):
                vj = value[j]
                aj, bj = keep * a[j] + ka * vj, keep * b[j] + kb * vj
                cj, dj = keep * c[j] + kc * vj, keep * d[j] + kd * vj
                a[j], b[j], c[j], d[j] = aj, bj, cj, dj
                out[j] += qa * aj + qb * bj + qc * cj + qd * dj
        for i in range(4 * n, len(key)):
            row, ki, qi = S[i], key[i], query[i]
            for j in range(len(value)):
                s = keep * row[j] + ki * value[j]
                row[j] = s
                out[j] += qi * s

    return advance


def compile_step(compiler: jit.Compiler, advance: Callable[..., None]) -> Any:  # noqa: ANN401
    """A step of B rows; its table: q, k, v, log_decay, state, slots (0: row b has slot b), out, B, H, K, V, N, scale."""
    array, real, thread, threads = compiler.array, compiler.real, compiler.thread, compiler.threads

    @compiler.kernel
    def kernel(table: Any) -> None:  # noqa: ANN401
        B, H, K, V, N = table[7], table[8], table[9], table[10], table[11]
        scale = np.float32(real(table[12]))
        q, k = array(table[0], (B, H, K), np.float32), array(table[1], (B, H, K), np.float32)
        v, log_decay = array(table[2], (B, H, V), np.float32), array(table[3], (H,), np.float32)
        state, slots = array(table[4], (N, H, K, V), np.float32), array(table[5], (B,), np.int64)
        out = array(table[6], (B, H, V), np.float32)
        for task in range(thread(), B * H, threads()):
            b, h = task // H, task % H
            slot = slots[b] if table[5] else b
            if slot < 0:
                out[b, h, :] = 0
                continue
            keep = np.float32(math.exp(log_decay[h]))
            advance(state[slot, h], keep, k[b, h], v[b, h], q[b, h] * scale, out[b, h])

    return kernel
