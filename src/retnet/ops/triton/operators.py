"""The kernels of retention's operators for backend "triton": chunkwise forward, backward, and decoding steps.

Triton is imported when one of them first runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retnet.ops.inputs import RetentionInputs


def forward(x: RetentionInputs, chunk: int, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B,T,H,V] in v's type, final state fp32, and the states at chunk boundaries (none unless `keep_states`)."""
    from retnet.ops.triton import launch

    q, k, v, log_decay, state, cu_seqlens, scale = x
    chunks, log_decay = launch.cut(q, cu_seqlens, chunk), launch.log2_sums(log_decay, cu_seqlens, chunk)
    snapshots, final = launch.state_pass(k, v, state, log_decay, chunks, reverse=False)
    out = launch.out_pass(q, k, v, snapshots, log_decay, scale, chunks, reverse=False, transposed=False)
    return out, final, snapshots if keep_states else snapshots.new_empty(0)


def backward(
    x: RetentionInputs,
    chunk: int,
    d_out: Tensor,
    d_final: Tensor | None,
    snapshots: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial state; `snapshots` of the forward pass are used, or computed again.

    Those of q and k are fp32 if they are to be `wide`, else in the type of q.
    """
    from retnet.ops.triton import launch

    q, k, v, log_decay, state, cu_seqlens, scale = x
    chunks, log_decay = launch.cut(q, cu_seqlens, chunk), launch.log2_sums(log_decay, cu_seqlens, chunk)
    to_dq, to_dk = (torch.empty_like(y, dtype=torch.float32) if wide else None for y in (q, k))
    if snapshots is None:
        snapshots = launch.state_pass(k, v, state, log_decay, chunks, reverse=False)[0]
    dq = launch.out_pass(
        d_out, v, k, snapshots, log_decay, scale, chunks, reverse=False, transposed=True, out=to_dq
    )
    d_snapshots, d_state = launch.state_pass(q, d_out, d_final, log_decay, chunks, reverse=True, scale=scale)
    dk = launch.out_pass(
        v, d_out, q, d_snapshots, log_decay, scale, chunks, reverse=True, transposed=True, out=to_dk
    )
    dv = launch.out_pass(k, q, d_out, d_snapshots, log_decay, scale, chunks, reverse=True, transposed=False)
    return dq, dk, dv, d_state


def decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    """One token [B,H,·] or a few [B,T,H,·] for each of B rows of `state` [N,H,K,V], which change in place."""
    from retnet.ops.triton import launch

    return launch.step_pass(q, k, v, log_decay, state, slots, scale)
