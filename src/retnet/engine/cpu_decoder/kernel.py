"""Decoding kernel: one token a row through embedding, all blocks and head, in one compiled call, for 1 to 64 rows.

A team of threads enters once a token. Threads share out the rows of every weight and the heads of every state, and wait for
each other only where one needs what others have computed. The residual stream is small, so every thread keeps its own.
"""

# ruff: noqa: ANN401 (compiled functions have types that mypy does not know)

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np

from retnet.engine.cpu_decoder.table import LayerTable, ModelTable
from retnet.ops.cpu.activations import Activations
from retnet.ops.cpu.jit import Compiler
from retnet.ops.cpu.skinny_gemm import SkinnyGemm
from retnet.ops.cpu.tile import LANES


class CallTable(IntEnum):
    """The kernel's own table; from `LAYERS` on, a state's and a position's address for each layer."""

    MODEL = 0  # the model's table, see `table`
    ROWS = 1
    TOKENS = 2  # int64 [B]
    SLOTS = 3  # int64 [B], all different
    POOL = 4  # how many slots there are
    LOGITS = 5  # [B,vocabulary]
    MEMORY = 6  # what threads give each other and what each has for itself, see `memory_of`
    LAYERS = 7  # states [slots,H,K,V], then positions int64 [slots], which move on by one


def memory_of(rows: int, sizes: tuple[int, int, int, int, int], threads: int) -> int:
    """fp32 numbers that the kernel works in; sizes: D, H, K, V, N."""
    D, H, K, V, N = sizes
    widest = max(D, H * V, N) + LANES
    shared = 2 * H * (K + V) + D + 2 * N + 2 * widest + K
    return rows * (shared + threads * (2 * D + widest)) + LANES * (8 + 3 * threads)


