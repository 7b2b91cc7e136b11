"""Packed GEMM micro-kernels with software prefetch, for matrices in the cache of one core, compiled by numba.

A matrix is kept in panels, [columns / W, rows, W] with zeros where a size is no multiple of W, the width of two vector
registers. A tile of a product is then two registers times R rows, to which a loop over the inner dimension adds; nothing
has to be rearranged first, and the left operand can be read transposed.

Before each of its tiles a product asks for a few lines of memory that are needed soon, so that no core waits for them. Asked
for all at once, or read when they are needed, they cost a quarter of the whole time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from retnet.ops.cpu import jit, numba_private

# Which part of a product is needed where one of its matrices is a lower triangle.
ALL, LOWER_RESULT, LOWER_LEFT, UPPER_LEFT = range(4)


class PackedGemm(NamedTuple):
    """Compiled functions of matrices in panels. x is [tokens, heads, width], contiguous; h is a head.

    Attributes:
        empty: empty(count, rows, columns): memory for so many matrices of that size.
        view: view(memory, rows, columns): the memory of one as a matrix of at most that size.
        rows: rows(x, begin, n, h): where x[begin : begin + n, h] lies, for `product` to fetch.
        load: load(to, x, begin, n, h, factors): to = factors ⊙ x[begin : begin + n, h].
        store: store(matrix, x, begin, n, h, add): x[begin : begin + n, h] = (or +=) matrix.
        transpose: transpose(a, to): to = aᵀ.
        scale: scale(matrix, factors, n): row j of the first n times factors[j].
        mask: mask(matrix, factors, n): matrix ⊙ factors on and below the diagonal, else 0.
        product: product(a, transpose, b, c, beta, part, fetch): c = op(a) b + beta · c, while memory, a tuple of `rows`,
            is fetched into the second-level cache.
    """

    empty: Callable[..., Any]
    view: Callable[..., Any]
    rows: Callable[..., Any]
    load: Callable[..., None]
    store: Callable[..., None]
    transpose: Callable[..., None]
    scale: Callable[..., None]
    mask: Callable[..., None]
    product: Callable[..., None]


def compile_packed_gemm(compiler: jit.Compiler, number: type) -> PackedGemm:
    """The functions for fp32 or fp64, a type of numpy."""
    registers = 64 if numba_private.has_feature("avx512f") else 32
    item = np.dtype(number).itemsize
    W, R = 2 * registers // item, 8 if registers == 64 else 4
    tile = _compile_tile(number, R, W)
    prefetch = compiler.prefetch

    @compiler.function
    def empty(count: int, rows: int, columns: int) -> Any:  # noqa: ANN401
        size = (rows + W - 1) // W * W * ((columns + W - 1) // W * W)
        memory: Any = np.empty(count * size + 64 // item, number)
        skip = (-memory.ctypes.data % 64) // item
        return memory[skip : skip + count * size].reshape(count, size)

    @compiler.function
    def view(memory: Any, rows: int, columns: int) -> Any:  # noqa: ANN401
        rows, panels = (rows + W - 1) // W * W, (columns + W - 1) // W
        return memory[: rows * panels * W].reshape(panels, rows, W)

    @compiler.function
    def load(to: Any, x: Any, begin: int, n: int, h: int, factors: Any) -> None:  # noqa: ANN401
        for p in range(to.shape[0]):
            first = p * W
            full = min(W, x.shape[2] - first)
            for j in range(n):
                source, row, factor = x[begin + j, h][first : first + full], to[p, j], factors[j]
                for i in range(full):
                    row[i] = source[i] * factor
                for i in range(full, W):
                    row[i] = 0
            for j in range(n, to.shape[1]):
                to[p, j, :] = 0

    @compiler.function
    def store(matrix: Any, x: Any, begin: int, n: int, h: int, add: bool) -> None:  # noqa: ANN401
        for p in range(matrix.shape[0]):
            first = p * W
            full = min(W, x.shape[2] - first)
            for j in range(n):
                row, to = matrix[p, j], x[begin + j, h][first : first + full]
                if add:
                    for i in range(full):
                        to[i] += row[i]
                else:
                    for i in range(full):
                        to[i] = row[i]

    @compiler.function
    def transpose(a: Any, to: Any) -> None:  # noqa: ANN401
        for p in range(a.shape[0]):
            for r in range(0, a.shape[1], W):
                for i in range(W):
                    for j in range(W):
                        to[r // W, p * W + i, j] = a[p, r + j, i]

    @compiler.function
    def scale(matrix: Any, factors: Any, n: int) -> None:  # noqa: ANN401
        for p in range(matrix.shape[0]):
            for j in range(n):
                row, factor = matrix[p, j], factors[j]
                for i in range(W):
                    row[i] *= factor

    @compiler.function
    def mask(matrix: Any, factors: Any, n: int) -> None:  # noqa: ANN401
        for p in range(matrix.shape[0]):
            first = p * W
            for j in range(matrix.shape[1]):
                row, below = matrix[p, j], max(0, min(W, j + 1 - first)) if j < n else 0
                if below:
                    factor = factors[j][first : first + below]
                    for i in range(below):
                        row[i] *= factor[i]
                for i in range(below, W):
                    row[i] = 0

    @compiler.function
    def rows(x: Any, begin: int, n: int, h: int) -> Any:  # noqa: ANN401
        heads, width = x.shape[1], x.shape[2] * item
        return x.ctypes.data + (begin * heads + h) * width, heads * width, width, n

    @compiler.function
    def ask(fetch: Any, part: int, parts: int) -> None:  # noqa: ANN401
        for place, stride, width, n in fetch:
            for row in range(n * part // parts, n * (part + 1) // parts):
                for line in range(place + row * stride, place + row * stride + width, 64):
                    prefetch(line)

    @compiler.function
    def product(a: Any, transpose: bool, b: Any, c: Any, beta: float, part: int, fetch: Any) -> None:  # noqa: ANN401
        tiles = c.shape[1] // R
        inner = b.shape[1] // W
        start, left, right, result = (
            a.ctypes.data,
            a.shape[1] * W,
            b.shape[1] * W * item,
            c.shape[1] * W * item,
        )
        for p in range(c.shape[0]):
            for r in range(0, c.shape[1], R):
                ask(fetch, p * tiles + r // R, c.shape[0] * tiles)
                first, last = 0, inner
                if part == LOWER_RESULT and p * W >= r + R:
                    continue
                if part == LOWER_LEFT:
                    last = min(inner, (r + R - 1) // W + 1)
                if part == UPPER_LEFT:
                    first = r // W
                if transpose:
                    base, si, sk, sp = (r // W) * left + r % W, 1, W, W * W
                else:
                    base, si, sk, sp = r * W, W, 1, left
                tile(
                    start + (base + first * sp) * item,
                    si,
                    sk,
                    sp,
                    b.ctypes.data + p * right + first * W * W * item,
                    c.ctypes.data + p * result + r * W * item,
                    number(beta),
                    last - first,
                )

    return PackedGemm(empty, view, rows, load, store, transpose, scale, mask, product)


def _compile_tile(number: type, rows: int, width: int) -> Any:  # noqa: ANN401
    """tile(a, si, sk, sp, b, c, beta, panels): c [rows,width] = Σ_k a(·,k) b[k,·] + beta · c, all in registers.

    `a`, `b`, `c` are addresses; b [panels · width, width] and c are contiguous; a(i,k) lies si · i + sk · (k mod width)
    + sp · (k div width) numbers after `a`. `beta` 0 does not read c.
    """
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    cgutils = numba_private.cgutils()
    scalar = ir.FloatType() if number is np.float32 else ir.DoubleType()
    vector = ir.VectorType(scalar, width // 2)
    item = np.dtype(number).itemsize

    @intrinsic
    def tile(_: Any, a: Any, si: Any, sk: Any, sp: Any, b: Any, c: Any, beta: Any, panels: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ANN401
            a, si, sk, sp, b, c, beta, panels = values
            number_at, vector_at = scalar.as_pointer(), vector.as_pointer()

            def splat(x: Any) -> Any:  # noqa: ANN401
                one = builder.insert_element(
                    ir.Constant(vector, ir.Undefined), x, ir.Constant(ir.IntType(32), 0)
                )
                lanes = ir.Constant(ir.VectorType(ir.IntType(32), width // 2), [0] * (width // 2))
                return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), lanes)

            def at(base: Any, offset: Any, kind: Any) -> Any:  # noqa: ANN401
                number_offset = builder.mul(offset, ir.Constant(offset.type, item))
                return builder.inttoptr(builder.add(base, number_offset), kind)

            def plus(x: Any, y: Any, z: Any) -> Any:  # noqa: ANN401
                return builder.fadd(
                    builder.fmul(x, y, flags=("contract",)), z, flags=("contract",)
                )  # one instruction

            zero = ir.Constant(vector, [0.0] * (width // 2))
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(2)] for _ in range(rows)]
            long = values[1].type
            with cgutils.for_range(builder, panels, intp=long) as panel:
                left = builder.mul(panel.index, sp)
                right = builder.mul(panel.index, ir.Constant(long, width * width))
                with cgutils.for_range(builder, ir.Constant(long, width), intp=long) as k:
                    row = builder.add(right, builder.mul(k.index, ir.Constant(long, width)))
                    halves = [
                        builder.load(
                            at(b, builder.add(row, ir.Constant(long, half * width // 2)), vector_at),
                            align=item,
                        )
                        for half in range(2)
                    ]
                    column = builder.add(left, builder.mul(k.index, sk))
                    for i in range(rows):
                        offset = builder.add(column, builder.mul(si, ir.Constant(long, i)))
                        factor = splat(builder.load(at(a, offset, number_at)))
                        for half, total in zip(halves, sums[i], strict=True):
                            builder.store(plus(factor, half, builder.load(total)), total)
            places = [
                [at(c, ir.Constant(long, i * width + half * width // 2), vector_at) for half in range(2)]
                for i in range(rows)
            ]
            with builder.if_then(builder.fcmp_unordered("!=", beta, ir.Constant(beta.type, 0.0))):
                keep = splat(beta)
                for i in range(rows):
                    for place, total in zip(places[i], sums[i], strict=True):
                        old = builder.load(place, align=item)
                        builder.store(plus(keep, old, builder.load(total)), total)
            for i in range(rows):
                for place, total in zip(places[i], sums[i], strict=True):
                    builder.store(builder.load(total), place, align=item)
            return context.get_dummy_value()

        whole = types.int64
        kind = types.float32 if number is np.float32 else types.float64
        return types.void(whole, whole, whole, whole, whole, whole, kind, whole), generate

    return tile
