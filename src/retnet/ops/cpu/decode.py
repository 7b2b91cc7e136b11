"""Compiled products with few rows (GEMV, skinny GEMM) and the compiled state update: what decoding on a CPU is made of.

torch's matrix product with a few rows runs on one thread at a third of that thread's bandwidth, and updates a state in three
passes. The kernels here, compiled by numba where it is installed, read every weight and every state once, at the speed of
the memory, on all of torch's threads. Where they cannot run (no numba, another type, a trace) `no_skinny_gemm` and
`no_step` say why.
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

SMALL = 1 << 15  # numbers in all states of a step
MIN_SIZE = 1 << 14  # numbers in a weight; below, torch's overhead is the smaller one


class DecodeKernels(NamedTuple):
    """For weights of one type."""

    product: Any
    step: Any


def no_skinny_gemm(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> str | None:
    """Why `skinny_gemm` cannot run; None if it can. Compiles its kernel at the first call that could."""
    if not plain() or torch.is_autocast_enabled("cpu"):
        return "it is traced, transformed or cast"
    if not 0 < x.numel() <= MAX_ROWS * x.shape[-1] or weight.numel() < MIN_SIZE:
        return f"not 1 to {MAX_ROWS} rows of a weight of at least {MIN_SIZE} numbers"
    number = torch.float32 if scale is None else torch.int8
    if not (
        x.dtype is torch.float32
        and x.is_cpu
        and x.shape[-1] == weight.shape[1]
        and readable((weight,), number)
        and readable((scale,), torch.float32, weight.shape[:1])
    ):
        return "x and a contiguous weight are not fp32 (or the weight int8 with fp32 scales) in CPU memory"
    return _hindrance(number)


def skinny_gemm(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x Wᵀ: fp32 x [...,K] of at most `MAX_ROWS` rows and weight [N,K] → [...,N].

    W is an fp32 weight, or an int8 one whose rows are multiplied by an fp32 scale [N]. A row's results are the same bits
    whatever other rows are there. What it cannot compute, `no_skinny_gemm` says.
    """
    kernels = _kernels(torch.float32 if scale is None else torch.int8)
    assert kernels is not None
    x, (N, K), threads = x.contiguous(), weight.shape, torch.get_num_threads()
    out, rows = torch.empty(*x.shape[:-1], N), x.numel() // K
    packed = torch.empty(threads * rows * (K + LANES))
    scales = 0 if scale is None else scale.data_ptr()
    pointers = (x.data_ptr(), weight.data_ptr(), scales, out.data_ptr(), packed.data_ptr())
    run(kernels.product, (*pointers, rows, K, N), threads)
    return out


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    """`retnet.ops.retention_step` in one pass over the state, half types too.

    Torch's own operators take over where the kernel cannot run: a program may have been exported elsewhere.
    """
    kernels = _kernels(torch.float32) if state.dtype is torch.float32 else None
    if kernels is None:
        return chunkwise.step(q, k, v, log_decay, state, slots, scale)
    inputs = [x.float().contiguous() for x in (q, k, v, log_decay)]
    rows = None if slots is None else slots.long().contiguous()
    out = torch.empty_like(inputs[2])
    at = 0 if rows is None else rows.data_ptr()
    pointers = (*[x.data_ptr() for x in inputs], state.data_ptr(), at, out.data_ptr())
    one = v.numel() * q.shape[2] <= SMALL  # waiting for a second thread would take as long as it saves
    numbers = (
        *pointers,
        *q.shape,
        v.shape[2],
        state.shape[0],
        bits(scale),
        1 if log_decay.dim() == 1 else len(log_decay),
    )
    run(kernels.step, numbers, 1 if one else None)
    return out.to(v.dtype)


def no_step(q: Tensor, *_: object) -> str | None:
    """Why the compiled step cannot run; None if it can. Compiles it at the first call."""
    if not q.is_cpu:
        return f"tensors are on {q.device}; numba compiles for the CPU"
    if q.dtype is torch.float64:
        return f"q has type {q.dtype}, and the compiled step is of fp32"
    return _hindrance(torch.float32)


@constant_in_traces
def _hindrance(number: torch.dtype) -> str | None:
    if _kernels(number) is not None:
        return None
    return hindrance() or "the kernel could not be compiled"


_NUMBERS = {torch.float32: np.float32, torch.int8: np.int8}


@optional
def _kernels(made: Compiler, number: torch.dtype) -> DecodeKernels:
    """For weights of this type. Compiled on first use, a few seconds, and kept on disk beside this file."""
    gemm = compile_skinny_gemm(made, _NUMBERS[number])
    return DecodeKernels(compile_product(made, gemm), compile_step(made, compile_update(made)))
