"""Mixers of the decoding kernel: one token a row through retention, from its state, or softmax attention, from its KV cache.

Both leave out the last product: they end with heads that are packed for it. What a row gets depends on nothing but itself.
"""

# ruff: noqa: ANN401 (compiled functions have types that mypy does not know)

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from retnet.engine.cpu_decoder.table import LayerTable
from retnet.ops.cpu.activations import Activations
from retnet.ops.cpu.jit import Compiler
from retnet.ops.cpu.skinny_gemm import SkinnyGemm


class RotationFunctions(NamedTuple):
    """Compiled functions around rotary positions.

    Attributes:
        new_angles: new_angles(layer, other): whether they turn by different angles.
        find_angles: find_angles(layer, position, slots, (cos, sin)): this thread's share of the rows [B,K/2].
        prepare: prepare(layer, x, h, bias, norm, cos, sin): bias, SiLU, norm and rotation of head h of queries or keys.
    """

    new_angles: Callable[..., Any]
    find_angles: Callable[..., None]
    prepare: Callable[..., None]


def compile_rotation(compiler: Compiler, activations: Activations) -> RotationFunctions:
    """The functions; see `RotationFunctions`."""
    array, real, thread, threads = compiler.array, compiler.real, compiler.thread, compiler.threads
    silu = activations.silu

    @compiler.function
    def new_angles(layer: Any, other: Any) -> bool:
        count = layer[LayerTable.ANGLES]
        if count != other[LayerTable.ANGLES]:
            return True
        one, two = (
            array(layer[LayerTable.THETA], (count,), np.float64),
            array(other[LayerTable.THETA], (count,), np.float64),
        )
        different = False
        for j in range(count):
            different |= one[j] != two[j]
        return different

    @compiler.function
    def find_angles(layer: Any, position: Any, slots: Any, angles: Any) -> None:
        theta = array(layer[LayerTable.THETA], (layer[LayerTable.ANGLES],), np.float64)
        (cos, sin), B, i, n = angles, len(slots), thread(), threads()
        for b in range(B * i // n, B * (i + 1) // n):
            for j in range(len(theta)):
                angle = position[slots[b]] * theta[j]
                cos[b, j], sin[b, j] = math.cos(angle), math.sin(angle)

    @compiler.function
    def turn(x: Any, cos: Any, sin: Any, half: int, layout: int) -> None:
        for i in range(half):
            m, n = (2 * i, 2 * i + 1) if layout == 1 else (i, i + half)
            x[m], x[n] = x[m] * cos[i] - x[n] * sin[i], x[n] * cos[i] + x[m] * sin[i]

    @compiler.function
    def prepare(layer: Any, x: Any, h: int, bias: int, norm: int, cos: Any, sin: Any) -> None:
        K = len(x)
        if bias:
            b = array(bias + 4 * h * K, (K,), np.float32)
            for j in range(K):
                x[j] += b[j]
        if layer[LayerTable.ACTIVATED]:
            for j in range(K):
                x[j] = silu(x[j])
        if norm:
            weight, square = array(norm, (K,), np.float32), np.float32(0)
            for j in range(K):
                square += x[j] ** 2
            shrink = np.float32(1 / math.sqrt(square / K + real(layer[LayerTable.QK_EPS])))
            for j in range(K):
                x[j] *= shrink * weight[j]
        if layer[LayerTable.LAYOUT]:
            turn(x, cos, sin, layer[LayerTable.ANGLES], layer[LayerTable.LAYOUT])

    return RotationFunctions(new_angles, find_angles, prepare)


def compile_projections(compiler: Compiler, gemm: SkinnyGemm) -> Callable[..., None]:
    """project(layer, D, B, packed, projected): this thread's share of q [H·K], k [G·K], v [G·V] and gate [H·V] of B rows."""
    matrix, _, _, rows = gemm

    @compiler.function
    def project(layer: Any, D: int, B: int, packed: Any, projected: Any) -> None:
        H, G, K, V = layer[LayerTable.H], layer[LayerTable.G], layer[LayerTable.K], layer[LayerTable.V]
        widths, first = (H * K, G * K, G * V, H * V), 0
        for i in range(4):
            weight = layer[LayerTable.Q + i]
            if weight:
                rows(
                    packed, B, matrix(weight, layer[LayerTable.Q_SCALES + i], widths[i], D), projected, first
                )
            first += widths[i]

    return project


def compile_retention(
    compiler: Compiler,
    gemm: SkinnyGemm,
    update: Callable[..., None],
    activations: Activations,
    rotation: RotationFunctions,
) -> Callable[..., None]:
    """retain(layer, (state, positions, slots), (projected, heads), (cos, sin), turned)."""
    array, thread, threads = compiler.array, compiler.thread, compiler.threads
    barrier, real = compiler.barrier, compiler.real
    pack = gemm.pack
    exp, silu, prepare, one = activations.exp, activations.silu, rotation.prepare, np.float32(1)

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
    def finish(layer: Any, y: Any, first: int, gate: Any) -> None:
        """Weights and bias of the norm of heads, of which y are those from number `first` on, and their gate."""
        width = len(y)
        if layer[LayerTable.HEAD_WEIGHT]:
            weight = array(layer[LayerTable.HEAD_WEIGHT] + 4 * first, (width,), np.float32)
            for j in range(width):
                y[j] *= weight[j]
        if layer[LayerTable.HEAD_BIAS]:
            bias = array(layer[LayerTable.HEAD_BIAS] + 4 * first, (width,), np.float32)
            for j in range(width):
                y[j] += bias[j]
        if layer[LayerTable.GATE] and layer[LayerTable.SIGMOID]:
            for j in range(width):
                y[j] /= one + exp(-gate[j])
        elif layer[LayerTable.GATE]:
            for j in range(width):
                y[j] *= silu(gate[j])

    @compiler.function
    def retain(layer: Any, memory: Any, shared: Any, angles: Any, turned: bool) -> None:
        """MSR(z) but for its last product: this thread's share of the heads, normalised, gated and packed."""
        (state, positions, slots), (projected, heads), (cos, sin) = memory, shared, angles
        H, K, V = layer[LayerTable.H], layer[LayerTable.K], layer[LayerTable.V]
        B, i, n = len(slots), thread(), threads()
        norm, eps, bridge = (
            layer[LayerTable.HEAD_NORM],
            real(layer[LayerTable.HEAD_EPS]),
            layer[LayerTable.BRIDGE] != 0,
        )
        log_decay, scale = (
            array(layer[LayerTable.LOG_DECAY], (H,), np.float32),
            np.float32(real(layer[LayerTable.SCALE])),
        )
        together = layer[LayerTable.TOGETHER]
        groups, width = H // together, together * V
        if groups % n or turned:  # else a thread has computed all that its heads need
            barrier()
        y = np.empty(width, np.float32)
        for task in range(B * groups * i // n, B * groups * (i + 1) // n):
            group, b = task // B, task % B
            row, first = projected[b], group * width
            for h in range(group * together, (group + 1) * together):
                query, key = row[h * K : (h + 1) * K], row[(H + h) * K : (H + h + 1) * K]
                value = row[2 * H * K + h * V : 2 * H * K + (h + 1) * V]
                prepare(layer, query, h, layer[LayerTable.Q_BIAS], layer[LayerTable.Q_NORM], cos[b], sin[b])
                prepare(layer, key, h, layer[LayerTable.K_BIAS], layer[LayerTable.K_NORM], cos[b], sin[b])
                for j in range(K):
                    query[j] *= scale
                if layer[LayerTable.ACTIVATED]:
                    for j in range(V):
                        value[j] = silu(value[j])
                S = array(state + 4 * (slots[b] * H + h) * K * V, (K, V), np.float32)
                o = y[h * V - first : (h + 1) * V - first]
                update(S, np.float32(math.exp(log_decay[h])), key, value, query, o)
            normalise(y, norm, eps, log_decay[group * together], positions[slots[b]] + 1, bridge)
            opened = H * (2 * K + V) + first
            finish(layer, y, first, row[opened : opened + width])
            pack(heads, B, H * V, b, first, y)

    return retain


def compile_softmax(
    compiler: Compiler, gemm: SkinnyGemm, activations: Activations, rotation: RotationFunctions
) -> Callable[..., None]:
    """attend(layer, (keys, values, positions, slots), (projected, heads), (cos, sin)); caches are addresses, by slot."""
    array, thread, threads = compiler.array, compiler.thread, compiler.threads
    barrier, real = compiler.barrier, compiler.real
    pack = gemm.pack
    exp, prepare = activations.exp, rotation.prepare

    @compiler.function
    def score(query: Any, keys: Any, g: int, scores: Any) -> None:
        """Products with the keys [S,G,K] of head g. Four at a time, whose sums do not wait for each other."""
        S, zero = len(keys), np.float32(0)
        for s in range(0, S // 4 * 4, 4):
            a, b, c, d = keys[s, g], keys[s + 1, g], keys[s + 2, g], keys[s + 3, g]
            ta, tb, tc, td = zero, zero, zero, zero
            for j in range(len(query)):
                x = query[j]
                ta += x * a[j]
                tb += x * b[j]
                tc += x * c[j]
                td += x * d[j]
            scores[s], scores[s + 1], scores[s + 2], scores[s + 3] = ta, tb, tc, td
        for s in range(S // 4 * 4, S):
            a, ta = keys[s, g], zero
            for j in range(len(query)):
                ta += query[j] * a[j]
            scores[s] = ta

    @compiler.function
    def weigh(scores: Any) -> None:
        """softmax of the scores, in place."""
        highest, total = scores[0], np.float32(0)
        for s in range(1, len(scores)):
            highest = max(highest, scores[s])
        for s in range(len(scores)):
            scores[s] = exp(scores[s] - highest)
            total += scores[s]
        for s in range(len(scores)):
            scores[s] /= total

    @compiler.function
    def gather(weights: Any, values: Any, g: int, out: Any) -> None:
        """The sum of the values [S,G,V] of head g by their weights."""
        S = len(values)
        out[:] = 0
        for s in range(0, S // 4 * 4, 4):
            a, b, c, d = values[s, g], values[s + 1, g], values[s + 2, g], values[s + 3, g]
            wa, wb, wc, wd = weights[s], weights[s + 1], weights[s + 2], weights[s + 3]
            for j in range(len(out)):
                out[j] += wa * a[j] + wb * b[j] + wc * c[j] + wd * d[j]
        for s in range(S // 4 * 4, S):
            a, wa = values[s, g], weights[s]
            for j in range(len(out)):
                out[j] += wa * a[j]

    @compiler.function
    def remember(layer: Any, memory: Any, projected: Any, angles: Any) -> None:
        """Appends keys and values to the caches: this thread's share of their heads."""
        (keys, values, positions, slots), (cos, sin) = memory, angles
        H, G, K, V = layer[LayerTable.H], layer[LayerTable.G], layer[LayerTable.K], layer[LayerTable.V]
        B, i, n = len(slots), thread(), threads()
        for task in range(B * G * i // n, B * G * (i + 1) // n):
            g, b = task // B, task % B
            row, place = projected[b], (positions[slots[b]] * G + g) * 4
            key = array(keys[slots[b]] + place * K, (K,), np.float32)
            key[:] = row[(H + g) * K : (H + g + 1) * K]
            prepare(layer, key, g, layer[LayerTable.K_BIAS], layer[LayerTable.K_NORM], cos[b], sin[b])
            first = (H + G) * K + g * V
            value = array(values[slots[b]] + place * V, (V,), np.float32)
            value[:] = row[first : first + V]
            if layer[LayerTable.V_BIAS]:
                bias = array(layer[LayerTable.V_BIAS] + 4 * g * V, (V,), np.float32)
                for j in range(V):
                    value[j] += bias[j]

    @compiler.function
    def attend(layer: Any, memory: Any, shared: Any, angles: Any) -> None:
        """softmax(q Kᵀ / √K) V but for the last product: this thread's share of the heads, packed."""
        (keys, values, positions, slots), (projected, heads), (cos, sin) = memory, shared, angles
        H, G, K, V = layer[LayerTable.H], layer[LayerTable.G], layer[LayerTable.K], layer[LayerTable.V]
        B, i, n = len(slots), thread(), threads()
        scale = np.float32(real(layer[LayerTable.SCALE]))
        barrier()
        remember(layer, memory, projected, angles)
        barrier()
        o = np.empty(V, np.float32)
        for task in range(B * H * i // n, B * H * (i + 1) // n):
            h, b = task // B, task % B
            query, S = projected[b, h * K : (h + 1) * K], positions[slots[b]] + 1
            prepare(layer, query, h, layer[LayerTable.Q_BIAS], layer[LayerTable.Q_NORM], cos[b], sin[b])
            for j in range(K):
                query[j] *= scale
            g, scores = h // (H // G), np.empty(S, np.float32)
            score(query, array(keys[slots[b]], (S, G, K), np.float32), g, scores)
            weigh(scores)
            gather(scores, array(values[slots[b]], (S, G, V), np.float32), g, o)
            pack(heads, B, H * V, b, h * V, o)

    return attend
