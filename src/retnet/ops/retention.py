"""The op of the contract: checks its arguments, picks a backend, runs it."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from retnet.ops import reference
from retnet.ops.cpu import chunkwise as cpu
from retnet.ops.cpu import decode
from retnet.ops.triton import capability, operators, tile_table
from retnet.ops.validation import check_documents, check_inputs, check_pool, check_state, plainly_right

BACKENDS = ("reference", "cpu", "triton")
FORMS = ("parallel", "recurrent", "chunkwise")

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
        chunk_size: C of the chunkwise form; default: `CHUNK`, and of Triton's kernels `tile_table.CHUNK` (which round C
            up to a multiple of 16).
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
    check_inputs(q, k, v, log_decay, time=True)
    rows = q.shape[0] if cu_seqlens is None else check_documents(cu_seqlens, q)
    check_state(state, q, v, rows)
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; allowed: {', '.join(map(repr, FORMS))}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    backend = _backend(backend, q, v, log_decay, form)
    if backend == "reference":
        return reference.retention(q, k, v, log_decay, state, cu_seqlens, scale, form, chunk_size or CHUNK)
    if backend == "triton":
        length = q.shape[1] if form == "parallel" else chunk_size or tile_table.CHUNK
        chunk = tile_table.round_up(length, 128 if form == "parallel" else 16)
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
    if slots is None and plainly_right(q, k, v, log_decay, state):
        factor = q.shape[2] ** -0.5 if scale is None else float(scale)
        if (out := decode.state_step(q, k, v, log_decay, state, None, factor)) is not None:
            return out
    check_inputs(q, k, v, log_decay, time=False)
    check_pool(q, v, state, slots)
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
    check_inputs(q, k, v, log_decay, time=True)
    check_pool(q, v, state, slots)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.device.type != "cpu" and _choose(q, v, log_decay.detach(), "chunkwise")[0] == "triton":
        return operators.step(q, k, v, log_decay, state, slots, scale)
    out = torch.empty_like(v)
    for t in range(q.shape[1]):
        out[:, t] = retention_step(q[:, t], k[:, t], v[:, t], log_decay, state, slots, scale)
    return out


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
    return capability.unsupported(q, v, log_decay, form) or capability.missing(str(q.device))


@cache
def _say_once(name: str, why: str) -> None:
    _log.info("retention: backend 'auto' is %r (%s)", name, why)
