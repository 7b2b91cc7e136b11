"""Register tile of a skinny GEMM, in LLVM's words: dot products of a few weight rows with a few rows of x.

Every dot product is 16 partial sums: sum l takes the products at l, l + 16, l + 32, … in this order, each by a fused
multiply-add; then the halves of the sums are added to each other, 8 and 8, 4 and 4, 2 and 2, 1 and 1. The order depends on
nothing else, so a row's results are the same bits in a tile of any size.
"""

# ruff: noqa: ANN401 (compiled functions have types that mypy does not know)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from retnet.ops.cpu import numba_private

LANES = 16  # partial sums of a dot product


class RegisterTile(NamedTuple):
    """Size of a tile, and how it reads memory."""

    rows: int  # of the weight
    columns: int  # rows of x
    lanes: int  # of its vectors: 16, or 8 and 8
    fetch: bool  # whether each step also asks for memory that a later tile reads
    apart: bool  # whether its rows of the weight are far from each other: long streams, which the CPU itself reads ahead


def compile_sweep(number: type, sizes: Sequence[RegisterTile]) -> Any:
    """The micro-kernels for weights of np.float32 or np.int8, one for each size, and what chooses among them.

    The partial sums of all pairs in a tile stay in registers.

    Returns:
        sweep(rows, columns, w, scales, K, x, out, width, begin, end, later, tile, tiles): rows `begin` to `end` of a weight,
        in tiles of `rows`, for `columns` rows of x: out[c,r] = scales[r] Σ_k w[r,k] x[c,k], with scales for int8 alone.
        Addresses: w of rows of K numbers, x of panels [⌈K/16⌉,columns,16] with zeros behind their end, out of rows of
        `width` numbers. Memory is fetched, into the second-level cache, of the weight `later` rows on, of which this tile
        takes its share, the one at `tile` of `tiles`. Tiles whose rows are apart begin at each row from `begin` to `end`,
        and `later` is from one of their rows to the next.
    """
    from llvmlite import binding, ir
    from numba import types
    from numba.extending import intrinsic

    binding.initialize_native_asmparser()  # for `_Tile.add_in_pairs`
    cgutils = numba_private.cgutils()
    whole, none = ir.IntType(64), ir.VoidType()

    def micro_kernel(module: Any, size: RegisterTile) -> Any:
        """A function of its own in LLVM's module, so that it is compiled once."""
        name = f"retnet_sweep_{np.dtype(number).name}_{size.rows}x{size.columns}"
        if name in module.globals:
            return module.globals[name]
        function = ir.Function(module, ir.FunctionType(none, [whole] * 11), name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        builder = ir.IRBuilder(function.append_basic_block())
        w, scales, K, x, out, width, begin, end, later, tile, tiles = function.args
        row = builder.mul(K, whole(np.dtype(number).itemsize))
        block = builder.mul(row, whole(size.rows))
        share = builder.mul(builder.sdiv(block, tiles), tile)
        ahead = builder.add(builder.mul(row, later), share)
        stride = builder.sdiv(
            builder.add(whole(size.rows * LANES * np.dtype(number).itemsize - 1), tiles), tiles
        )
        each = whole(1 if size.apart else size.rows)
        with cgutils.for_range_slice(builder, begin, end, each, intp=whole) as (r, _):
            at, four = builder.add(w, builder.mul(row, r)), builder.mul(r, whole(4))
            writer = _Tile(builder, number, size, later if size.apart else whole(1))
            writer.write(
                at,
                K,
                x,
                builder.add(out, four),
                width,
                builder.add(scales, four),
                builder.add(at, ahead),
                stride,
            )
        builder.ret_void()
        return function

    @intrinsic
    def sweep(
        _: Any,
        rows: Any,
        columns: Any,
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
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            rows, columns, *arguments = values
            done = builder.append_basic_block()
            choice = builder.switch(builder.add(builder.mul(rows, whole(64)), columns), done)
            for size in sizes:
                block = builder.append_basic_block()
                choice.add_case(whole(64 * size.rows + size.columns), block)
                builder.position_at_end(block)
                builder.call(micro_kernel(builder.module, size), arguments)
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 13), generate

    return sweep


class _Tile:
    """Writes the instructions of one tile where a builder of LLVM's stands."""

    def __init__(self, builder: Any, number: type, size: RegisterTile, distance: Any) -> None:
        from llvmlite import ir

        self.ir, self.cgutils, self.builder = ir, numba_private.cgutils(), builder
        self.distance = distance  # from one row of the tile to the next, in rows of the weight
        self.rows, self.columns, self.lanes, self.fetch, self.apart = size
        self.parts = LANES // self.lanes
        self.plain, self.item = number is np.float32, np.dtype(number).itemsize
        self.fetched = max(1, self.rows * LANES * self.item // 64) if self.fetch else 0
        self.whole, self.small, self.real, self.byte = (
            ir.IntType(64),
            ir.IntType(32),
            ir.FloatType(),
            ir.IntType(8),
        )
        self.vector = ir.VectorType(self.real, self.lanes)
        self.stored = self.vector if self.plain else ir.VectorType(self.byte, self.lanes)
        int8_times_one_row = not self.plain and self.apart and self.columns == 1 and self.parts == 2
        has_feature = numba_private.has_feature
        self.paired = int8_times_one_row and has_feature("avx2") and has_feature("fma")

    def write(
        self, w: Any, K: Any, x: Any, out: Any, width: Any, scales: Any, ahead: Any, stride: Any
    ) -> None:
        """A tile at these addresses; `ahead` is what to fetch at the first step, `stride` bytes on at each step."""
        builder, whole = self.builder, self.whole
        self.K, self.x, self.out, self.width, self.scales = K, x, out, width, scales
        self.ahead, self.stride = ahead, stride
        row = builder.mul(K, whole(self.item))
        next_row = builder.mul(row, self.distance)
        self.weights = [builder.add(w, builder.mul(next_row, whole(r))) for r in range(self.rows)]
        zero = self.constant(self.real, [0.0] * self.lanes)
        pairs = [
            (r, c, part) for r in range(self.rows) for c in range(self.columns) for part in range(self.parts)
        ]
        self.sums = {pair: self.cgutils.alloca_once(builder, self.vector) for pair in pairs}
        for total in self.sums.values():
            builder.store(zero, total)
        full = builder.and_(K, whole(-LANES))
        with self.cgutils.for_range_slice(builder, whole(0), full, whole(LANES), intp=whole) as (k, _):
            if self.paired:
                self.add_in_pairs(k)
            else:
                self.add(k, self.weight)
            self.prefetch(k)
        with builder.if_then(builder.icmp_signed("<", full, K)):
            self.add(full, self.last_weight)
        for c in range(self.columns):
            self.finish(c)

    def constant(self, kind: Any, values: Any) -> Any:
        return self.ir.Constant(self.ir.VectorType(kind, len(values)), list(values))

    def function(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = self.ir.FunctionType(result, arguments)
        return self.cgutils.get_or_insert_function(self.builder.module, kind, name)

    def pointer(self, base: Any, offset: Any, kind: Any) -> Any:
        return self.builder.inttoptr(self.builder.add(base, offset), kind.as_pointer())

    def load(self, base: Any, offset: Any, kind: Any) -> Any:
        return self.builder.load(
            self.pointer(base, offset, kind), align=self.item if kind is self.stored else 4
        )

    def widened(self, weights: Any) -> Any:
        if self.plain:
            return weights
        return self.builder.sitofp(
            self.builder.sext(weights, self.ir.VectorType(self.small, self.lanes)), self.vector
        )

    def weight(self, r: int, k: Any) -> Any:
        return self.widened(
            self.load(self.weights[r], self.builder.mul(k, self.whole(self.item)), self.stored)
        )

    def last_weight(self, r: int, k: Any) -> Any:
        """The numbers from k to the end of a row, and zeros."""
        builder = self.builder
        kind = self.ir.VectorType(self.whole, self.lanes)
        end = builder.insert_element(self.ir.Constant(kind, self.ir.Undefined), self.K, self.small(0))
        end = builder.shuffle_vector(end, end, self.constant(self.small, [0] * self.lanes))
        place = builder.insert_element(self.ir.Constant(kind, self.ir.Undefined), k, self.small(0))
        place = builder.shuffle_vector(place, place, self.constant(self.small, [0] * self.lanes))
        inside = builder.icmp_signed(
            "<", builder.add(place, self.constant(self.whole, range(self.lanes))), end
        )
        zero = self.constant(self.real if self.plain else self.byte, [0.0 if self.plain else 0] * self.lanes)
        name = f"llvm.masked.load.v{self.lanes}{'f32' if self.plain else 'i8'}.p0"
        load = self.function(
            name, self.stored, self.stored.as_pointer(), self.small, inside.type, self.stored
        )
        place = self.pointer(self.weights[r], builder.mul(k, self.whole(self.item)), self.stored)
        return self.widened(builder.call(load, [place, self.small(self.item), inside, zero]))

    def add(self, k: Any, weight: Any) -> None:
        """Adds the products at k to k + 15 to the sums."""
        builder = self.builder
        fused = self.function(
            f"llvm.fmuladd.v{self.lanes}f32", self.vector, self.vector, self.vector, self.vector
        )
        panel = builder.add(self.x, builder.mul(k, self.whole(4 * self.columns)))
        for part in range(self.parts):
            first = self.lanes * part
            weights = [weight(r, builder.add(k, self.whole(first))) for r in range(self.rows)]
            for c in range(self.columns):
                x = self.load(panel, self.whole(4 * (LANES * c + first)), self.vector)
                for r in range(self.rows):
                    total = self.sums[r, c, part]
                    builder.store(builder.call(fused, [weights[r], x, builder.load(total)]), total)

    def add_in_pairs(self, k: Any) -> None:
        """`add` of int8 rows times one row of x, in AVX2's own instructions: two of a kind follow each other.

        Zen 4 deals instructions out to pipes as they come, so that two of a kind run at once. In LLVM's order, with a sum
        that it keeps in memory, a step of four rows takes 9.7 cycles, in this one 7.4 to 8.2, of 6 that its pipes allow.
        """
        builder, ir = self.builder, self.ir
        text = """
            vpmovsxbd ($6,$7), $2
            vpmovsxbd 8($6,$7), $3
            vcvtdq2ps $2, $2
            vcvtdq2ps $3, $3
            vfmadd231ps $2, $8, $0
            vfmadd231ps $3, $9, $1"""
        arguments = [self.vector, self.vector, self.whole, self.whole, self.vector, self.vector]
        kind = ir.FunctionType(ir.LiteralStructType([self.vector] * 4), arguments)
        both = ir.InlineAsm(kind, text, "=&x,=&x,=&x,=&x,0,1,r,r,x,x")  # two sums and two to work with
        panel = builder.add(self.x, builder.mul(k, self.whole(4)))
        x = [self.load(panel, self.whole(4 * self.lanes * part), self.vector) for part in range(2)]
        for r in range(self.rows):
            totals = [self.sums[r, 0, part] for part in range(2)]
            done = builder.call(both, [*map(builder.load, totals), self.weights[r], k, *x])
            for part, total in enumerate(totals):
                builder.store(builder.extract_value(done, part), total)

    def prefetch(self, k: Any) -> None:
        builder = self.builder
        prefetch = self.function(
            "llvm.prefetch.p0", self.ir.VoidType(), self.byte.as_pointer(), self.small, self.small, self.small
        )
        step = builder.mul(builder.lshr(k, self.whole(4)), self.stride)
        for line in range(self.fetched):
            place = self.pointer(self.ahead, builder.add(step, self.whole(64 * line)), self.byte)
            to_read, second_level, data = self.small(0), self.small(2), self.small(1)
            builder.call(prefetch, [place, to_read, second_level, data])

    def pick(self, a: Any, b: Any, order: Any) -> Any:
        return self.builder.shuffle_vector(a, b, self.constant(self.small, order))

    def four_sums(self, r: int, c: int) -> Any:
        """16 partial sums → 4."""
        builder, sums = self.builder, [self.builder.load(self.sums[r, c, part]) for part in range(self.parts)]
        low, high = (
            sums if self.parts == 2 else (self.pick(sums[0], sums[0], range(n, n + 8)) for n in (0, 8))
        )
        eight = builder.fadd(low, high)
        return builder.fadd(self.pick(eight, eight, range(4)), self.pick(eight, eight, range(4, 8)))

    def finish(self, c: int) -> None:
        """Adds the partial sums up, of four rows at once, and stores them."""
        builder = self.builder
        for first in range(0, self.rows, 4):
            count = min(4, self.rows - first)
            fours = [self.four_sums(first + min(i, count - 1), c) for i in range(4)]
            a, b = (
                builder.fadd(self.pick(one, two, (0, 1, 4, 5)), self.pick(one, two, (2, 3, 6, 7)))
                for one, two in (fours[:2], fours[2:])
            )
            sums = builder.fadd(self.pick(a, b, (0, 2, 4, 6)), self.pick(a, b, (1, 3, 5, 7)))
            if self.apart:
                for i in range(count):
                    self.store(builder.extract_element(sums, self.small(i)), first + i, c)
            else:
                self.store(sums if count == 4 else self.pick(sums, sums, range(count)), first, c)

    def store(self, sums: Any, r: int, c: int) -> None:
        """Stores the sum of one pair, or of as many as a vector has from row r on, times the scales of int8 rows."""
        builder = self.builder
        row = builder.mul(self.distance, self.whole(4 * r))
        if not self.plain:
            sums = builder.fmul(sums, self.load(self.scales, row, sums.type))
        place = builder.add(builder.mul(self.width, self.whole(4 * c)), row)
        builder.store(sums, self.pointer(self.out, place, sums.type), align=4)
