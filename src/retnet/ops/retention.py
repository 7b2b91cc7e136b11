"""`retention` and its decoding steps: arguments checked, then handed to the backend that `dispatch` chooses."""

# ruff: noqa: ANN401 (implementations of an op pass its arguments on as they are)

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from retnet.ops import operators, reference
from retnet.ops.chunkwise import CHUNK, chunk_of
from retnet.ops.cpu import chunkwise_numba, decode
from retnet.ops.dispatch import Implementation, Op
from retnet.ops.inputs import RetentionInputs
from retnet.ops.torch_private import differentiating_forwards, is_differentiated, plain
from retnet.ops.triton import capability, tile_table
from retnet.ops.validation import check_documents, check_inputs, check_pool, check_state, plainly_right

FORMS = ("parallel", "recurrent", "chunkwise")

NO_STEP_DERIVATIVE = (
    "a derivative of a step is wanted, which only the reference has (else decode in torch.no_grad())"
)


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
        log_decay: ln γ of each head, [H], see `log_decays`; or of each token and head, [B,T,H] (gated retention: S_n =
            γ_n S_{n-1} + k_nᵀ v_n). fp32 or fp64, in (−∞, 0].
        state: to start from, fp32 (fp64 for fp64 inputs): [B,H,K,V], or [N,H,K,V] with `cu_seqlens`; default zeros.
        cu_seqlens: int32 or int64 [N+1], bounds of N documents packed in one row (B = 1), from 0 to T, empty ones allowed.
        scale: factor of the query-key products, default K^(−1/2).
        form: ``"parallel"``, ``"recurrent"`` or ``"chunkwise"``: one function, three ways to compute it.
        chunk_size: C of the chunkwise form; default: `CHUNK`, and of Triton's kernels `tile_table.CHUNK` (which round C
            up to a multiple of 16).
        backend: ``"reference"`` (any device, autograd of everything), ``"torch"`` (any device; explicit backward, constant
            memory in the number of chunks), ``"numba"`` (the same in kernels compiled for the
            CPU), ``"triton"`` (the same on CUDA and ROCm; no recurrent form), or ``"auto"``: the fastest that can run,
            logged once.
        keep_states: Triton's kernels keep the states at chunk boundaries from the forward for the backward pass (K·V/C
            numbers a token and head) instead of computing them again. The other backends have nothing to keep.

    Returns:
        The output [B,T,H,V] in the type of v, and the state after the last token (of each document), shaped as `state`.

    Raises:
        ValueError: an argument that does not fit, naming it, what it is and what is allowed; or a backend that cannot run.
    """
    check_inputs(q, k, v, log_decay, time=True)
    rows = q.shape[0] if cu_seqlens is None else check_documents(cu_seqlens, q)
    if state is not None:
        check_state(state, q, v, rows)
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; allowed: {', '.join(map(repr, FORMS))}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    inputs = RetentionInputs(q, k, v, log_decay, state, cu_seqlens, scale)
    arguments = (inputs, form, chunk_size, keep_states)
    out: tuple[Tensor, Tensor] = _RETENTION.choose(backend, *arguments)(*arguments)
    return out


def retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    slots: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """One decoding step of the recurrent form: S ← γ S + kᵀ v in place, o = scale · q S.

    Where a derivative is wanted, of the output or through the state to later steps, ``"auto"`` takes the reference, in
    which autograd follows the update in place; the other backends refuse. `torch.no_grad` is what decoding wants.

    Args:
        q: queries [B,H,K].
        k: keys [B,H,K].
        v: values [B,H,V].
        log_decay: ln γ in (−∞, 0] of each head, [H], or of each token and head, [B,H].
        state: [N,H,K,V], contiguous, fp32 (fp64 for fp64 inputs); the rows in use are updated in place. No leaf that
            requires a gradient: pass a clone of it.
        slots: int32 or int64 [B], the row of `state` of each batch row, distinct; −1 marks padding, whose output is zero.
            Default: rows 0 … B−1.
        scale: factor of the query-key products, default K^(−1/2).
        backend: as in `retention`.

    Returns:
        The output [B,H,V] in the type of v.

    Raises:
        ValueError: an argument that does not fit, naming it, what it is and what is allowed; or a backend that cannot run,
            or has no derivative where one is wanted.
        NotImplementedError: inside a transform of `torch.func`; `retention` of one token has them all.
    """
    if slots is not None or not plainly_right(q, k, v, log_decay, state):
        check_inputs(q, k, v, log_decay, time=False)
        check_pool(q, v, state, slots)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (q, k, v, log_decay, state, slots, scale)
    out: Tensor = _STEP.choose(backend, *arguments)(*arguments)
    return out


def retention_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    slots: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """T decoding steps at once, as verifying drafted tokens needs them: `retention_step` for one token after the other.

    On a GPU the state is read and written once for all of them.

    Args:
        q: queries [B,T,H,K].
        k: keys [B,T,H,K].
        v: values [B,T,H,V].
        log_decay: ln γ in (−∞, 0] of each head, [H], or of each token and head, [B,T,H].
        state: [N,H,K,V], updated in place.
        slots: [B].
        scale: default K^(−1/2).
        backend: as in `retention`.

    Returns:
        The outputs [B,T,H,V] in the type of v.

    Raises:
        ValueError: as `retention_step`.
        NotImplementedError: as `retention_step`.
    """
    check_inputs(q, k, v, log_decay, time=True)
    check_pool(q, v, state, slots)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (q, k, v, log_decay, state, slots, scale)
    out: Tensor = _STEPS.choose(backend, *arguments)(*arguments)
    return out


# The rows of the table; arguments of the first: inputs, form, chunk_size, keep_states.


def _reference(
    x: RetentionInputs, form: str, chunk_size: int | None, keep_states: bool
) -> tuple[Tensor, Tensor]:
    return reference.retention(x, form, chunk_size or CHUNK)


def _chunkwise(
    ops: operators.Operators, x: RetentionInputs, form: str, chunk_size: int | None, keep_states: bool
) -> tuple[Tensor, Tensor]:
    """All three forms are the chunkwise one: in chunks of the whole sequence, of one token, or of `chunk_size`."""
    out, final, _ = ops.forward(*x, chunk_of(form, chunk_size, x.q.shape[1]), False)
    return out, final


def _triton(
    x: RetentionInputs, form: str, chunk_size: int | None, keep_states: bool
) -> tuple[Tensor, Tensor]:
    length = x.q.shape[1] if form == "parallel" else chunk_size or tile_table.CHUNK
    chunk = tile_table.round_up(length, 128 if form == "parallel" else 16)
    out, final, _ = operators.TRITON.forward(*x, chunk, keep_states)
    return out, final


def _no_numba(x: RetentionInputs, *_: object) -> str | None:
    if not x.q.is_cpu:
        return f"tensors are on {x.device}; numba compiles for the CPU"
    return chunkwise_numba.hindrance(x.q.dtype)


def _no_triton(x: RetentionInputs, form: str, *_: object) -> str | None:
    return capability.unsupported(x.q, x.v, form) or capability.missing(str(x.device))


_RETENTION = Op(
    "retention",
    triton=Implementation(_triton, _no_triton, auto_on="cuda"),
    numba=Implementation(
        partial(_chunkwise, operators.NUMBA), _no_numba, chunkwise_numba.slower, auto_on="cpu"
    ),
    torch=Implementation(partial(_chunkwise, operators.TORCH)),
    reference=Implementation(_reference),
)

# Arguments of the steps: q, k, v, log_decay, state, slots, scale.


def _step_by_numba(q: Tensor, *rest: Any) -> Tensor:
    """By the operator where something wants to see it, whose dispatch costs more than a small step."""
    run = decode.step if plain() and not torch.is_grad_enabled() else operators.NUMBA.step
    out: Tensor = run(q, *rest)
    return out


def _no_step(*tensors: Any) -> str | None:
    if torch.is_grad_enabled() or differentiating_forwards():
        return NO_STEP_DERIVATIVE if is_differentiated(*tensors[:5]) else None
    return None


def _no_numba_step(*arguments: Any) -> str | None:
    return _no_step(*arguments) or decode.no_step(*arguments)


def _no_triton_step(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    unfit = _no_step(q, k, v, *rest) or capability.unsupported(q, v, "chunkwise")
    return unfit or capability.missing(str(q.device))


def _one_by_one(step: Callable[..., Tensor], *arguments: Any) -> Tensor:
    q, k, v, log_decay, *rest = arguments
    out = torch.empty_like(v)
    for t in range(q.shape[1]):
        decay = log_decay[:, t] if log_decay.dim() == 3 else log_decay
        out[:, t] = step(q[:, t], k[:, t], v[:, t], decay, *rest)
    return out


_STEP = Op(
    "retention_step",
    triton=Implementation(operators.TRITON.step, _no_triton_step, auto_on="cuda"),
    numba=Implementation(_step_by_numba, _no_numba_step, auto_on="cpu"),
    torch=Implementation(operators.TORCH.step, _no_step),
    reference=Implementation(reference.retention_step),
)
_STEPS = Op(
    "retention_steps",
    triton=Implementation(operators.TRITON.step, _no_triton_step, auto_on="cuda"),
    numba=Implementation(partial(_one_by_one, _step_by_numba), _no_numba_step, auto_on="cpu"),
    torch=Implementation(partial(_one_by_one, operators.TORCH.step), _no_step),
    reference=Implementation(partial(_one_by_one, reference.retention_step)),
)
