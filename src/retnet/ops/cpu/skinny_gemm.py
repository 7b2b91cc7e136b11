"""Skinny GEMM and GEMV: products x Wᵀ of 1 to 64 rows of x, which are decoding, with weights in fp32 or int8.

Few rows run at the speed of the memory, many at that of the arithmetic, and what a row gets is the same bits whatever other
rows are there and wherever it sits (see `retnet.ops.cpu.tile`). Weights are read as they are, once, row after row; x is
packed into panels, so that a tile reads it as one stream. int8 numbers become fp32 in registers, and a row's fp32 scale
multiplies its finished dot product.
"""

# ruff: noqa: ANN401 (compiled functions have types that mypy does not know)

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from retnet.ops.cpu.jit import Compiler
from retnet.ops.cpu.numba_private import has_feature
from retnet.ops.cpu.tile import LANES, RegisterTile, compile_sweep

MAX_ROWS = 64  # of x in one product
PANEL_BYTES = 1 << 16  # of weights, which stay in the second-level cache while all rows of x pass by
FETCH_BYTES = 1 << 13  # how far ahead memory is asked for where all rows of x pass by at once


class TileChoice(NamedTuple):
    """How `least` rows of x or more are multiplied."""

    least: int
    rows: int  # of the weight in a tile
    columns: int  # rows of x in a tile, at most
    fetch: bool  # ask for memory of later tiles; a few long streams are better left to the CPU, which reads ahead itself
    apart: bool = False  # each row of the weight in a tile is of another part of a thread's share; for all of x in one tile


# Chosen by measurement. Registers hold one sum a pair in AVX-512, 32 of 64 bytes; two in AVX2, 16 of 32 bytes.
WIDE = (
    TileChoice(1, 1, 1, False),
    TileChoice(2, 1, 2, False),
    TileChoice(3, 3, 8, True),
    TileChoice(9, 2, 12, True),
    TileChoice(13, 4, 6, True),
)
NARROW = (
    TileChoice(1, 1, 1, False),
    TileChoice(2, 1, 2, False),
    TileChoice(3, 1, 6, True),
    TileChoice(13, 3, 2, True),
)
# int8 numbers come so fast that the sums of one row, which wait for each other, would be what takes the time. Four rows that
# follow each other are streams too short for the CPU to read ahead: from memory they took 1.13 to 1.17 times as long.
WIDE_INT8 = (
    TileChoice(1, 4, 1, False, True),
    TileChoice(2, 4, 6, True),
    TileChoice(7, 3, 8, True),
    *WIDE[3:],
)
NARROW_INT8 = (
    TileChoice(1, 4, 1, False, True),
    TileChoice(2, 3, 2, True),
    TileChoice(3, 2, 3, True),
    TileChoice(4, 1, 6, True),
    TileChoice(13, 2, 3, True),
)


class SkinnyGemm(NamedTuple):
    """Compiled functions. B rows of x [B,K] lie in panels: packed [B · ⌈K/16⌉ · 16], in an order that depends on B.

    Attributes:
        matrix: matrix(address, scales, N, K): the weight [N,K] that lies there, with scales [N] for int8 or 0.
        padded: padded(K): numbers that a packed row takes.
        pack: pack(packed, B, K, b, first, values): columns `first` on of row b become these values.
        rows: rows(packed, B, weight, out, first): this thread's share of out[:, first:] = x Wᵀ. The rows of a weight are
            shared out among the threads of a team in order: thread i of n has N·i/n to N·(i+1)/n.
    """

    matrix: Callable[..., Any]
    padded: Callable[..., int]
    pack: Callable[..., None]
    rows: Callable[..., None]


