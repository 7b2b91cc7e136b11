"""Compiled products of weights with a few rows: every weight is read once, at the speed of the memory.

Weights are fp32, or int8 with one fp32 scale a row, a quarter of the bytes: one source, compiled once for each. int8 numbers
become fp32 in registers, and a row's scale multiplies its finished dot product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from retnet.ops.cpu import jit


class Matvec(NamedTuple):
    """Compiled functions of weights, which are pairs: numbers [N,K], and a scale for each row where they are int8.

    The rows of a weight are shared out among the threads of a team in order: thread i of n has N·i/n to N·(i+1)/n.

    Attributes:
        matrix: matrix(address, scales, N, K): the weight that lies there.
        rows: rows(x, weight, out, first): this thread's share of out[:, first:] = x Wᵀ; x is contiguous.
    """

    matrix: Callable[..., Any]
    rows: Callable[..., None]


def compile_matvec(compiler: jit.Compiler, number: type) -> Matvec:
    """For weights of np.float32, or np.int8 with scales."""
    array, thread, threads = compiler.array, compiler.thread, compiler.threads
    scaled, item, dot = number is np.int8, np.dtype(number).itemsize, _compile_dot(number)

    @compiler.function
    def matrix(address: int, scales: int, N: int, K: int) -> Any:  # noqa: ANN401
        return array(address, (N, K), number), array(scales, (N,), np.float32)

    @compiler.function
    def rows(x: Any, weight: Any, out: Any, first: int) -> None:  # noqa: ANN401
        numbers, scales = weight
        (N, K), i, n = numbers.shape, thread(), threads()
        for r in range(N * i // n, N * (i + 1) // n):
            w = numbers.ctypes.data + r * K * item
            for b in range(x.shape[0]):  # the first reads the memory, the others a cache
                s = dot(w, x.ctypes.data + 4 * b * K, K)
                out[b, first + r] = s * scales[r] if scaled else s

    return Matvec(matrix, rows)


def _compile_dot(number: type) -> Any:  # noqa: ANN401
    """dot(w, x, n): Σ_j w[j] x[j], j < n, of n numbers of this type at one address and n of fp32 at another.

    Its vectors have 32 bytes of x, which is not left to the compiler: on a CPU with registers of 64 it would take those,
    and two cores of it read memory 15 % slower so. Prefetching inside, two rows of a weight at once, and several rows of x
    at once, in registers, were all slower.
    """
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    whole, real = ir.IntType(64), ir.FloatType()
    kind = real if number is np.float32 else ir.IntType(8)
    lanes, unroll, fused = 8, 4, ("contract",)  # fused: product and sum are one instruction

    @intrinsic
    def dot(_: Any, w: Any, x: Any, n: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ANN401
            w, x, n = values

            def load(base: Any, offset: Any, kind: Any, lanes: int) -> Any:  # noqa: ANN401
                size = 4 if kind is real else 1
                place = builder.add(base, builder.mul(offset, whole(size)))
                vector = ir.VectorType(kind, lanes).as_pointer()
                found = builder.load(builder.inttoptr(place, vector), align=size)
                if kind is real:
                    return found
                wide = builder.sext(found, ir.VectorType(ir.IntType(32), lanes))
                return builder.sitofp(wide, ir.VectorType(real, lanes))

            def add_up(begin: Any, end: Any, lanes: int, unroll: int) -> Any:  # noqa: ANN401
                """Products from `begin` to `end`, as one vector."""
                zero = ir.Constant(ir.VectorType(real, lanes), [0.0] * lanes)
                totals = [cgutils.alloca_once_value(builder, zero) for _ in range(unroll)]
                step = whole(lanes * unroll)
                with cgutils.for_range_slice(builder, begin, end, step, intp=whole) as (first, _):
                    for u, total in enumerate(totals):
                        j = builder.add(first, whole(u * lanes))
                        product = builder.fmul(load(w, j, kind, lanes), load(x, j, real, lanes), flags=fused)
                        builder.store(builder.fadd(product, builder.load(total), flags=fused), total)
                return reduce(builder.fadd, map(builder.load, totals))

            full = builder.sub(n, builder.srem(n, whole(lanes * unroll)))
            most, rest = add_up(whole(0), full, lanes, unroll), add_up(full, n, 1, 1)
            across = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(real, [real, most.type]),
                f"llvm.vector.reduce.fadd.v{lanes}f32",
            )
            last = builder.extract_element(rest, ir.IntType(32)(0))
            return builder.call(across, [last, most], fastmath=("reassoc",))

        return types.float32(types.int64, types.int64, types.int64), generate

    return dot


def compile_product(compiler: jit.Compiler, matvec: Matvec) -> Any:  # noqa: ANN401
    """out = x Wᵀ; its table: x [B,K], weight, scales (0: none), out [B,N], B, K, N."""
    array, (matrix, rows) = compiler.array, matvec

    @compiler.kernel
    def kernel(table: Any) -> None:  # noqa: ANN401
        B, K, N = table[4], table[5], table[6]
        x, out = array(table[0], (B, K), np.float32), array(table[3], (B, N), np.float32)
        rows(x, matrix(table[1], table[2], N, K), out, 0)

    return kernel
