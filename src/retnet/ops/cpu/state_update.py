"""The recurrent step of retention on states in slots: S ← γ S + kᵀ v, o = q S, in one pass over S."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np

from retnet.ops.cpu.jit import Compiler


class StepTable(IntEnum):
    """The table of `compile_step`'s kernel: addresses, then sizes."""

    Q = 0  # [B,H,K]
    K = 1
    V = 2  # [B,H,V]
    LOG_DECAY = 3  # [1,H], or [B,H] by token
    STATE = 4  # [N,H,K,V]
    SLOTS = 5  # int64 [B], −1 is padding; 0: row b has slot b
    OUT = 6  # [B,H,V]
    ROWS = 7
    HEADS = 8
    KEY_DIM = 9
    VALUE_DIM = 10
    STATES = 11
    SCALE = 12  # the bits of an fp64 number
    DECAYS = 13  # rows of LOG_DECAY


def compile_update(compiler: Compiler) -> Callable[..., None]:
    """update(S, keep, key, value, query, out): S = keep · S + keyᵀ value, out = query S."""

    @compiler.function
    def update(S: Any, keep: float, key: Any, value: Any, query: Any, out: Any) -> None:  # noqa: ANN401
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

    return update


def compile_step(compiler: Compiler, update: Callable[..., None]) -> Any:  # noqa: ANN401
    """The kernel of a step of some rows, whose states lie in slots; its table: see `StepTable`."""
    array, numbers, real = compiler.array, compiler.numbers, compiler.real
    thread, threads, count = compiler.thread, compiler.threads, len(StepTable)

    @compiler.kernel
    def retention_step_numba(pointer: Any) -> None:  # noqa: ANN401
        table = numbers(pointer, count)
        B, H, K, V = (
            table[StepTable.ROWS],
            table[StepTable.HEADS],
            table[StepTable.KEY_DIM],
            table[StepTable.VALUE_DIM],
        )
        N, scale = table[StepTable.STATES], np.float32(real(table[StepTable.SCALE]))
        q, k = (
            array(table[StepTable.Q], (B, H, K), np.float32),
            array(table[StepTable.K], (B, H, K), np.float32),
        )
        v, log_decay = (
            array(table[StepTable.V], (B, H, V), np.float32),
            array(table[StepTable.LOG_DECAY], (table[StepTable.DECAYS], H), np.float32),
        )
        state, slots = (
            array(table[StepTable.STATE], (N, H, K, V), np.float32),
            array(table[StepTable.SLOTS], (B,), np.int64),
        )
        out = array(table[StepTable.OUT], (B, H, V), np.float32)
        for task in range(thread(), B * H, threads()):
            b, h = task // H, task % H
            slot = slots[b] if table[StepTable.SLOTS] else b
            if slot < 0:
                out[b, h, :] = 0
                continue
            keep = np.float32(math.exp(log_decay[b % table[StepTable.DECAYS], h]))
            update(state[slot, h], keep, k[b, h], v[b, h], q[b, h] * scale, out[b, h])

    return retention_step_numba