def compile_skinny_gemm(compiler: Compiler, number: type) -> SkinnyGemm:
    """For weights of np.float32, or np.int8 with scales."""
    thread, threads = compiler.thread, compiler.threads
    shapes = shapes_by_rows(number)
    item = np.dtype(number).itemsize
    apart = tuple(_shape_of(rows, number).apart for rows in range(MAX_ROWS + 1))
    micro_kernels = compile_sweep(number, sizes_of_tiles(number))

    def entry(
        R: Any,
        C: Any,
        w: Any,
        scales: Any,
        K: Any,
        x: Any,
        out: Any,
        width: Any,
        begin: Any,
        end: Any,
        later: Any,
        tile: Any,
        tiles: Any,
    ) -> None:
        micro_kernels(R, C, w, scales, K, x, out, width, begin, end, later, tile, tiles)

    sweep = compiler.shared(entry, 13)

    @compiler.function
    def matrix(address: int, scales: int, N: int, K: int) -> Any:
        return address, scales, N, K

    @compiler.function
    def padded(K: int) -> int:
        return (K + LANES - 1) // LANES * LANES

    @compiler.function
    def bounds(B: int, tile: int) -> Any:
        """The rows of x in a tile, of as many tiles as there are, all but equal."""
        tiles = (B + shapes[B][1] - 1) // shapes[B][1]
        return B * tile // tiles, B * (tile + 1) // tiles

    @compiler.function
    def pack(packed: Any, B: int, K: int, b: int, first: int, values: Any) -> None:
        tiles = (B + shapes[B][1] - 1) // shapes[B][1]
        begin, end = bounds(B, ((b + 1) * tiles - 1) // B)
        place, stride = begin * padded(K) + (b - begin) * LANES, (end - begin) * LANES
        done, n = 0, len(values)
        while done < n:
            column = first + done
            lane, to = column % LANES, place + column // LANES * stride
            if lane == 0 and n - done >= LANES:
                for i in range(LANES):
                    packed[to + i] = values[done + i]
                done += LANES
            else:
                count = min(LANES - lane, n - done)
                for i in range(count):
                    packed[to + lane + i] = values[done + i]
                done += count
        if first + n == K and K % LANES:
            for i in range(K % LANES, LANES):
                packed[place + K // LANES * stride + i] = 0

    @compiler.function
    def rows(packed: Any, B: int, weight: Any, out: Any, first: int) -> None:
        address, scales, N, K = weight
        R, most = shapes[B]
        tiles = (B + most - 1) // most
        i, n = thread(), threads()
        begin, stop, width = N * i // n, N * (i + 1) // n, out.shape[1]
        if apart[B]:
            part, x, to = (stop - begin) // R, packed.ctypes.data, out.ctypes.data + 4 * first
            sweep(R, B, address, scales, K, x, to, width, begin, begin + part, part, 0, 1)
            sweep(1, B, address, scales, K, x, to, width, begin + R * part, stop, 0, 0, 1)
            return
        panel = later = max(R, PANEL_BYTES // (K * item) // R * R)
        if tiles == 1:  # one sweep over all: entering it for each tile costs a third of the time and more
            panel, later = max(1, stop - begin), max(R, FETCH_BYTES // (K * item))
        for r in range(begin, stop, panel):
            end = min(r + panel, stop)
            middle = r + (end - r) // R * R
            for tile in range(tiles):
                low, high = bounds(B, tile)
                x, to = packed.ctypes.data + 4 * low * padded(K), out.ctypes.data + 4 * (low * width + first)
                C = high - low
                sweep(R, C, address, scales, K, x, to, width, r, middle, later, tile, tiles)
                sweep(1, C, address, scales, K, x, to, width, middle, end, 0, 0, 1)

    return SkinnyGemm(matrix, padded, pack, rows)


def shapes_by_rows(number: type) -> tuple[tuple[int, int], ...]:
    """Rows of x → rows and columns of its tiles, on this CPU."""
    return tuple(
        (shape.rows, shape.columns) for shape in (_shape_of(rows, number) for rows in range(MAX_ROWS + 1))
    )


def _shape_of(rows: int, number: type) -> TileChoice:
    wide, narrow = (WIDE_INT8, NARROW_INT8) if number is np.int8 else (WIDE, NARROW)
    table = wide if has_feature("avx512f") else narrow
    return max((shape for shape in table if shape.least <= max(1, rows)), key=lambda shape: shape.least)


def sizes_of_tiles(number: type) -> list[RegisterTile]:
    """All that `MAX_ROWS` and fewer rows of x are cut into."""
    wide, found = has_feature("avx512f"), {}
    for B in range(1, MAX_ROWS + 1):
        shape = _shape_of(B, number)
        tiles = -(-B // shape.columns)
        for columns in {B * (tile + 1) // tiles - B * tile // tiles for tile in range(tiles)}:
            found[shape.rows, columns] = shape.fetch, shape.apart
            found.setdefault((1, columns), (False, False))  # what is left over of the weight's rows
    # Reading memory, which one row of x is, is 15 % slower in vectors of 64 bytes.
    lanes = {size: LANES if wide and size[0] * size[1] > 2 else LANES // 2 for size in found}
    return [RegisterTile(*size, lanes[size], *how) for size, how in sorted(found.items())]


class ProductTable(IntEnum):
    """The table of `compile_product`'s kernel: addresses, then sizes."""

    X = 0  # [B,K]
    WEIGHT = 1  # [N,K]
    SCALES = 2  # [N], or 0
    OUT = 3  # [B,N]
    PACKED = 4  # for each thread memory for x in panels
    ROWS = 5
    K = 6
    N = 7


def compile_product(compiler: Compiler, gemm: SkinnyGemm) -> Any:
    """The kernel of out = x Wᵀ; its table: see `ProductTable`."""
    array, numbers, thread, (matrix, padded, pack, rows) = (
        compiler.array,
        compiler.numbers,
        compiler.thread,
        gemm,
    )
    count = len(ProductTable)

    @compiler.kernel
    def skinny_gemm_numba(pointer: Any) -> None:
        table = numbers(pointer, count)
        B, K, N = table[ProductTable.ROWS], table[ProductTable.K], table[ProductTable.N]
        x, out = (
            array(table[ProductTable.X], (B, K), np.float32),
            array(table[ProductTable.OUT], (B, N), np.float32),
        )
        size = B * padded(K)
        packed = array(table[ProductTable.PACKED] + 4 * thread() * size, (size,), np.float32)
        for b in range(B):
            pack(packed, B, K, b, 0, x[b])
        rows(packed, B, matrix(table[ProductTable.WEIGHT], table[ProductTable.SCALES], N, K), out, 0)

    return skinny_gemm_numba
