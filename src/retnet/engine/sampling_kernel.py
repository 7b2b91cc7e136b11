"""Compiled token sampling on a CPU: argmax, or temperature, top-k, top-p, min-p and the draw, fused, without a sort.

torch's operators take some thirty passes over the logits for what is three, which costs as much as a small model's step.
What a row gets depends on its own logits, parameters and draw alone. `retnet.engine.sampling` says what is computed, and
does it where this cannot run.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retnet.ops.cpu.jit import Compiler, optional
from retnet.ops.cpu.openmp import launch, table

_LOG2_E = 1.4426950408889634
_LN_2 = 6.93145751953125e-1, 1.42860682030941723212e-6  # one number with few bits, and the rest
_LEAST = -708.0  # e to the power of less is not a normal number; it counts as 0
_TAYLOR = tuple(1 / math.factorial(n) for n in range(13, -1, -1))
_DIGIT = 11  # bits of a weight that one pass of a selection looks at
_BUCKETS = 1 << _DIGIT
_GRAIN = 64  # buckets of a first pass in one unit of distance, a power of two; the last has all farther ones
REACHED = (
    1 - 1e-12
)  # of a mass is all of it: sums of probabilities differ in their last bits with their order
_BLOCK = 64  # numbers that are added before it is asked whether the draw lies among them, at least


class SamplingTable(IntEnum):
    """The kernel's table: addresses, then sizes."""

    LOGITS = 0  # fp32 or fp64, [B,≥V]
    TEMPERATURE = 1  # fp64 [B]; 0 is greedy
    TOP_K = 2  # int64 [B]; V is all
    TOP_P = 3  # fp64 [B]; 1 is all
    MIN_P = 4  # fp64 [B]: −log of it; ∞ is all
    DRAWS = 5  # fp64 [B]
    TOKENS = 6  # int64 [B], the result; −1 for a row that is not finite
    MEMORY = 7  # `memory_of` numbers of fp64
    ROWS = 8
    VOCABULARY = 9  # V
    STRIDE = 10  # numbers from a row of logits to the next
    DOUBLE = 11  # whether they are fp64


def memory_of(vocab_size: int, threads: int) -> int:
    """Numbers of fp64 that so many threads write in between."""
    return threads * (3 * vocab_size + _BUCKETS)


def compile_sampler(compiler: Compiler) -> Any:  # noqa: ANN401
    """The kernel; see `SamplingTable`."""
    array, numbers, thread, threads = compiler.array, compiler.numbers, compiler.thread, compiler.threads
    best, weigh = _compile_weights(compiler)
    widen, total, drop = _compile_passes(compiler)
    cut, draw = _compile_cut(compiler, drop), _compile_draw(compiler, total)
    count, reached = len(SamplingTable), REACHED

    @compiler.kernel
    def sampling_numba(pointer: Any) -> None:  # noqa: ANN401
        table = numbers(pointer, count)
        B, V = table[SamplingTable.ROWS], table[SamplingTable.VOCABULARY]
        temperature = array(table[SamplingTable.TEMPERATURE], (B,), np.float64)
        top_k, top_p = (
            array(table[SamplingTable.TOP_K], (B,), np.int64),
            array(table[SamplingTable.TOP_P], (B,), np.float64),
        )
        min_p, draws = (
            array(table[SamplingTable.MIN_P], (B,), np.float64),
            array(table[SamplingTable.DRAWS], (B,), np.float64),
        )
        tokens = array(table[SamplingTable.TOKENS], (B,), np.int64)
        memory = table[SamplingTable.MEMORY] + 8 * thread() * (3 * V + _BUCKETS)
        scores, keys = array(memory, (V,), np.float64), array(memory, (V,), np.int64)
        weights, places = array(memory + 8 * V, (V,), np.float64), array(memory + 16 * V, (V,), np.int64)
        sums = array(memory + 24 * V, (_BUCKETS,), np.float64)
        for b in range(thread(), B, threads()):
            start = b * table[SamplingTable.STRIDE]
            if table[SamplingTable.DOUBLE]:
                widen(array(table[SamplingTable.LOGITS] + 8 * start, (V,), np.float64), scores)
            else:
                widen(array(table[SamplingTable.LOGITS] + 4 * start, (V,), np.float32), scores)
            likeliest = best(scores, keys)
            if likeliest < 0 or temperature[b] == 0:
                tokens[b] = likeliest
                continue
            weigh(scores, scores[likeliest], temperature[b], weights)
            if 0 < top_k[b] < V:
                cut(scores, keys, weights, places, sums, False, np.float64(top_k[b]))
            if top_p[b] < 1:
                cut(scores, keys, weights, places, sums, True, reached * top_p[b] * total(weights, 0, V))
            if min_p[b] < np.inf:
                drop(scores, weights, min_p[b])
            tokens[b] = draw(weights, sums, draws[b])

    return sampling_numba


