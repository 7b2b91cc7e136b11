"""Decoding on a CPU: every weight and every state is read once, at the speed of the memory, in few calls.

torch's matrix product with a few rows runs on one thread at a third of that thread's bandwidth, updates a state in three
passes, and dispatches seventy small operators a layer. The kernels behind the functions here, compiled by numba where it is
installed, do the same in one pass on all of torch's threads. Where they cannot run (no numba, another type, a gradient) the
functions return None, which means "compose it from the parts"; the parts are the law, and the kernels are tested against
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retnet.ops import native
from retnet.ops.advance import compile_advance, compile_step
from retnet.ops.matvec import compile_matvec, compile_product
from retnet.ops.native import readable
from retnet.ops.plans import MIN_SIZE, Plan
from retnet.ops.walk import compile_walk

MAX_ROWS = 8  # beyond, torch's matrix product is the faster one


class _Kernels(NamedTuple):
    product: Any
    walk: Any
    step: Any


def few_rows(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor | None:
    """x Wᵀ: fp32 x [B,K] and weight [N,K] → [B,N]; None where the kernel cannot run.

    W is an fp32 weight, or an int8 one whose rows are multiplied by an fp32 scale [N].
    """
    number = torch.float32 if scale is None else torch.int8
    if (
        not _rows_fit(x, torch.float32, 2)
        or weight.numel() < MIN_SIZE
        or x.shape[1] != weight.shape[1]
        or not readable((weight,), number)
        or not readable((scale,), torch.float32, weight.shape[:1])
        or (kernels := _kernels(number)) is None
    ):
        return None
    x, (N, K) = x.contiguous(), weight.shape
    out = torch.empty(x.shape[0], N)
    scales = 0 if scale is None else scale.data_ptr()
    native.run(kernels.product, (x.data_ptr(), weight.data_ptr(), scales, out.data_ptr(), x.shape[0], K, N))
    return out


class Steps:
    """Steps through blocks from states, which all have been checked: what is left to do at a step is the token itself.

    Weights and states are read where they were when this was made. They may change in place; whoever gives them other
    memory, or other layers to the model, makes new steps.
    """

    def __init__(
        self,
        plan: Plan,
        states: Sequence[tuple[Tensor, Tensor]],
        batch: int,
        kernel: Any,  # noqa: ANN401
    ) -> None:
        D, H, K, V, N = plan.sizes
        self._plan, self._states, self._batch, self._kernel = plan, states, batch, kernel
        self._memory = torch.empty(batch * (2 * H * (K + V) + H * V + D + 2 * N))
        pointers = (x.data_ptr() for state in states for x in state)
        self._table = native.table((plan.address, batch, 0, 0, self._memory.data_ptr(), *pointers))

    def __call__(self, x: Tensor) -> Tensor | None:
        """One step: y = x + MSR(norm(x)), then y + FFN(norm(y)), for each block. States are updated in place.

        Args:
            x: fp32 [B,D]; with the ends of a model in the plan, its tokens instead, int64 [B].

        Returns:
            [B,D], or logits [B,vocabulary]; or None, and nothing done, where the kernel cannot run: another type, device or
            size, a gradient, a token that is not in the vocabulary.
        """
        plan, B = self._plan, self._batch
        if plan.tokens:
            fits = _rows_fit(x, torch.int64, 1) and all(0 <= token < plan.tokens for token in x.tolist())
        else:
            fits = _rows_fit(x, torch.float32, 2) and x.shape[1] == plan.sizes[0]
        if not fits or x.shape[0] != B:
            return None
        x, out = x.contiguous(), torch.empty(B, plan.width)
        self._table[2], self._table[3] = x.data_ptr(), out.data_ptr()
        native.launch(self._kernel, self._table)
        return out


def bind_blocks(states: Sequence[tuple[Tensor, Tensor]], plan: Plan) -> Steps | None:
    """Steps of a plan's blocks (paper §3) from states, one call for all of them; None where the kernel cannot run.

    Args:
        states: of each block its state [B,H,K,V], fp32, contiguous, and the position of the next token, int64 [B]. Steps
            update both in place; positions move on by one.
        plan: of the blocks, from `retnet.ops.plans.make_plan`.
    """
    _, H, K, V, _ = plan.sizes
    if len(states) != plan.blocks or not states[0][1].dim():
        return None
    B = len(states[0][1])
    for state, position in states:
        if not (
            state.dtype is torch.float32
            and position.dtype is torch.int64
            and state.shape == (B, H, K, V)
            and position.shape == (B,)
            and state.is_cpu
            and position.is_cpu
            and state.is_contiguous()
            and position.is_contiguous()
        ):
            return None
    if B > MAX_ROWS or not native.plain() or (kernels := _kernels(plan.number)) is None:
        return None
    return Steps(plan, states, B, kernels.walk)


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
    native.run(
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
            native.bits(scale),
        ),
    )
    return out


def _rows_fit(x: Tensor, dtype: torch.dtype, dim: int) -> bool:
    return (
        x.dtype is dtype
        and x.is_cpu
        and x.dim() == dim
        and x.shape[0] <= MAX_ROWS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and native.plain()
    )


_NUMBERS = {torch.float32: np.float32, torch.int8: np.int8}


@cache
def _kernels(number: torch.dtype) -> _Kernels | None:
    """For weights of this type. Compiled on first use, a few seconds, and kept on disk beside this file."""
    if (compiler := native.compiler()) is None:
        return None
    matvec, advance = compile_matvec(compiler, _NUMBERS[number]), compile_advance(compiler)
    return _Kernels(
        compile_product(compiler, matvec),
        compile_walk(compiler, matvec, advance),
        compile_step(compiler, advance),
    )
