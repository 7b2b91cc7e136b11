"""Validation of retention's arguments: shapes, types, devices, γ in (0, 1], bounds of packed documents, slots."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from retnet.ops.torch_private import is_readable, plain, transforming

OP_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def plainly_right(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> bool:
    """Whether a step is what nearly all steps are, fp32 on a CPU without slots, and every check would pass.

    The checks, and the operator that stands between them and the kernel for tracing, cost more than a small step.
    """
    if not (
        type(q) is type(k) is type(v) is type(log_decay) is type(state) is Tensor
        and q.dtype is k.dtype is v.dtype is log_decay.dtype is state.dtype is torch.float32
        and q.is_cpu
        and k.is_cpu
        and v.is_cpu
        and log_decay.is_cpu
        and state.is_cpu
        and q.dim() == v.dim() == 3
        and state.dim() == 4
        and not torch.is_grad_enabled()
        and plain()
    ):
        return False
    (B, H, K), (rows, heads, keys, values) = q.shape, state.shape
    if not (
        k.shape == q.shape
        and v.shape == (B, H, values)
        and (heads, keys) == (H, K)
        and rows >= B
        and state.is_contiguous()
        and (log_decay.shape == (H,) or log_decay.shape == (B, H))
    ):
        return False
    for value in log_decay.flatten().tolist():  # noqa: SIM110  a generator would take as long as all the rest
        if not -math.inf < value <= 0:
            return False
    return True


def check_inputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, time: bool) -> None:
    """Tokens [B,T,H,·], or [B,H,·] without `time`, of one type and device, and decays in (0, 1] by head or by token."""
    lead = "B,T,H" if time else "B,H"
    if q.dim() != (4 if time else 3):
        raise ValueError(f"q has shape {tuple(q.shape)}; allowed: [{lead},K]")
    if k.shape != q.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}; allowed: that of q, {tuple(q.shape)}")
    if v.dim() != q.dim() or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            f"v has shape {tuple(v.shape)}; allowed: [{lead},V] = {(*q.shape[:-1], 'V')} as in q"
        )
    if q.dtype not in OP_DTYPES:
        raise ValueError(f"q has type {q.dtype}; allowed: {', '.join(map(str, OP_DTYPES))}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has type {x.dtype}; allowed: that of q, {q.dtype}")
    heads = q.shape[-2]
    shapes = ((heads,), tuple(q.shape[:-1]))
    if tuple(log_decay.shape) not in shapes or log_decay.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"log_decay has shape {tuple(log_decay.shape)} and type {log_decay.dtype}; allowed: [{heads}], one a head, "
            f"or [{lead}] = {list(shapes[1])}, one a token and head; fp32 or fp64 (half types round γ to 1)"
        )
    for name, x in (("k", k), ("v", v), ("log_decay", log_decay)):
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}; allowed: the device of q, {q.device}")
    if is_readable(log_decay):
        _check_decays(log_decay)


def _check_decays(log_decay: Tensor) -> None:
    """Constants in (−∞, 0]; what a network makes of tokens may be −∞, forgetting all, or NaN, which gives NaN."""
    if log_decay.dim() == 1:
        wrong = [(head, x) for head, x in enumerate(log_decay.tolist()) if not -math.inf < x <= 0]
        where = ""
    elif wrong := (log_decay > 0).nonzero()[:1].tolist():
        *token, head = wrong[0]
        wrong, where = [(head, log_decay[(*token, head)].item())], f" at {token}"
    if wrong:
        head, value = wrong[0]
        raise ValueError(
            f"log_decay of head {head}{where} is {value}, γ = {_exp(value)}; allowed: γ in (0, 1], log_decay in (−∞, 0]"
        )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def check_documents(cu_seqlens: Tensor, q: Tensor) -> int:
    """Bounds of documents that cover one row; returns how many documents."""
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and type {cu_seqlens.dtype}; allowed: [N+1] of int32 or int64"
        )
    if q.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens packs documents in one row, but q has batch {q.shape[0]}; allowed: B = 1"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; allowed: the device of q, {q.device}")
    if is_readable(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != q.shape[1] or sorted(bounds) != bounds:
            raise ValueError(f"cu_seqlens is {bounds}; allowed: non-decreasing from 0 to T = {q.shape[1]}")
    return len(cu_seqlens) - 1


def check_state(state: Tensor, q: Tensor, v: Tensor, rows: int) -> None:
    """A state of so many rows, fp32 or as wide as the inputs, on their device."""
    shape = (rows, q.shape[-2], q.shape[-1], v.shape[-1])
    wide = torch.promote_types(q.dtype, torch.float32)
    if state.shape != shape:
        raise ValueError(f"state has shape {tuple(state.shape)}; allowed: {shape}")
    if state.dtype != wide:
        raise ValueError(f"state has type {state.dtype}; allowed for {q.dtype} inputs: {wide}")
    if state.device != q.device:
        raise ValueError(f"state is on {state.device}; allowed: the device of q, {q.device}")


def check_pool(q: Tensor, v: Tensor, state: Tensor, slots: Tensor | None) -> None:
    """A state that is updated in place, and which of its rows each row of the batch has."""
    B = q.shape[0]
    if slots is not None and (slots.shape != (B,) or slots.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"slots has shape {tuple(slots.shape)} and type {slots.dtype}; allowed: [{B}] of int32 or int64"
        )
    if slots is not None and slots.device != q.device:
        raise ValueError(f"slots is on {slots.device}; allowed: the device of q, {q.device}")
    if state.dim() != 4:
        raise ValueError(f"state has {state.dim()} dimensions; allowed: [N,H,K,V]")
    check_state(state, q, v, state.shape[0])
    if transforming():
        raise NotImplementedError(
            "a decoding step updates its state in place, which transforms of torch.func cannot follow; "
            "use `retention` on one token, which has vmap and every derivative"
        )
    if torch.is_grad_enabled() and state.requires_grad and state.is_leaf:
        raise ValueError(
            "state requires a gradient and is a leaf, which a step may not update in place; pass state.clone()"
        )
    if not state.is_contiguous():
        raise ValueError(
            "state is not contiguous, and it is updated in place; pass state.contiguous() and keep that"
        )
    if slots is None and state.shape[0] < B:
        raise ValueError(f"state has {state.shape[0]} rows for a batch of {B}; give at least {B}, or slots")
    if (
        slots is not None
        and is_readable(slots)
        and B
        and not -1 <= int(slots.min()) <= int(slots.max()) < state.shape[0]
    ):
        raise ValueError(f"slots holds {slots.tolist()}; allowed: −1 (padding) to {state.shape[0] - 1}")