def _compile_passes(compiler: Compiler) -> tuple[Callable[..., Any], ...]:
    """widen(from, to); total(numbers, start, end); drop(distances, weights, most): zero for all that are farther."""

    @compiler.function
    def widen(source: Any, target: Any) -> None:  # noqa: ANN401
        for i in range(len(target)):
            target[i] = source[i]

    @compiler.function
    def total(values: Any, start: int, end: int) -> float:  # noqa: ANN401
        found = 0.0
        for i in range(start, end):
            found += values[i]
        return found

    @compiler.function
    def drop(distances: Any, weights: Any, most: float) -> None:  # noqa: ANN401
        for i in range(len(weights)):
            weights[i] = weights[i] if distances[i] <= most else 0.0

    return widen, total, drop


def _compile_weights(compiler: Compiler) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """best(scores, the same as int64) → the first of the greatest, −1 where that is none.

    weigh(scores, greatest, temperature, weights): scores become distances from the greatest, in units of the temperature.
    """
    sign, mask = np.int64(63), np.int64(0x7FFF_FFFF_FFFF_FFFF)
    infinite = int(
        np.float64(np.inf).view(np.int64)
    )  # as a key: greater numbers have greater keys, NaN is at both ends
    negative = -1 - infinite
    least, half, bias, places = _LEAST, 0.5, np.int64(1023), np.int64(52)

    @compiler.function
    def best(scores: Any, keys: Any) -> int:  # noqa: ANN401
        low = high = keys[0] ^ ((keys[0] >> sign) & mask)
        for i in range(len(keys)):
            key = keys[i] ^ ((keys[i] >> sign) & mask)
            low, high = min(low, key), max(high, key)
        if low < negative or high >= infinite or high <= negative:
            return -1
        greatest, i = np.int64(high ^ ((high >> sign) & mask)).view(np.float64), 0
        while scores[i] != greatest:
            i += 1
        return i

    @compiler.function
    def exp(x: float) -> float:
        """2^n e^r with |r| ≤ ln 2 / 2, of x ≤ 0; Taylor's polynomial of r."""
        y = max(x, least)
        n = np.floor(y * _LOG2_E + half)
        r = y - n * _LN_2[0] - n * _LN_2[1]
        p = _TAYLOR[0]
        p = p * r + _TAYLOR[1]
        p = p * r + _TAYLOR[2]
        p = p * r + _TAYLOR[3]
        p = p * r + _TAYLOR[4]
        p = p * r + _TAYLOR[5]
        p = p * r + _TAYLOR[6]
        p = p * r + _TAYLOR[7]
        p = p * r + _TAYLOR[8]
        p = p * r + _TAYLOR[9]
        p = p * r + _TAYLOR[10]
        p = p * r + _TAYLOR[11]
        p = p * r + _TAYLOR[12]
        p = p * r + _TAYLOR[13]
        power = np.int64((np.int64(np.int32(n)) + bias) << places).view(np.float64)
        return p * power if x >= least else 0.0

    @compiler.function
    def weigh(scores: Any, greatest: float, temperature: float, weights: Any) -> None:  # noqa: ANN401
        for i in range(len(scores)):
            scores[i] = (greatest - scores[i]) / temperature
        for i in range(len(scores)):
            weights[i] = exp(-scores[i])

    return best, weigh


