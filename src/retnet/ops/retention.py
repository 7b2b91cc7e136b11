"""The op of the contract: checks its arguments, picks a backend, runs it."""

from __future__ import annotations

import logging
import math
from functools import cache

import torch
from torch import Tensor

from retnet.ops import cpu, decode, native, reference
from retnet.ops.triton import configs, operators, support

BACKENDS = ("reference", "cpu", "triton")
FORMS = ("parallel", "recurrent", "chunkwise")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

CHUNK = 64  # default C: work inside a chunk grows with it, the calls shrink; measured best or near it from K 64 to 256

_log = logging.getLogger("retnet.ops")


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    form: str = "chunkwise",
    chunk_size: int | None = None,
    backend: str = "auto",
    keep_states: bool = False,
) -> tuple[Tensor, Tensor]:
    """Retention (paper §2): o_n = scale · q_n S_n with S_n = γ S_{n-1} + k_nᵀ v_n, for all tokens of a sequence.

    Args:
        q: queries [B,T,H,K]; any floating type of fp64, fp32, bf16, fp16.
        k: keys [B,T,H,K].
        v: values [B,T,H,V], V may differ from K.
        log_decay: ln γ of each head, [H], fp32 or fp64, in (−∞, 0]; see `log_decays`.
        state: to start from, fp32 (fp64 for fp64 inputs): [B,H,K,V], or [N,H,K,V] with `cu_seqlens`; default zeros.
        cu_seqlens: int32 or int64 [N+1], bounds of N documents packed in one row (B = 1), from 0 to T, empty ones allowed.
        scale: factor of the query-key products, default K^(−1/2).
        form: ``"parallel"``, ``"recurrent"`` or ``"chunkwise"``: one function, three ways to compute it.
        chunk_size: C of the chunkwise form; default: `CHUNK`, and of Triton's kernels `configs.CHUNK` (which round C up to
            a multiple of 16).
        backend: ``"reference"`` (any device, autograd of everything), ``"cpu"`` (explicit backward, constant memory in the
            number of chunks; no gradient of `log_decay`), ``"triton"`` (the same on CUDA and ROCm; no recurrent form), or
            ``"auto"``: the fastest that can run, logged once.
        keep_states: Triton's kernels keep the states at chunk boundaries from the forward for the backward pass (K·V/C
            numbers a token and head) instead of computing them again. The other backends have nothing to keep.

    Returns:
        The output [B,T,H,V] in the type of v, and the state after the last token (of each document), shaped as `state`.

    Raises:
        ValueError: an argument that does not fit, naming it, what it is and what is allowed; or a backend that cannot run.
    """
    _check_inputs(q, k, v, log_decay, time=True)
    rows = q.shape[0] if cu_seqlens is None else _check_documents(cu_seqlens, q)
    _check_state(state, q, v, rows)
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; allowed: {', '.join(map(repr, FORMS))}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    backend = _backend(backend, q, v, log_decay, form)
    if backend == "reference":
        return reference.retention(q, k, v, log_decay, state, cu_seqlens, scale, form, chunk_size or CHUNK)
    if backend == "triton":
        length = q.shape[1] if form == "parallel" else chunk_size or configs.CHUNK
        chunk = configs.round_up(length, 128 if form == "parallel" else 16)
        return operators.chunked(q, k, v, log_decay, state, cu_seqlens, scale, chunk, keep_states)[:2]
    chunk = {"parallel": max(1, q.shape[1]), "recurrent": 1, "chunkwise": chunk_size or CHUNK}[form]
    return cpu.chunked(q, k, v, log_decay, state, cu_seqlens, scale, chunk)


def retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    slots: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One decoding step of the recurrent form: S ← γ S + kᵀ v in place, o = scale · q S.

    Args:
        q: queries [B,H,K].
        k: keys [B,H,K].
        v: values [B,H,V].
        log_decay: ln γ of each head, [H], in (−∞, 0].
        state: [N,H,K,V], contiguous, fp32 (fp64 for fp64 inputs); the rows in use are updated in place.
        slots: int32 or int64 [B], the row of `state` of each batch row, distinct; −1 marks padding, whose output is zero.
            Default: rows 0 … B−1.
        scale: factor of the query-key products, default K^(−1/2).

    Returns:
        The output [B,H,V] in the type of v. There is no gradient; train with `retention`.

    Raises:
        ValueError: an argument that does not fit, naming it, what it is and what is allowed.
    """
    if slots is None and _plainly_right(q, k, v, log_decay, state):
        factor = q.shape[2] ** -0.5 if scale is None else float(scale)
        if (out := decode.state_step(q, k, v, log_decay, state, None, factor)) is not None:
            return out
    _check_inputs(q, k, v, log_decay, time=False)
    _check_pool(q, v, state, slots)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.device.type == "cpu":
        return cpu.step(q, k, v, log_decay, state, slots, scale)
    if _choose(q, v, log_decay.detach(), "chunkwise")[0] == "triton":
        return operators.step(q, k, v, log_decay, state, slots, scale)
    return reference.retention_step(q, k, v, log_decay, state, slots, scale)


def retention_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    slots: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """T decoding steps at once, as verifying drafted tokens needs them: `retention_step` for one token after the other.

    On a GPU the state is read and written once for all of them.

    Args:
        q: queries [B,T,H,K].
        k: keys [B,T,H,K].
        v: values [B,T,H,V].
        log_decay: as in `retention_step`, like the rest.
        state: [N,H,K,V], updated in place.
        slots: [B].
        scale: default K^(−1/2).

    Returns:
        The outputs [B,T,H,V] in the type of v. There is no gradient.

    Raises:
        ValueError: an argument that does not fit, naming it, what it is and what is allowed.
    """
    _check_inputs(q, k, v, log_decay, time=True)
    _check_pool(q, v, state, slots)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.device.type != "cpu" and _choose(q, v, log_decay.detach(), "chunkwise")[0] == "triton":
        return operators.step(q, k, v, log_decay, state, slots, scale)
    out = torch.empty_like(v)
    for t in range(q.shape[1]):
        out[:, t] = retention_step(q[:, t], k[:, t], v[:, t], log_decay, state, slots, scale)
    return out


def _plainly_right(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> bool:
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
        and native.plain()
    ):
        return False
    (B, H, K), (rows, heads, keys, values) = q.shape, state.shape
    if not (
        k.shape == q.shape
        and v.shape == (B, H, values)
        and (heads, keys) == (H, K)
        and rows >= B
        and state.is_contiguous()
        and log_decay.shape == (H,)
    ):
        return False
    for value in log_decay.tolist():  # noqa: SIM110  a generator would take as long as all the rest
        if not -math.inf < value <= 0:
            return False
    return True


def _readable(x: Tensor) -> bool:
    """Whether looking at the values of x costs no synchronisation and does not break a trace."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, time: bool) -> None:
    lead = "B,T,H" if time else "B,H"
    if q.dim() != (4 if time else 3):
        raise ValueError(f"q has shape {tuple(q.shape)}; allowed: [{lead},K]")
    if k.shape != q.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}; allowed: that of q, {tuple(q.shape)}")
    if v.dim() != q.dim() or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            f"v has shape {tuple(v.shape)}; allowed: [{lead},V] = {(*q.shape[:-1], 'V')} as in q"
        )
    if q.dtype not in DTYPES:
        raise ValueError(f"q has type {q.dtype}; allowed: {', '.join(map(str, DTYPES))}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has type {x.dtype}; allowed: that of q, {q.dtype}")
    heads = q.shape[-2]
    if log_decay.shape != (heads,) or log_decay.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"log_decay has shape {tuple(log_decay.shape)} and type {log_decay.dtype}; "
            f"allowed: [{heads}], one a head, fp32 or fp64 (half types round γ to 1)"
        )
    for name, x in (("k", k), ("v", v), ("log_decay", log_decay)):
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}; allowed: the device of q, {q.device}")
    if _readable(log_decay):
        for head, value in enumerate(log_decay.tolist()):
            if not -math.inf < value <= 0:
                raise ValueError(
                    f"log_decay of head {head} is {value}, γ = {_exp(value)}; allowed: γ in (0, 1], log_decay in (−∞, 0]"
                )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _check_documents(cu_seqlens: Tensor, q: Tensor) -> int:
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
    if _readable(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != q.shape[1] or sorted(bounds) != bounds:
            raise ValueError(f"cu_seqlens is {bounds}; allowed: non-decreasing from 0 to T = {q.shape[1]}")
    return len(cu_seqlens) - 1


def _check_state(state: Tensor | None, q: Tensor, v: Tensor, rows: int) -> None:
    if state is None:
        return
    shape = (rows, q.shape[-2], q.shape[-1], v.shape[-1])
    wide = torch.promote_types(q.dtype, torch.float32)
    if state.shape != shape:
        raise ValueError(f"state has shape {tuple(state.shape)}; allowed: {shape}")
    if state.dtype != wide:
        raise ValueError(f"state has type {state.dtype}; allowed for {q.dtype} inputs: {wide}")
    if state.device != q.device:
        raise ValueError(f"state is on {state.device}; allowed: the device of q, {q.device}")


def _check_pool(q: Tensor, v: Tensor, state: Tensor, slots: Tensor | None) -> None:
    B = q.shape[0]
    if slots is not None and (slots.shape != (B,) or slots.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"slots has shape {tuple(slots.shape)} and type {slots.dtype}; allowed: [{B}] of int32 or int64"
        )
    if slots is not None and slots.device != q.device:
        raise ValueError(f"slots is on {slots.device}; allowed: the device of q, {q.device}")
    if state.dim() != 4:
        raise ValueError(f"state has {state.dim()} dimensions; allowed: [N,H,K,V]")
    _check_state(state, q, v, state.shape[0])
    if not state.is_contiguous():
        raise ValueError(
            "state is not contiguous, and it is updated in place; pass state.contiguous() and keep that"
        )
    if slots is None and state.shape[0] < B:
        raise ValueError(f"state has {state.shape[0]} rows for a batch of {B}; give at least {B}, or slots")
    if (
        slots is not None
        and _readable(slots)
        and B
        and not -1 <= int(slots.min()) <= int(slots.max()) < state.shape[0]
    ):
        raise ValueError(f"slots holds {slots.tolist()}; allowed: −1 (padding) to {state.shape[0] - 1}")


def _backend(name: str, q: Tensor, v: Tensor, log_decay: Tensor, form: str) -> str:
    if name == "auto":
        chosen, why = _choose(q, v, log_decay, form)
        if not torch.compiler.is_compiling():
            _say_once(chosen, why)
        return chosen
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; allowed: 'auto', {', '.join(map(repr, BACKENDS))}")
    if name == "triton" and (hindrance := _no_triton(q, v, log_decay, form)) is not None:
        raise ValueError(f"backend 'triton' cannot run: {hindrance}; or use backend 'auto' or 'reference'")
    if name == "cpu" and q.device.type != "cpu":
        raise ValueError(f"backend 'cpu' cannot run tensors on {q.device}; use 'auto' or 'reference'")
    if name == "cpu" and log_decay.requires_grad:
        raise ValueError(
            "log_decay requires a gradient, which backend 'cpu' does not compute; use backend 'reference'"
        )
    return name


def _choose(q: Tensor, v: Tensor, log_decay: Tensor, form: str) -> tuple[str, str]:
    """The fastest backend that can run these arguments, and why it is that one."""
    if q.device.type == "cpu":
        wanted = ", gradient of log_decay wanted" if log_decay.requires_grad else ""
        return ("reference" if wanted else "cpu"), f"tensors on cpu{wanted}"
    why = _no_triton(q, v, log_decay, form)
    return ("triton", f"tensors on {q.device.type}") if why is None else ("reference", why)


def _no_triton(q: Tensor, v: Tensor, log_decay: Tensor, form: str) -> str | None:
    return support.unsupported(q, v, log_decay, form) or support.missing(str(q.device))


@cache
def _say_once(name: str, why: str) -> None:
    _log.info("retention: backend 'auto' is %r (%s)", name, why)
