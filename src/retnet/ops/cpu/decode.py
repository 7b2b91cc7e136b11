"""Compiled products with few rows (GEMV, skinny GEMM) and the compiled state update: what decoding on a CPU is made of.

torch's matrix product with a few rows runs on one thread at a third of that thread's bandwidth, and updates a state in three
passes. The kernels here, compiled by numba where it is installed, read every weight and every state once, at the speed of
the memory, on all of torch's threads. Where they cannot run (no numba, another type, a gradient) the functions return None.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retnet.ops import chunkwise
from retnet.ops.cpu.jit import Compiler, hindrance, optional
from retnet.ops.cpu.openmp import bits, readable, run
from retnet.ops.cpu.skinny_gemm import MAX_ROWS, compile_product, compile_skinny_gemm
from retnet.ops.cpu.state_update import compile_step, compile_update
from retnet.ops.cpu.tile import LANES
from retnet.ops.torch_private import constant_in_traces, plain

MIN_SIZE = 1 << 14  # numbers in a weight; below, torch's overhead is the smaller one


class DecodeKernels(NamedTuple):
    """For weights of one type."""

    product: Any
    step: Any


def few_rows(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor | None:
    """x Wᵀ: fp32 x [...,K] of at most `MAX_ROWS` rows and weight [N,K] → [...,N]; None where the kernel cannot run.

    W is an fp32 weight, or an int8 one whose rows are multiplied by an fp32 scale [N]. A row's results are the same bits
    whatever other rows are there.
    """
    number = torch.float32 if scale is None else torch.int8
    if (
        not _rows_fit(x)
        or weight.numel() < MIN_SIZE
        or x.shape[-1] != weight.shape[1]
        or not readable((weight,), number)
        or not readable((scale,), torch.float32, weight.shape[:1])
        or (kernels := _kernels(number)) is None
    ):
        return None
    x, (N, K), threads = x.contiguous(), weight.shape, torch.get_num_threads()
    out, rows = torch.empty(*x.shape[:-1], N), x.numel() // K
    packed = torch.empty(threads * rows * (K + LANES))
    scales = 0 if scale is None else scale.data_ptr()
    pointers = (x.data_ptr(), weight.data_ptr(), scales, out.data_ptr(), packed.data_ptr())
    run(kernels.product, (*pointers, rows, K, N), threads)
    return out


def state_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    slots: Tensor | None,
    scale: float,
) -> Tensor | None:
    """`retnet.ops.retention_step` for fp32, in one pass over the state; None where the kernel cannot run.

    Args:
        q: [B,H,K].
        k: [B,H,K].
        v: [B,H,V].
        log_decay: [H].
        state: [N,H,K,V], contiguous, updated in place.
        slots: int64 [B], the row of `state` of each batch row; −1 is padding, whose output is zero. None: row b has b.
        scale: factor of the query-key products.
    """
    if not (q.dtype is k.dtype is v.dtype is state.dtype is torch.float32):
        return None
    if (kernels := _kernels(torch.float32)) is None:
        return None
    q, k, v, log_decay = q.contiguous(), k.contiguous(), v.contiguous(), log_decay.float().contiguous()
    out, at = torch.empty_like(v), 0
    if slots is not None:
        slots = slots.contiguous()
        at = slots.data_ptr()
    run(
        kernels.step,
        (
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            log_decay.data_ptr(),
            state.data_ptr(),
            at,
            out.data_ptr(),
            *q.shape,
            v.shape[2],
            state.shape[0],
            bits(scale),
        ),
    )
    return out


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    """The kernel of the operator: `state_step` for half types too, else torch's own operators."""
    rows = None if slots is None else slots.long()
    wide = state.dtype
    if (out := state_step(q.to(wide), k.to(wide), v.to(wide), log_decay, state, rows, scale)) is None:
        return chunkwise.step(q, k, v, log_decay, state, slots, scale)
    return out.to(v.dtype)


def step_hindrance() -> str | None:
    """Why the compiled step cannot run; None if it can. Compiles it at the first call."""
    if (why := hindrance()) is not None:
        return why
    return "the kernel could not be compiled" if _kernels(torch.float32) is None else None


constant_in_traces(step_hindrance)


def _rows_fit(x: Tensor) -> bool:
    return (
        x.dtype is torch.float32
        and x.is_cpu
        and 0 < x.numel() <= MAX_ROWS * x.shape[-1]
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and plain()
    )


_NUMBERS = {torch.float32: np.float32, torch.int8: np.int8}


@optional
def _kernels(made: Compiler, number: torch.dtype) -> DecodeKernels:
    """For weights of this type. Compiled on first use, a few seconds, and kept on disk beside this file."""
    gemm = compile_skinny_gemm(made, _NUMBERS[number])
    return DecodeKernels(compile_product(made, gemm), compile_step(made, compile_update(made)))