def _compile_cut(compiler: Compiler, drop: Callable[..., Any]) -> Callable[..., Any]:
    """cut(distances, the same as int64, weights, places, sums, by mass, target): weight 0 for all but the nearest."""
    buckets, digit, grain, end = _BUCKETS, _DIGIT, float(_GRAIN), _BUCKETS / _GRAIN - 0.5 / _GRAIN

    @compiler.function
    def find(sums: Any, above: float, target: float) -> tuple[int, float]:  # noqa: ANN401
        """The bucket with which the target is reached, or the last with anything, and what lies before it."""
        chosen, before = 0, above
        for bucket in range(buckets):
            if sums[bucket] > 0:
                chosen, before = bucket, above
                above += sums[bucket]
                if above >= target:
                    break
        return chosen, before

    @compiler.function
    def cut(
        distances: Any,  # noqa: ANN401
        bits: Any,  # noqa: ANN401
        weights: Any,  # noqa: ANN401
        places: Any,  # noqa: ANN401
        sums: Any,  # noqa: ANN401
        by_mass: bool,
        target: float,
    ) -> None:
        """Radix selection: positive numbers have the order of their bits. What is counted are weights, or ones.

        A first pass sorts by distance in equal steps, which leaves few of most distributions. Of those that remain, bucket
        by bucket from the nearest on, the one with which the target is reached is looked into; in the end all in it are
        equal, and the first of them are kept, as many as are needed.
        """
        sums[:] = 0
        for i in range(len(weights)):
            sums[np.int64(min(distances[i], end) * grain)] += weights[i] if by_mass else 1.0
        chosen, above = find(sums, 0.0, target)
        n = 0
        for i in range(len(weights)):
            places[n] = i
            n += int(np.int64(min(distances[i], end) * grain) == chosen)
        shift, width = 52, digit
        while n > 1:
            sums[:] = 0
            mask = (1 << width) - 1
            for j in range(n):
                i = places[j]
                sums[(bits[i] >> shift) & mask] += weights[i] if by_mass else 1.0
            chosen, above = find(sums, above, target)
            found = 0
            for j in range(n):
                i = places[j]
                if (bits[i] >> shift) & mask == chosen:
                    places[found] = i
                    found += 1
            n = found
            if shift == 0:
                break
            width = min(digit, shift)
            shift -= width
        unit = weights[places[0]] if by_mass else 1.0
        wanted = np.int64(math.ceil((target - above) / unit)) if (target - above) < n * unit else n
        drop(distances, weights, distances[places[0]])
        for j in range(max(wanted, 1), n):
            weights[places[j]] = 0.0

    return cut


def _compile_draw(compiler: Compiler, total: Callable[..., Any]) -> Callable[..., Any]:
    """draw(weights, sums, number from 0 to 1) → where the cumulative sum passes that part of the whole."""
    least_block, buckets = _BLOCK, _BUCKETS

    @compiler.function
    def draw(weights: Any, sums: Any, number: float) -> int:  # noqa: ANN401
        V = len(weights)
        block = max(least_block, (V + buckets - 1) // buckets)
        blocks = (V + block - 1) // block
        for j in range(blocks):
            sums[j] = total(weights, j * block, min((j + 1) * block, V))
        whole = 0.0
        for j in range(blocks):
            whole += sums[j]
        target, below, j = number * whole, 0.0, 0
        while j < blocks - 1 and below + sums[j] <= target:
            below += sums[j]
            j += 1
        for i in range(j * block, V):
            below += weights[i]
            if below > target:
                return i
        i = V - 1  # rounding: the last that can be drawn
        while weights[i] == 0:
            i -= 1
        return i

    return draw


class SamplingCall:
    """The kernel with the parameters of B rows.

    Args:
        rows: of each row temperature (0 is greedy), top-k (0 is all), top-p (1 is all) and min-p (0 is all).
        vocab_size: V.
    """

    def __init__(self, rows: Sequence[tuple[float, int, float, float]], vocab_size: int) -> None:
        temperature, top_k, top_p, min_p = zip(*rows, strict=True)
        B = len(temperature)
        self._threads = min(torch.get_num_threads(), B)
        self._parts = (
            torch.tensor(temperature, dtype=torch.float64),
            torch.tensor([min(k, vocab_size) for k in top_k], dtype=torch.int64),
            torch.tensor(top_p, dtype=torch.float64),
            torch.tensor([-math.log(p) if p else math.inf for p in min_p], dtype=torch.float64),
        )
        self._memory = torch.empty(memory_of(vocab_size, self._threads), dtype=torch.float64)
        addresses = [0, *(part.data_ptr() for part in self._parts), 0]
        self._table: ctypes.Array[ctypes.c_int64] = table(
            [*addresses, 0, self._memory.data_ptr(), B, vocab_size, 0, 0]
        )

    def __call__(self, logits: Tensor, draws: Tensor) -> Tensor:
        """A token a row, int64 [B], of logits [B,V] and numbers from 0 to 1, fp64 [B]."""
        if logits.dtype not in (torch.float32, torch.float64) or logits.stride(-1) != 1:
            logits = logits.float().contiguous()
        tokens = torch.empty(
            logits.shape[0], dtype=torch.int64
        )  # len is Python's, and slower than the kernel
        self._table[SamplingTable.DRAWS] = draws.data_ptr()
        self._table[SamplingTable.LOGITS] = logits.data_ptr()
        self._table[SamplingTable.TOKENS] = tokens.data_ptr()
        self._table[SamplingTable.STRIDE] = logits.stride(0)
        self._table[SamplingTable.DOUBLE] = logits.dtype is torch.float64
        launch(sampler(), self._table, self._threads)
        return tokens


def sampler() -> Any | None:  # noqa: ANN401
    """The kernel for `SamplingCall`, compiled on first use, some seconds, and kept on disk; None where it cannot be."""
    return _kernel(None)


@optional
def _kernel(made: Compiler, _: None) -> Any:  # noqa: ANN401
    return compile_sampler(made)
