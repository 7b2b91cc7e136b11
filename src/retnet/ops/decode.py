"""Decoding on a CPU: every weight and every state is read once, at the speed of the memory, in few calls.

torch's matrix product with a few rows runs on one thread at a third of that thread's bandwidth, updates a state in three
passes, and dispatches seventy small operators a layer. The kernels here, compiled by numba where it is installed, do the
same in one pass on all of torch's threads. Where they cannot run (no numba, another type, a gradient) the functions return
None, which means "compose it from the parts"; the parts are the law, and the kernels are tested against them.

Weights are fp32, or int8 with one fp32 scale a row, a quarter of the bytes: one source, compiled once for each. int8 numbers
become fp32 in registers, and a row's scale multiplies its finished dot product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retnet.ops import native

MAX_ROWS = 8  # beyond, torch's matrix product is the faster one
MIN_SIZE = 1 << 14  # numbers in a weight; below, torch's overhead is the smaller one

_NORMS = {"none": 0, "group": 1, "rms": 2}
_LAYOUTS = {"none": 0, "interleaved": 1, "halves": 2}


class Core(NamedTuple):
    """Multi-scale retention, as the kernel of a block reads it: weights [out,in] and constants of a mixer."""

    weights: Sequence[Tensor | None]  # q and k [H·K,D], v and gate (or None) [H·V,D], out [D,H·V]
    scales: Sequence[Tensor | None]  # [out] fp32 of each weight that is int8
    log_decay: Tensor  # [H] fp32
    theta: Tensor  # [K/2] fp64, empty without rotation
    layout: str  # "interleaved", "halves" or "none"
    bridge: bool  # rows divided by √Σγ before the norm (score_norm "decay")
    norm: str  # "group", "rms" or "none"
    eps: float


class Shell(NamedTuple):
    """What a block has around its mixer: two norms (without bias: RMSNorm) and the FFN."""

    mixer_norm: Tensor  # [D]
    mixer_bias: Tensor | None  # [D]
    ffn_norm: Tensor  # [D]
    ffn_bias: Tensor | None  # [D]
    weights: Sequence[Tensor | None]  # fc1 and gate (or None) [N,D], fc2 [D,N]
    scales: Sequence[Tensor | None]  # [out] fp32 of each weight that is int8
    norm_eps: float
    act: str  # "gelu" or "silu"


class Plan(NamedTuple):
    """A block whose tensors have been checked, see `block_plan`."""

    tensors: tuple[Tensor | None, ...]  # norms, weights, log_decay, theta, scales
    pointers: list[int]  # their addresses
    number: torch.dtype  # of the weights
    sizes: tuple[int, int, int, int, int]  # D H K V N
    flags: tuple[int, ...]
    reals: tuple[float, float]  # ε of the heads' and of the block's norms

    def moved(self) -> bool:
        """Whether a tensor got other memory, as `.to` and assignments to `.data` give it."""
        return self.pointers != _addresses(self.tensors)


class _Kernels(NamedTuple):
    product: Any
    block: Any
    step: Any


def few_rows(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor | None:
    """x Wᵀ: fp32 x [B,K] and weight [N,K] → [B,N]; None where the kernel cannot run.

    W is an fp32 weight, or an int8 one whose rows are multiplied by an fp32 scale [N].
    """
    number = torch.float32 if scale is None else torch.int8
    if (
        not _eligible(x)
        or weight.numel() < MIN_SIZE
        or x.shape[1] != weight.shape[1]
        or not _readable((weight,), number)
    ):
        return None
    if scale is not None and not _readable((scale,), torch.float32, weight.shape[:1]):
        return None
    if (kernels := _kernels(number)) is None:
        return None
    x, (N, K) = x.contiguous(), weight.shape
    out = torch.empty(x.shape[0], N)
    tensors = (x, weight, out) if scale is None else (x, weight, out, scale)
    native.run(kernels.product, tensors, (x.shape[0], K, N))
    return out


def block_plan(core: Core, shell: Shell) -> Plan | None:
    """What `retention_block` needs of a block, checked: the kernel reads by address. None where it cannot run.

    Checking costs more than the step of a small block; a plan can be kept while its tensors are used and not `moved`.
    """
    tensors = (
        *shell[:4],
        *core.weights,
        *shell.weights,
        core.log_decay,
        core.theta,
        *core.scales,
        *shell.scales,
    )
    q, _, v, gate, _ = core.weights
    fc1, ffn_gate, _ = shell.weights
    if q is None or v is None or fc1 is None or fc1.numel() < MIN_SIZE:
        return None
    (N, D), H, number = fc1.shape, len(core.log_decay), fc1.dtype
    K, V = q.shape[0] // H, v.shape[0] // H
    rows = (H * K, H * K, H * V, H * V, D, N, N, D)
    columns = (D, D, D, D, H * V, D, D, N)
    weights, scales = tensors[4:12], tensors[14:]
    missing = {i for i, w in enumerate(weights) if w is None}
    fits = (
        number in _NUMBERS
        and _readable(weights, number, [n * m for n, m in zip(rows, columns, strict=True)])
        and _readable(tensors[:4], torch.float32, (D, D, D, D))
        and _readable((core.log_decay,), torch.float32, (H,))
        and _readable((core.theta,), torch.float64, (0 if core.layout == "none" else K // 2,))
        and _readable(scales, torch.float32, rows)
        and missing <= {3, 6}  # the gates
        and (number is torch.float32 or missing == {i for i, s in enumerate(scales) if s is None})
    )
    flags = (
        gate is not None,
        _LAYOUTS[core.layout],
        core.bridge,
        _NORMS[core.norm],
        shell.mixer_bias is not None,
        ffn_gate is not None,
        shell.act == "silu",
    )
    reals = (core.eps, shell.norm_eps)
    return Plan(tensors, _addresses(tensors), number, (D, H, K, V, N), flags, reals) if fits else None


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def retention_block(x: Tensor, position: Tensor, state: Tensor, plan: Plan) -> Tensor | None:
    """One step of a whole block (paper §3) in one call: y = x + MSR(norm(x)), then y + FFN(norm(y)).

    Args:
        x: fp32 [B,D].
        position: int64 [B], of this token; moved on by one, in place.
        state: [B,H,K,V] fp32, contiguous, updated in place.
        plan: of the block, from `block_plan`.

    Returns:
        [B,D], or None, and nothing done, where the kernel cannot run: other types, devices, sizes, no numba, a gradient.
    """
    B, (D, H, K, V, N) = x.shape[0], plan.sizes
    fits = (
        _eligible(x)
        and x.shape[1] == D
        and state.shape == (B, H, K, V)
        and _readable((state,), torch.float32)
        and _readable((position,), torch.int64, (B,))
    )
    if not fits or (kernels := _kernels(plan.number)) is None:
        return None
    memory, y = torch.empty(B * (2 * H * (K + V) + H * V + D + N)), torch.empty(B, D)
    x = x.contiguous()
    own = [z.data_ptr() for z in (memory, y, position, state)]
    scales = [] if plan.number is torch.float32 else plan.pointers[14:]
    table = (x.data_ptr(), *plan.pointers[:12], *own, *plan.pointers[12:14], *scales)
    native.run(kernels.block, (), (*table, B, *plan.sizes, *plan.flags), plan.reals)
    return y


def state_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor, scale: float
) -> Tensor | None:
    """`retnet.ops.retention_step` for fp32, in one pass over the state; None where the kernel cannot run.

    Args:
        q: [B,H,K].
        k: [B,H,K].
        v: [B,H,V].
        log_decay: fp32 [H].
        state: [N,H,K,V], contiguous, updated in place.
        slots: int64 [B], the row of `state` of each batch row; −1 is padding, whose output is zero.
        scale: factor of the query-key products.
    """
    if (
        any(x.dtype is not torch.float32 for x in (q, k, v, state))
        or (kernels := _kernels(torch.float32)) is None
    ):
        return None
    q, k, v, slots = (x.contiguous() for x in (q, k, v, slots))
    out = torch.empty(v.shape)
    numbers = (*q.shape, v.shape[2], state.shape[0])
    native.run(kernels.step, (q, k, v, log_decay.float(), state, slots, out), numbers, (scale,))
    return out


def _readable(
    tensors: Sequence[Tensor | None], dtype: torch.dtype, sizes: Sequence[int] | None = None
) -> bool:
    """Whether a kernel may read so many numbers of this type at the addresses of these tensors; None is never read."""
    for i, x in enumerate(tensors):
        if x is not None and not (
            x.dtype is dtype and x.is_cpu and x.is_contiguous() and (sizes is None or x.numel() == sizes[i])
        ):
            return False
    return True


def _eligible(x: Tensor) -> bool:
    return (
        x.dtype is torch.float32
        and x.dim() == 2
        and x.shape[0] <= MAX_ROWS
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


_NUMBERS = {torch.float32: np.float32, torch.int8: np.int8}


@cache
def _kernels(number: torch.dtype) -> _Kernels | None:
    """For weights of this type. Compiled on first use, a few seconds, and kept on disk beside this file."""
    if (compiler := native.compiler()) is None:
        return None
    matrices, advance = _compile_matrices(compiler, _NUMBERS[number]), _compile_advance(compiler)
    return _Kernels(
        _compile_product(compiler, matrices),
        _compile_block(compiler, matrices, advance),
        _compile_step(compiler, advance),
    )


class _Matrices(NamedTuple):
    """Compiled functions of weights, which are pairs: numbers [N,K], and a scale for each row where they are int8."""

    matrix: Callable[..., Any]  # matrix(table, at, scale_at, N, K): the weight whose addresses are there
    rows: Callable[..., None]  # rows(x, weight, out, first): this thread's share of out[:, first:] = x Wᵀ
    dot: Callable[..., Any]  # dot(weight, r, x): row r of W times x
    scaled: bool  # whether they are int8


def _compile_matrices(compiler: native.Compiler, number: type) -> _Matrices:
    """For weights of np.float32, or np.int8 with scales."""
    array, thread, threads = compiler.array, compiler.thread, compiler.threads
    scaled = number is np.int8

    @compiler.function
    def matrix(table: Any, at: int, scale_at: int, N: int, K: int) -> Any:  # noqa: ANN401
        scales = table[scale_at] if scaled else table[at]  # fp32 weights have none, and nobody reads them
        return array(table[at], (N, K), number), array(scales, (N,), np.float32)

    @compiler.function
    def rows(x: Any, weight: Any, out: Any, first: int) -> None:  # noqa: ANN401
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
                row, s = x[c], zero
                for j in range(len(w)):
                    s += np.float32(w[j]) * row[j]
                out[c, first + r] = s * scale

    @compiler.function
    def dot(weight: Any, r: int, x: Any) -> Any:  # noqa: ANN401
        numbers, scales = weight
        w, s = numbers[r], np.float32(0)
        for j in range(len(w)):
            s += np.float32(w[j]) * x[j]
        return s * scales[r] if scaled else s

    return _Matrices(matrix, rows, dot, scaled)


def _compile_advance(compiler: native.Compiler) -> Callable[..., None]:
    """advance(S, keep, key, value, query, out): S = keep · S + keyᵀ value, out = query S, in one pass over S."""

    @compiler.function
    def advance(S: Any, keep: float, key: Any, value: Any, query: Any, out: Any) -> None:  # noqa: ANN401
        out[:] = 0
        for i in range(len(key)):
            row, ki, qi = S[i], key[i], query[i]
            for j in range(len(value)):
                s = keep * row[j] + ki * value[j]
                row[j] = s
                out[j] += qi * s

    return advance


def _compile_product(compiler: native.Compiler, matrices: _Matrices) -> Any:  # noqa: ANN401
    array, (matrix, rows, _, scaled) = compiler.array, matrices
    sizes = 4 if scaled else 3  # where in the table they begin, after the addresses

    @compiler.kernel
    def kernel(table: Any) -> None:  # noqa: ANN401
        B, K, N = table[sizes], table[sizes + 1], table[sizes + 2]
        x, out = array(table[0], (B, K), np.float32), array(table[2], (B, N), np.float32)
        rows(x, matrix(table, 1, 3, N, K), out, 0)

    return kernel


def _compile_block(compiler: native.Compiler, matrices: _Matrices, advance: Callable[..., None]) -> Any:  # noqa: ANN401
    array, thread, threads, barrier = compiler.array, compiler.thread, compiler.threads, compiler.barrier
    matrix, rows, dot, scaled = matrices
    scales = 19  # where in the table the scales begin, if there are any, and then the sizes
    sizes = scales + 8 if scaled else scales

    @compiler.function
    def normed(x: Any, weight: Any, bias: Any, centred: bool, eps: float) -> Any:  # noqa: ANN401
        y = np.empty_like(x)
        for b in range(x.shape[0]):
            row, mean, square = x[b], 0.0, 0.0
            if centred:
                for j in range(len(row)):
                    mean += row[j]
                mean /= len(row)
            for j in range(len(row)):
                square += (row[j] - mean) ** 2
            shrink = 1 / math.sqrt(square / len(row) + eps)
            for j in range(len(row)):
                y[b, j] = (row[j] - mean) * shrink * weight[j] + (bias[j] if centred else 0)
        return y

    @compiler.function
    def turn(query: Any, key: Any, position: int, theta: Any, layout: int) -> None:  # noqa: ANN401
        half = len(theta)
        for i in range(half if layout > 0 else 0):
            angle = (position * theta[i]) % (2 * math.pi)
            cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
            m, n = (2 * i, 2 * i + 1) if layout == 1 else (i, i + half)
            query[m], query[n] = query[m] * cos - query[n] * sin, query[n] * cos + query[m] * sin
            key[m], key[n] = key[m] * cos - key[n] * sin, key[n] * cos + key[m] * sin

    @compiler.function
    def normalise(y: Any, norm: int, eps: float, log_decay: float, seen: int, bridge: bool) -> None:  # noqa: ANN401
        shrink, mean, square = 1.0, 0.0, 0.0
        if bridge:
            full = seen if log_decay == 0 else math.expm1(seen * log_decay) / math.expm1(log_decay)
            shrink = 1 / math.sqrt(full)
        if norm == 1:
            for j in range(len(y)):
                mean += y[j]
            mean /= len(y)
        if norm > 0:
            for j in range(len(y)):
                square += (y[j] - mean) ** 2
            shrink /= math.sqrt(square / len(y) * shrink * shrink + eps)
        for j in range(len(y)):
            y[j] = (y[j] - mean) * shrink

    @compiler.kernel
    def kernel(table: Any) -> None:  # noqa: ANN401
        B, D, H = table[sizes], table[sizes + 1], table[sizes + 2]
        K, V, N = table[sizes + 3], table[sizes + 4], table[sizes + 5]
        gated, layout, bridge = table[sizes + 6], table[sizes + 7], table[sizes + 8]
        norm, centred = table[sizes + 9], table[sizes + 10]
        ffn_gated, silu = table[sizes + 11], table[sizes + 12]
        reals = array(table[sizes + 13], (2,), np.float64)
        x = array(table[0], (B, D), np.float32)
        mixer_norm, mixer_bias = array(table[1], (D,), np.float32), array(table[2], (D,), np.float32)
        ffn_norm, ffn_bias = array(table[3], (D,), np.float32), array(table[4], (D,), np.float32)
        wq, wk = matrix(table, 5, scales, H * K, D), matrix(table, 6, scales + 1, H * K, D)
        wv, wg = matrix(table, 7, scales + 2, H * V, D), matrix(table, 8, scales + 3, H * V, D)
        wo, fc1 = matrix(table, 9, scales + 4, D, H * V), matrix(table, 10, scales + 5, N, D)
        fc_gate, fc2 = matrix(table, 11, scales + 6, N, D), matrix(table, 12, scales + 7, D, N)
        memory = array(table[13], (B * (2 * H * (K + V) + H * V + D + N),), np.float32)
        out, position = array(table[14], (B, D), np.float32), array(table[15], (B,), np.int64)
        state, log_decay = array(table[16], (B, H, K, V), np.float32), array(table[17], (H,), np.float32)
        theta = array(table[18], (K // 2,), np.float64)
        heads_at = B * 2 * H * (K + V)
        mixed_at = heads_at + B * H * V
        hidden_at = mixed_at + B * D
        projected = memory[:heads_at].reshape(B, 2 * H * (K + V))
        heads = memory[heads_at:mixed_at].reshape(B, H * V)
        mixed = memory[mixed_at:hidden_at].reshape(B, D)
        hidden = memory[hidden_at:].reshape(B, N)

        z = normed(x, mixer_norm, mixer_bias, centred, reals[1])
        rows(z, wq, projected, 0)
        rows(z, wk, projected, H * K)
        rows(z, wv, projected, 2 * H * K)
        if gated:
            rows(z, wg, projected, H * (2 * K + V))
        barrier()
        for task in range(thread(), B * H, threads()):
            b, h = task // H, task % H
            row = projected[b]
            start = 2 * H * K + h * V
            v, g, o = (
                row[start : start + V],
                row[start + H * V : start + (H + 1) * V],
                heads[b][h * V : (h + 1) * V],
            )
            query, key = row[h * K : (h + 1) * K], row[(H + h) * K : (H + h + 1) * K]
            turn(query, key, position[b], theta, layout)
            for i in range(K):
                query[i] *= np.float32(1 / math.sqrt(K))
            advance(state[b, h], np.float32(math.exp(log_decay[h])), key, v, query, o)
            normalise(o, norm, reals[0], log_decay[h], position[b] + 1, bridge)
            if gated:
                for j in range(V):
                    o[j] *= g[j] / (1 + math.exp(-g[j]))
        barrier()
        rows(heads, wo, mixed, 0)
        barrier()
        if thread() == 0:
            for b in range(B):
                position[b] += 1
        y = x + mixed
        z = normed(y, ffn_norm, ffn_bias, centred, reals[1])
        rows(z, fc1, hidden, 0)
        for r in range(
            N * thread() // threads(), N * (thread() + 1) // threads()
        ):  # what this thread has made
            for b in range(B):
                h = hidden[b, r]
                a = h / (1 + math.exp(-h)) if silu else 0.5 * h * (1 + math.erf(h * math.sqrt(0.5)))
                hidden[b, r] = a * dot(fc_gate, r, z[b]) if ffn_gated else a
        barrier()
        rows(hidden, fc2, out, 0)
        for b in range(B):
            for r in range(D * thread() // threads(), D * (thread() + 1) // threads()):
                out[b, r] += y[b, r]

    return kernel


def _compile_step(compiler: native.Compiler, advance: Callable[..., None]) -> Any:  # noqa: ANN401
    array, thread, threads = compiler.array, compiler.thread, compiler.threads

    @compiler.kernel
    def kernel(table: Any) -> None:  # noqa: ANN401
        B, H, K, V, N = table[7], table[8], table[9], table[10], table[11]
        scale = np.float32(array(table[12], (1,), np.float64)[0])
        q, k = array(table[0], (B, H, K), np.float32), array(table[1], (B, H, K), np.float32)
        v, log_decay = array(table[2], (B, H, V), np.float32), array(table[3], (H,), np.float32)
        state, slots = array(table[4], (N, H, K, V), np.float32), array(table[5], (B,), np.int64)
        out = array(table[6], (B, H, V), np.float32)
        for task in range(thread(), B * H, threads()):
            b, h = task // H, task % H
            if slots[b] < 0:
                out[b, h, :] = 0
                continue
            keep = np.float32(math.exp(log_decay[h]))
            advance(state[slots[b], h], keep, k[b, h], v[b, h], q[b, h] * scale, out[b, h])

    return kernel
