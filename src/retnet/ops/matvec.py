"""Compiled products of weights with a few rows: every weight is read once, at the speed of the memory.

Weights are fp32, or int8 with one fp32 scale a row, a quarter of the bytes: one source, compiled once for each. int8 numbers
become fp32 in registers, and a row's scale multiplies its finished dot product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
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
    fetch: Callable[..., None]  # fetch(weight): begins to read this thread's share


def compile_matvec(compiler: native.Compiler, number: type) -> Matvec:
    """For weights of np.float32, or np.int8 with scales."""
    array, thread, threads, prefetch = compiler.array, compiler.thread, compiler.threads, compiler.prefetch
    scaled, item, widest = number is np.int8, np.dtype(number).itemsize, native.register_bytes() // 4
    one, four, eight = (_compile_dots(number, *size) for size in ((1, 8, 4), (4, widest, 2), (8, widest, 2)))

    @compiler.function
    def matrix(address: int, scales: int, N: int, K: int) -> Any:  # noqa: ANN401
        return array(address, (N, K), number), array(scales, (N,), np.float32)

    @compiler.function
    def row(weight: Any, r: int, x: Any, out: int, stride: int) -> None:  # noqa: ANN401
        """Row r of W times each row of x."""
        numbers, scales = weight
        B, K, b = x.shape[0], x.shape[1], 0
        w, begin = numbers.ctypes.data + r * K * item, x.ctypes.data
        while b + 8 <= B:
            eight(w, begin + 4 * b * K, out + 4 * b * stride, K, stride)
            b += 8
        if b + 4 <= B:
            four(w, begin + 4 * b * K, out + 4 * b * stride, K, stride)
            b += 4
        while b < B:
            one(w, begin + 4 * b * K, out + 4 * b * stride, K, stride)
            b += 1
        if scaled:
            for c in range(B):
                array(out + 4 * c * stride, (1,), np.float32)[0] *= scales[r]

    @compiler.function
    def rows(x: Any, weight: Any, out: Any, first: int) -> None:  # noqa: ANN401
        N, i, n = weight[0].shape[0], thread(), threads()
        for r in range(N * i // n, N * (i + 1) // n):
            row(weight, r, x, out.ctypes.data + 4 * (first + r), out.shape[1])

    @compiler.function
    def fetch(weight: Any) -> None:  # noqa: ANN401
        numbers, _ = weight
        N, K = numbers.shape
        begin = numbers.ctypes.data + N * thread() // threads() * K * item
        for line in range(begin, begin + AHEAD, 64):
            prefetch(line)

    return Matvec(matrix, rows, fetch)


def _compile_dots(number: type, batch: int, lanes: int, unroll: int) -> Any:  # noqa: ANN401
    """dots(w, x, out, n, stride): out[stride · b] = Σ_j w[j] x[b,j] for each row b of `batch`, j < n.

    w, x [batch,n] and out are addresses; w is of `number`, all else fp32. The vectors have `lanes` numbers, which is not
    left to the compiler: with one row the memory is the limit, and it is read 15 % faster in vectors of 32 bytes than in
    those of 64 that the compiler prefers; with several rows arithmetic is. Prefetching, or reading two rows of a weight at
    once, made it slower.
    """
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    whole, real = ir.IntType(64), ir.FloatType()
    kind = real if number is np.float32 else ir.IntType(8)
    fused = ("contract",)  # product and sum are one instruction

    @intrinsic
    def dots(_: Any, w: Any, x: Any, out: Any, n: Any, stride: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ANN401
            w, x, out, n, stride = values

            def at(base: Any, offset: Any, size: int, kind: Any) -> Any:  # noqa: ANN401
                return builder.inttoptr(
                    builder.add(base, builder.mul(offset, whole(size))), kind.as_pointer()
                )

            def load(base: Any, offset: Any, kind: Any, lanes: int) -> Any:  # noqa: ANN401
                size = 4 if kind is real else 1
                x = builder.load(at(base, offset, size, ir.VectorType(kind, lanes)), align=size)
                if kind is real:
                    return x
                wide = builder.sext(x, ir.VectorType(ir.IntType(32), lanes))
                return builder.sitofp(wide, ir.VectorType(real, lanes))

            def sums(begin: Any, end: Any, lanes: int, unroll: int) -> list[Any]:  # noqa: ANN401
                """Of products from `begin` to `end`: for each row as many totals as `unroll`, added up."""
                zero = ir.Constant(ir.VectorType(real, lanes), [0.0] * lanes)
                totals = [
                    [cgutils.alloca_once_value(builder, zero) for _ in range(unroll)] for _ in range(batch)
                ]
                step = whole(lanes * unroll)
                with cgutils.for_range_slice(builder, begin, end, step, intp=whole) as (first, _):
                    for u in range(unroll):
                        j = builder.add(first, whole(u * lanes))
                        weight = load(w, j, kind, lanes)
                        for b, total in enumerate(totals):
                            row = load(x, builder.add(j, builder.mul(n, whole(b))), real, lanes)
                            product = builder.fmul(weight, row, flags=fused)
                            builder.store(
                                builder.fadd(product, builder.load(total[u]), flags=fused), total[u]
                            )
                return [reduce(builder.fadd, map(builder.load, total)) for total in totals]

            full = builder.sub(n, builder.srem(n, whole(lanes * unroll)))
            parts = zip(sums(whole(0), full, lanes, unroll), sums(full, n, 1, 1), strict=True)
            across = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(real, [real, ir.VectorType(real, lanes)]),
                f"llvm.vector.reduce.fadd.v{lanes}f32",
            )
            for b, (main, rest) in enumerate(parts):
                last = builder.extract_element(rest, ir.IntType(32)(0))
                total = builder.call(across, [last, main], fastmath=("reassoc",))
                builder.store(total, at(out, builder.mul(stride, whole(b)), 4, real), align=4)
            return context.get_dummy_value()

        return types.void(*5 * (types.int64,)), generate

    return dots


def compile_product(compiler: native.Compiler, matvec: Matvec) -> Any:  # noqa: ANN401
    """out = x Wᵀ; its table: x [B,K], weight, scales (0: none), out [B,N], B, K, N."""
    array, (matrix, rows, _) = compiler.array, matvec

    @compiler.kernel
    def kernel(table: Any) -> None:  # noqa: ANN401
        B, K, N = table[4], table[5], table[6]
        x, out = array(table[0], (B, K), np.float32), array(table[3], (B, N), np.float32)
        rows(x, matrix(table[1], table[2], N, K), out, 0)

    return kernel
