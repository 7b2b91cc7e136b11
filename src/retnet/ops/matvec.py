"""Compiled products of weights with a few rows: every weight is read once, at the speed of the memory.

Weights are fp32, or int8 with one fp32 scale a row, a quarter of the bytes: one source, compiled once for each. int8 numbers
become fp32 in registers, and a row's scale multiplies its finished dot product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from retnet.ops import native

AHEAD = 4096  # bytes of a weight that a thread begins to read before it waits for the others


class Matvec(NamedTuple):
    """Compiled functions of weights, which are pairs: numbers [N,K], and a scale for each row where they are int8.

    The rows of a weight are shared out among the threads of a team in order: thread i of n has N·i/n to N·(i+1)/n.
    """

    matrix: Callable[..., Any]  # matrix(address, scales, N, K): the weight that lies there
    rows: Callable[..., None]  # rows(x, weight, out, first): this thread's share of out[:, first:] = x Wᵀ
    dot: Callable[..., Any]  # dot(weight, r, x): row r of W times x
    fetch: Callable[..., None]  # fetch(weight): begins to read this thread's share


def compile_matvec(compiler: native.Compiler, number: type) -> Matvec:
    """For weights of np.float32, or np.int8 with scales."""
    array, thread, threads, prefetch = compiler.array, compiler.thread, compiler.threads, compiler.prefetch
    scaled, item = number is np.int8, np.dtype(number).itemsize

    @compiler.function
    def matrix(address: int, scales: int, N: int, K: int) -> Any:  # noqa: ANN401
        return array(address, (N, K), number), array(scales, (N,), np.float32)

    @compiler.function
    def one(w: Any, x: Any) -> Any:  # noqa: ANN401
        s = np.float32(0)
        for j in range(len(w)):
            s += np.float32(w[j]) * x[j]
        return s

    @compiler.function
    def row(x: Any, weight: Any, out: Any, first: int) -> None:  # noqa: ANN401
        numbers, scales = weight
        N, i, n = numbers.shape[0], thread(), threads()
        for r in range(N * i // n, N * (i + 1) // n):
            s = one(numbers[r], x)
            out[first + r] = s * scales[r] if scaled else s

    @compiler.function
    def batch(x: Any, weight: Any, out: Any, first: int) -> None:  # noqa: ANN401
        numbers, scales = weight
        N, i, n, zero = numbers.shape[0], thread(), threads(), np.float32(0)
        for r in range(N * i // n, N * (i + 1) // n):
            w, b, scale = numbers[r], 0, scales[r] if scaled else np.float32(1)
            while b + 4 <= x.shape[0]:  # a weight that is in a register serves four rows
                x0, x1, x2, x3 = x[b], x[b + 1], x[b + 2], x[b + 3]
                s0, s1, s2, s3 = zero, zero, zero, zero
                for j in range(len(w)):
                    wj = np.float32(w[j])
                    s0 += wj * x0[j]
                    s1 += wj * x1[j]
                    s2 += wj * x2[j]
                    s3 += wj * x3[j]
                out[b, first + r], out[b + 1, first + r] = s0 * scale, s1 * scale
                out[b + 2, first + r], out[b + 3, first + r] = s2 * scale, s3 * scale
                b += 4
            for c in range(b, x.shape[0]):
                out[c, first + r] = one(w, x[c]) * scale

    @compiler.function
    def rows(x: Any, weight: Any, out: Any, first: int) -> None:  # noqa: ANN401
        if x.shape[0] == 1:  # by itself, or its loop is compiled worse
            row(x[0], weight, out[0], first)
        else:
            batch(x, weight, out, first)

    @compiler.function
    def dot(weight: Any, r: int, x: Any) -> Any:  # noqa: ANN401
        numbers, scales = weight
        s = one(numbers[r], x)
        return s * scales[r] if scaled else s

    @compiler.function
    def fetch(weight: Any) -> None:  # noqa: ANN401
        numbers, _ = weight
        N, K = numbers.shape
        begin = numbers.ctypes.data + N * thread() // threads() * K * item
        for line in range(begin, begin + AHEAD, 64):
            prefetch(line)

    return Matvec(matrix, rows, dot, fetch)


def compile_product(compiler: native.Compiler, matvec: Matvec) -> Any:  # noqa: ANN401
    """out = x Wᵀ; its table: x [B,K], weight, scales (0: none), out [B,N], B, K, N."""
    array, (matrix, rows, _, _) = compiler.array, matvec

    @compiler.kernel
    def kernel(table: Any) -> None:  # noqa: ANN401
        B, K, N = table[4], table[5], table[6]
        x, out = array(table[0], (B, K), np.float32), array(table[3], (B, N), np.float32)
        rows(x, matrix(table[1], table[2], N, K), out, 0)

    return kernel