def compile_model_step(
    compiler: Compiler,
    gemm: SkinnyGemm,
    update: Callable[..., None],
    activations: Activations,
) -> Any:
    """The kernel; its table: see `CallTable`."""
    array, numbers, real = compiler.array, compiler.numbers, compiler.real
    thread, barrier = compiler.thread, compiler.barrier
    matrix, padded, _, rows = gemm
    layer_size, layers_at, call_layers = len(LayerTable), len(ModelTable), int(CallTable.LAYERS)
    normed, enter = _compile_ends(compiler, gemm)
    mix = _compile_mixer(compiler, gemm, update, activations)
    activate = _compile_feed_forward(compiler, gemm, activations)

    @compiler.function
    def take(memory: int, B: int, width: int) -> Any:
        """An array [B,width], and the memory behind it; both begin with a line of the caches."""
        return array(memory, (B, width), np.float32), memory + 4 * padded(B * width)

    @compiler.function
    def share(memory: int, B: int, model: Any) -> Any:
        """What each thread has for itself, what they give each other, and cos and sin of the rotation."""
        D, H, K, V, N = (
            model[ModelTable.D],
            model[ModelTable.H],
            model[ModelTable.K],
            model[ModelTable.V],
            model[ModelTable.N],
        )
        widest = max(D, H * V, N) + LANES
        projected, memory = take(memory, B, 2 * H * (K + V))
        sums, memory = take(memory, B, D)
        hidden, memory = take(memory, B, N)
        gates, memory = take(memory, B, N)
        heads, memory = take(memory, B, widest)
        active, memory = take(memory, B, widest)
        cos, memory = take(memory, B, K // 2)
        sin, memory = take(memory, B, K // 2)
        memory += thread() * 4 * (2 * padded(B * D) + padded(B * widest))
        x, memory = take(memory, B, D)
        z, memory = take(memory, B, D)
        packed, memory = take(memory, B, widest)
        return (
            (x, z, packed.ravel()),
            (projected, sums, hidden, gates, heads.ravel(), active.ravel()),
            (cos, sin),
        )

    @compiler.kernel
    def decode_step_numba(pointer: Any) -> None:
        table = numbers(pointer, call_layers)
        B, model = table[CallTable.ROWS], array(table[CallTable.MODEL], (layers_at,), np.int64)
        D, N, values = model[ModelTable.D], model[ModelTable.N], model[ModelTable.H] * model[ModelTable.V]
        eps, count = real(model[ModelTable.EPS]), model[ModelTable.LAYERS]
        layers = array(table[CallTable.MODEL] + 8 * layers_at, (count, layer_size), np.int64)
        slots = array(table[CallTable.SLOTS], (B,), np.int64)
        (x, z, packed), shared, angles = share(table[CallTable.MEMORY], B, model)
        projected, sums, hidden, gates, heads, active = shared
        enter(model, array(table[CallTable.TOKENS], (B,), np.int64), x, z, packed)
        for number in range(count):
            layer = layers[number]
            state = pointer[call_layers + 2 * number]
            position = array(pointer[call_layers + 2 * number + 1], (table[CallTable.POOL],), np.int64)
            theta_before = layers[number - 1][LayerTable.THETA] if number else 0
            normed(x, layer[LayerTable.MIXER_NORM], layer[LayerTable.MIXER_BIAS], eps, z, packed)
            mix(model, layer, (state, position, slots), packed, (projected, heads), angles, theta_before)
            barrier()
            rows(heads, B, matrix(layer[LayerTable.OUT], layer[LayerTable.OUT_SCALES], D, values), sums, 0)
            barrier()
            if thread() == 0:
                for b in range(B):
                    position[slots[b]] += 1
            x += sums
            normed(x, layer[LayerTable.FFN_NORM], layer[LayerTable.FFN_BIAS], eps, z, packed)
            rows(packed, B, matrix(layer[LayerTable.FC1], layer[LayerTable.FC1_SCALES], N, D), hidden, 0)
            if model[ModelTable.FFN_GATED]:
                rows(
                    packed,
                    B,
                    matrix(layer[LayerTable.FFN_GATE], layer[LayerTable.FFN_GATE_SCALES], N, D),
                    gates,
                    0,
                )
            activate(model, hidden, gates, active)
            barrier()
            rows(active, B, matrix(layer[LayerTable.FC2], layer[LayerTable.FC2_SCALES], D, N), sums, 0)
            barrier()
            x += sums
        normed(x, model[ModelTable.NORM], model[ModelTable.NORM_BIAS], eps, z, packed)
        logits = array(table[CallTable.LOGITS], (B, model[ModelTable.LOGITS]), np.float32)
        rows(
            packed,
            B,
            matrix(model[ModelTable.HEAD], model[ModelTable.HEAD_SCALES], model[ModelTable.LOGITS], D),
            logits,
            0,
        )

    return decode_step_numba


def _compile_ends(compiler: Compiler, gemm: SkinnyGemm) -> Any:
    array, real, pack = compiler.array, compiler.real, gemm.pack

    @compiler.function
    def normed(x: Any, weight: int, bias: int, eps: float, y: Any, packed: Any) -> None:
        """LayerNorm, or without bias RMSNorm, as it is and packed for products."""
        B, D = x.shape
        weights, biases = array(weight, (D,), np.float32), array(bias, (D,), np.float32)
        for b in range(B):
            row, to, mean, square = x[b], y[b], np.float32(0), np.float32(0)
            if bias:
                for j in range(D):
                    mean += row[j]
                mean /= np.float32(D)
            for j in range(D):
                square += (row[j] - mean) ** 2
            shrink = np.float32(1 / math.sqrt(square / D + eps))
            if bias:
                for j in range(D):
                    to[j] = (row[j] - mean) * shrink * weights[j] + biases[j]
            else:
                for j in range(D):
                    to[j] = row[j] * shrink * weights[j]
            pack(packed, B, D, b, 0, to)

    @compiler.function
    def enter(model: Any, tokens: Any, x: Any, z: Any, packed: Any) -> None:
        """x = what the first block reads."""
        (B, D), scale = x.shape, np.float32(real(model[ModelTable.SCALE]))
        embedding = array(model[ModelTable.EMBEDDING], (model[ModelTable.TOKENS], D), np.float32)
        for b in range(B):
            row = embedding[tokens[b]]
            for j in range(D):
                x[b, j] = row[j] * scale
        if model[ModelTable.EMBEDDING_NORM]:
            normed(
                x,
                model[ModelTable.EMBEDDING_NORM],
                model[ModelTable.EMBEDDING_BIAS],
                real(model[ModelTable.EPS]),
                z,
                packed,
            )
            x[:] = z

    return normed, enter


def _compile_mixer(
    compiler: Compiler, gemm: SkinnyGemm, update: Callable[..., None], activations: Activations
) -> Any:
    array, thread, threads, barrier, real = (
        compiler.array,
        compiler.thread,
        compiler.threads,
        compiler.barrier,
        compiler.real,
    )
    matrix, _, pack, rows = gemm
    silu = activations.silu

    @compiler.function
    def find_angles(theta: Any, position: Any, slots: Any, cos: Any, sin: Any) -> None:
        """cos and sin of position · theta, [B,K/2]; this thread's share of the rows."""
        B, i, n = len(slots), thread(), threads()
        for b in range(B * i // n, B * (i + 1) // n):
            for j in range(len(theta)):
                angle = position[slots[b]] * theta[j]
                cos[b, j], sin[b, j] = math.cos(angle), math.sin(angle)

    @compiler.function
    def turn(x: Any, cos: Any, sin: Any, layout: int) -> None:
        half = len(cos)
        for i in range(half):
            m, n = (2 * i, 2 * i + 1) if layout == 1 else (i, i + half)
            x[m], x[n] = x[m] * cos[i] - x[n] * sin[i], x[n] * cos[i] + x[m] * sin[i]

    @compiler.function
    def normalise(y: Any, norm: int, eps: float, log_decay: float, seen: int, bridge: bool) -> None:
        shrink, mean, square = 1.0, np.float32(0), np.float32(0)
        if bridge:
            full = seen if log_decay == 0 else math.expm1(seen * log_decay) / math.expm1(log_decay)
            shrink = 1 / math.sqrt(full)
        if norm == 1:
            for j in range(len(y)):
                mean += y[j]
            mean /= np.float32(len(y))
        if norm > 0:
            for j in range(len(y)):
                square += (y[j] - mean) ** 2
            shrink /= math.sqrt(square / len(y) * shrink * shrink + eps)
        factor = np.float32(shrink)
        for j in range(len(y)):
            y[j] = (y[j] - mean) * factor

    @compiler.function
    def new_angles(theta: Any, before: int) -> bool:
        """Whether they are not those of the layer before."""
        if before == 0:
            return True
        other = array(before, (len(theta),), np.float64)
        different = False
        for j in range(len(theta)):
            different |= theta[j] != other[j]
        return different

    @compiler.function
    def mix(
        model: Any, layer: Any, memory: Any, packed: Any, shared: Any, angles: Any, theta_before: int
    ) -> None:
        """MSR(z) but for its last product: this thread's share of the heads, normalised, gated and packed."""
        (state, positions, slots), (projected, heads), (cos, sin) = memory, shared, angles
        D, H, K, V = model[ModelTable.D], model[ModelTable.H], model[ModelTable.K], model[ModelTable.V]
        B, i, n = len(slots), thread(), threads()
        gated, layout, bridge = (
            model[ModelTable.GATED],
            model[ModelTable.LAYOUT],
            model[ModelTable.BRIDGE] != 0,
        )
        norm, eps = model[ModelTable.HEAD_NORM], real(model[ModelTable.HEAD_EPS])
        log_decay = array(layer[LayerTable.LOG_DECAY], (H,), np.float32)
        theta = array(layer[LayerTable.THETA], (K // 2,), np.float64)
        turned = layout != 0 and new_angles(theta, theta_before)
        if turned:
            find_angles(theta, positions, slots, cos, sin)
        rows(packed, B, matrix(layer[LayerTable.Q], layer[LayerTable.Q_SCALES], H * K, D), projected, 0)
        rows(packed, B, matrix(layer[LayerTable.K], layer[LayerTable.K_SCALES], H * K, D), projected, H * K)
        rows(
            packed, B, matrix(layer[LayerTable.V], layer[LayerTable.V_SCALES], H * V, D), projected, 2 * H * K
        )
        if gated:
            rows(
                packed,
                B,
                matrix(layer[LayerTable.GATE], layer[LayerTable.GATE_SCALES], H * V, D),
                projected,
                H * (2 * K + V),
            )
        if H % n or turned:  # else a thread has computed all that its heads need
            barrier()
        o = np.empty(V, np.float32)
        for task in range(B * H * i // n, B * H * (i + 1) // n):
            h, b = task // B, task % B
            row, first = projected[b], 2 * H * K + h * V
            query, key = row[h * K : (h + 1) * K], row[(H + h) * K : (H + h + 1) * K]
            if layout:
                turn(query, cos[b], sin[b], layout)
                turn(key, cos[b], sin[b], layout)
            for j in range(K):
                query[j] *= np.float32(1 / math.sqrt(K))
            S = array(state + 4 * (slots[b] * H + h) * K * V, (K, V), np.float32)
            update(S, np.float32(math.exp(log_decay[h])), key, row[first : first + V], query, o)
            normalise(o, norm, eps, log_decay[h], positions[slots[b]] + 1, bridge)
            if gated:
                gate = row[first + H * V : first + (H + 1) * V]
                for j in range(V):
                    o[j] *= silu(gate[j])
            pack(heads, B, H * V, b, h * V, o)

    return mix


def _compile_feed_forward(compiler: Compiler, gemm: SkinnyGemm, activations: Activations) -> Any:
    thread, threads, pack, (silu, gelu) = compiler.thread, compiler.threads, gemm.pack, activations

    @compiler.function
    def activate(model: Any, hidden: Any, gates: Any, active: Any) -> None:
        """What is between the FFN's products, for this thread's share of the first."""
        (B, N), i, n = hidden.shape, thread(), threads()
        begin, end = N * i // n, N * (i + 1) // n
        for b in range(B):
            row, gate = hidden[b, begin:end], gates[b, begin:end]
            if model[ModelTable.SILU]:
                for j in range(len(row)):
                    row[j] = silu(row[j])
            else:
                for j in range(len(row)):
                    row[j] = gelu(row[j])
            if model[ModelTable.FFN_GATED]:
                for j in range(len(row)):
                    row[j] *= gate[j]
            pack(active, B, N, b, begin, row)

    return activate
