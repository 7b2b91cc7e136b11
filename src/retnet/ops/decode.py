"""Decoding on a CPU: every weight and every state is read once, at the speed of the memory, in few calls.

torch's matrix product with a few rows runs on one thread at a third of that thread's bandwidth, updates a state in three
passes, and dispatches seventy small operators a layer. The kernels here, compiled by numba where it is installed, do the
same in one pass on all threads. Where they cannot run (no numba, another type, a gradient) the functions return None,
which means "compose it from the parts"; the parts are the law, and the kernels are tested against them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_ROWS = 8  # beyond, torch's matrix product is the faster one
MIN_SIZE = 1 << 14  # numbers in a weight; below, torch's overhead is the smaller one

_NORMS = {"none": 0, "group": 1, "rms": 2}
_LAYOUTS = {"none": 0, "interleaved": 1, "halves": 2}
_log = logging.getLogger("retnet.ops")


class Core(NamedTuple):
    """What turns projections into the gated, normalised heads of multi-scale retention; constants of a mixer."""

    log_decay: Tensor  # [H] fp32
    theta: Tensor  # [K/2] fp64, empty without rotation
    layout: str  # "interleaved", "halves" or "none"
    bridge: bool  # rows divided by √Σγ before the norm (score_norm "decay")
    norm: str  # "group", "rms" or "none"
    eps: float


class _Kernels(NamedTuple):
    products: Callable[..., None]
    core: Callable[..., None]
    feed_forward: Callable[..., None]


def few_rows(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor | None:
    """x Wᵀ for each W, side by side: fp32 x [B,K] and weights [N,K] → [B,ΣN]; None where the kernel cannot run."""
    if not _eligible(x) or x.dim() != 2 or weights[0].numel() < MIN_SIZE or (kernels := _kernels()) is None:
        return None
    out = torch.empty(x.shape[0], sum([w.shape[0] for w in weights]))
    kernels.products(x.contiguous().numpy(), tuple([w.detach().numpy() for w in weights]), out.numpy())
    return out


def feed_forward(x: Tensor, fc1: Tensor, gate: Tensor | None, fc2: Tensor, act: str) -> Tensor | None:
    """act(x W_1ᵀ) W_2ᵀ, or (act(x W_1ᵀ) ⊙ x W_Gᵀ) W_2ᵀ, in one call; None where the kernel cannot run.

    Args:
        x: fp32 [B,D].
        fc1: [N,D].
        gate: [N,D] or None.
        fc2: [D,N].
        act: ``"gelu"`` or ``"silu"``.
    """
    if not _eligible(x) or x.dim() != 2 or fc1.numel() < MIN_SIZE or (kernels := _kernels()) is None:
        return None
    hidden, out = torch.empty(x.shape[0], fc1.shape[0]), torch.empty(x.shape[0], fc2.shape[0])
    weights = (fc1, fc1 if gate is None else gate, fc2)
    kernels.feed_forward(
        x.contiguous().numpy(),
        *[w.detach().numpy() for w in weights],
        gate is not None,
        act == "silu",
        hidden.numpy(),
        out.numpy(),
    )
    return out


def gated_heads(projected: Tensor, position: Tensor, state: Tensor, core: Core) -> Tensor | None:
    """One step of gated multi-scale retention between its projections (paper §3), in one pass over the state.

    Rotates q and k, moves the state on, reads it, normalises each head, and gates by swish.

    Args:
        projected: q, k, v and, if there is one, the gate, side by side: [B, H·(2K + V)] or [B, H·(2K + 2V)].
        position: int64 [B], of this token.
        state: [B,H,K,V] fp32, contiguous, updated in place.
        core: constants of the mixer.

    Returns:
        [B,H·V], or None, and nothing done, where the kernel cannot run: other types, devices, no numba, a gradient.
    """
    if not _eligible(projected) or state.dtype is not torch.float32 or not state.is_contiguous():
        return None
    if (kernels := _kernels()) is None:
        return None
    B, H, _, V = state.shape
    out = torch.empty(B, H * V)
    kernels.core(
        projected.numpy(),
        position.numpy(),
        state.numpy(),
        core.log_decay.numpy(),
        core.theta.numpy(),
        _LAYOUTS[core.layout],
        core.bridge,
        _NORMS[core.norm],
        core.eps,
        out.numpy(),
    )
    return out


@contextmanager
def decoding() -> Iterator[None]:
    """While tokens are decoded on a CPU, lets the kernels here have the cores.

    torch's thread pool and numba's are two, and each keeps its threads spinning for a while after work: on a machine
    whose cores are all in use they slow each other down several times. torch's part of a step needs one thread.
    """
    threads = torch.get_num_threads()
    if _kernels() is None:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _eligible(x: Tensor) -> bool:
    return (
        x.dtype is torch.float32
        and x.shape[0] <= MAX_ROWS
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def _kernels() -> _Kernels | None:
    """Compiled on first use, a few seconds, and kept on disk beside this file."""
    try:
        import numba
    except ImportError:
        _log.info(
            "decoding: numba is not installed, so torch's products are used; pip install 'retnet[fast]' is faster"
        )
        return None
    numba.set_num_threads(max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)))
    compiled = numba.njit(parallel=True, fastmath=True, cache=True)
    makers = (_compile_products, _compile_core, _compile_feed_forward)
    return _Kernels(*[make(compiled, numba.prange) for make in makers])


def _compile_products(compiled: Any, prange: Any) -> Callable[..., None]:  # noqa: ANN401
    @compiled
    def kernel(x: Any, weights: Any, out: Any) -> None:  # noqa: ANN401
        for n in prange(out.shape[1]):
            i, first = 0, 0
            while n - first >= weights[i].shape[0]:
                first += weights[i].shape[0]
                i += 1
            weight, row = weights[i], n - first
            for b in range(x.shape[0]):
                total = x[b, 0] * 0
                for j in range(weight.shape[1]):
                    total += weight[row, j] * x[b, j]
                out[b, n] = total

    return kernel


def _compile_feed_forward(compiled: Any, prange: Any) -> Callable[..., None]:  # noqa: ANN401
    @compiled
    def kernel(*arguments: Any) -> None:  # noqa: ANN401
        x, fc1, gate, fc2, gated, silu, hidden, out = arguments
        for n in prange(fc1.shape[0]):
            for b in range(x.shape[0]):
                h, g = x[b, 0] * 0, x[b, 0] * 0
                for j in range(fc1.shape[1]):
                    h += fc1[n, j] * x[b, j]
                if gated:
                    for j in range(fc1.shape[1]):
                        g += gate[n, j] * x[b, j]
                a = h / (1 + math.exp(-h)) if silu else 0.5 * h * (1 + math.erf(h * math.sqrt(0.5)))
                hidden[b, n] = a * g if gated else a
        for n in prange(fc2.shape[0]):
            for b in range(x.shape[0]):
                total = x[b, 0] * 0
                for j in range(fc2.shape[1]):
                    total += fc2[n, j] * hidden[b, j]
                out[b, n] = total

    return kernel


def _compile_core(compiled: Any, prange: Any) -> Callable[..., None]:  # noqa: ANN401
    @compiled
    def kernel(*arguments: Any) -> None:  # noqa: ANN401
        projected, position, state, log_decay, theta, layout, bridge, norm, eps, out = arguments
        B, H, K, V = state.shape
        gated = projected.shape[1] > H * (2 * K + V)
        scale = 1 / math.sqrt(K)
        for row in prange(B * H):
            b, h = row // H, row % H
            q, k, v, gate = h * K, (H + h) * K, 2 * H * K + h * V, 2 * H * K + (H + h) * V  # where they begin
            query, key = projected[b, q : q + K].copy(), projected[b, k : k + K].copy()
            if layout > 0:
                for i in range(K // 2):
                    angle = (position[b] * theta[i]) % (2 * math.pi)
                    cos, sin = math.cos(angle), math.sin(angle)
                    m, n = (2 * i, 2 * i + 1) if layout == 1 else (i, i + K // 2)
                    query[m], query[n] = query[m] * cos - query[n] * sin, query[n] * cos + query[m] * sin
                    key[m], key[n] = key[m] * cos - key[n] * sin, key[n] * cos + key[m] * sin
            value, y, s = projected[b, v : v + V], out[b, h * V : (h + 1) * V], state[b, h]
            keep = projected.dtype.type(math.exp(log_decay[h]))
            for j in range(V):
                y[j] = 0
            for i in range(K):
                ki, qi = key[i], projected.dtype.type(query[i] * scale)
                for j in range(V):
                    s[i, j] = keep * s[i, j] + ki * value[j]
                    y[j] += qi * s[i, j]
            shrink = 1.0
            if bridge:
                seen, log = position[b] + 1, float(log_decay[h])
                shrink = 1 / math.sqrt(seen if log == 0 else math.expm1(seen * log) / math.expm1(log))
            mean, square = 0.0, 0.0
            if norm == 1:
                for j in range(V):
                    mean += y[j]
                mean /= V
            if norm > 0:
                for j in range(V):
                    square += (y[j] - mean) ** 2
                shrink /= math.sqrt(square / V * shrink * shrink + eps)
            for j in range(V):
                y[j] = (y[j] - mean) * shrink
                if gated:
                    g = projected[b, gate + j]
                    y[j] *= g / (1 + math.exp(-g))

    return kernel
