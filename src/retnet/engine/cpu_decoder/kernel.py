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

from retnet.engine.cpu_decoder.mixer_kernels import (
    compile_projections,
    compile_retention,
    compile_rotation,
    compile_softmax,
)
from retnet.engine.cpu_decoder.table import LayerTable, ModelTable, Sizes
from retnet.ops.cpu.activations import Activations
from retnet.ops.cpu.jit import Compiler
from retnet.ops.cpu.skinny_gemm import SkinnyGemm
from retnet.ops.cpu.tile import LANES


class CallTable(IntEnum):
    """The kernel's own table; from `LAYERS` on, a `StateTable` for each layer."""

    MODEL = 0  # the model's table, see `table`
    ROWS = 1
    TOKENS = 2  # int64 [B]
    SLOTS = 3  # int64 [B], all different
    POOL = 4  # how many slots there are
    LOGITS = 5  # [B,vocabulary]
    MEMORY = 6  # what threads give each other and what each has for itself, see `memory_of`
    LAYERS = 7


class StateTable(IntEnum):
    """Where the states of a layer lie."""

    STATE = 0  # of retention [slots,H,K,V]; of softmax the addresses of keys [S,G,K], int64 [slots]
    VALUES = 1  # of softmax the addresses of values [S,G,V], int64 [slots]
    POSITION = 2  # int64 [slots], tokens seen, which move on by one


def memory_of(rows: int, sizes: Sizes, threads: int) -> int:
    """fp32 numbers that the kernel works in."""
    D, projected, N, widest, angles = sizes
    shared = projected + D + 2 * N + 2 * widest + 2 * angles
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
    state_size = len(StateTable)
    normed, enter, add = _compile_ends(compiler, gemm)
    rotation = compile_rotation(compiler, activations)
    project = compile_projections(compiler, gemm)
    retain = compile_retention(compiler, gemm, update, activations, rotation)
    attend = compile_softmax(compiler, gemm, activations, rotation)
    activate = _compile_feed_forward(compiler, gemm, activations)
    new_angles, find_angles = rotation.new_angles, rotation.find_angles

    @compiler.function
    def take(memory: int, B: int, width: int) -> Any:
        """An array [B,width], and the memory behind it; both begin with a line of the caches."""
        return array(memory, (B, width), np.float32), memory + 4 * padded(B * width)

    @compiler.function
    def share(memory: int, B: int, model: Any) -> Any:
        """What each thread has for itself, what they give each other, and cos and sin of the rotation."""
        D, N, widest = model[ModelTable.D], model[ModelTable.N], model[ModelTable.WIDEST]
        projected, memory = take(memory, B, model[ModelTable.PROJECTED])
        sums, memory = take(memory, B, D)
        hidden, memory = take(memory, B, N)
        gates, memory = take(memory, B, N)
        heads, memory = take(memory, B, widest)
        active, memory = take(memory, B, widest)
        cos, memory = take(memory, B, model[ModelTable.ANGLES])
        sin, memory = take(memory, B, model[ModelTable.ANGLES])
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
        D, eps, count = model[ModelTable.D], real(model[ModelTable.EPS]), model[ModelTable.LAYERS]
        layers = array(table[CallTable.MODEL] + 8 * layers_at, (count, layer_size), np.int64)
        slots = array(table[CallTable.SLOTS], (B,), np.int64)
        (x, z, packed), shared, angles = share(table[CallTable.MEMORY], B, model)
        projected, sums, hidden, gates, heads, active = shared
        enter(model, array(table[CallTable.TOKENS], (B,), np.int64), x, z, packed)
        turned_by = -1  # the layer whose angles are there
        for number in range(count):
            layer, at = layers[number], call_layers + state_size * number
            state, pool = pointer[at + StateTable.STATE], (table[CallTable.POOL],)
            position = array(pointer[at + StateTable.POSITION], pool, np.int64)
            N, width = layer[LayerTable.N], layer[LayerTable.H] * layer[LayerTable.V]
            normed(x, layer[LayerTable.MIXER_NORM], layer[LayerTable.MIXER_BIAS], eps, z, packed)
            turned = layer[LayerTable.LAYOUT] != 0 and (turned_by < 0 or new_angles(layer, layers[turned_by]))
            if turned:
                turned_by = number
                find_angles(layer, position, slots, angles)
            project(layer, D, B, packed, projected)
            if layer[LayerTable.KIND] == 0:
                retain(layer, (state, position, slots), (projected, heads), angles, turned)
            else:
                keys = array(state, pool, np.int64)
                values = array(pointer[at + StateTable.VALUES], pool, np.int64)
                attend(layer, (keys, values, position, slots), (projected, heads), angles)
            barrier()
            rows(heads, B, matrix(layer[LayerTable.OUT], layer[LayerTable.OUT_SCALES], D, width), sums, 0)
            barrier()
            if thread() == 0:
                for b in range(B):
                    position[slots[b]] += 1
            add(model, real(layer[LayerTable.ALPHA]), real(layer[LayerTable.BETA]), x, z, sums)
            normed(x, layer[LayerTable.FFN_NORM], layer[LayerTable.FFN_BIAS], eps, z, packed)
            rows(packed, B, matrix(layer[LayerTable.FC1], layer[LayerTable.FC1_SCALES], N, D), hidden, 0)
            if layer[LayerTable.FFN_GATE]:
                rows(
                    packed,
                    B,
                    matrix(layer[LayerTable.FFN_GATE], layer[LayerTable.FFN_GATE_SCALES], N, D),
                    gates,
                    0,
                )
            activate(layer, B, hidden, gates, active)
            barrier()
            rows(active, B, matrix(layer[LayerTable.FC2], layer[LayerTable.FC2_SCALES], D, N), sums, 0)
            barrier()
            add(model, real(layer[LayerTable.FFN_ALPHA]), real(layer[LayerTable.FFN_BETA]), x, z, sums)
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

    @compiler.function
    def add(model: Any, a: float, b: float, x: Any, z: Any, branch: Any) -> None:
        """The residual sum: x = a x + b f, or a z + b f, of x [B,D], what its norm made of it and what the branch did."""
        alpha, beta = np.float32(a), np.float32(b)
        if model[ModelTable.NORMED]:
            x[:] = z
        if alpha == 1 and beta == 1:
            x += branch
        else:
            B, D = x.shape
            for i in range(B):
                for j in range(D):
                    x[i, j] = alpha * x[i, j] + beta * branch[i, j]

    return normed, enter, add


def _compile_feed_forward(compiler: Compiler, gemm: SkinnyGemm, activations: Activations) -> Any:
    thread, threads, pack = compiler.thread, compiler.threads, gemm.pack
    silu, gelu = activations.silu, activations.gelu

    @compiler.function
    def activate(layer: Any, B: int, hidden: Any, gates: Any, active: Any) -> None:
        """What is between the FFN's products, for this thread's share of the first."""
        N, i, n = layer[LayerTable.N], thread(), threads()
        begin, end = N * i // n, N * (i + 1) // n
        for b in range(B):
            row, gate = hidden[b, begin:end], gates[b, begin:end]
            if layer[LayerTable.SILU]:
                for j in range(len(row)):
                    row[j] = silu(row[j])
            else:
                for j in range(len(row)):
                    row[j] = gelu(row[j])
            if layer[LayerTable.FFN_GATE]:
                for j in range(len(row)):
                    row[j] *= gate[j]
            pack(active, B, N, b, begin, row)

    return activate
