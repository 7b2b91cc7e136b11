"""Derivatives of retention by its decays, of head or token, from what its forward and backward pass compute anyway.

Let b_n be the sum of ln γ up to token n, with b_{-1} = 0 before the first. Everything retention computes is a sum of terms
with one e^(b_n − b_m) each, m being where a key and value, or the state, came in and n where they are read. A change of b_n
scales all that q_n reads and unscales all that k_n brought. So for a loss L, with a dot for sums over a head's width,

    ∂L/∂b_n = q_n · dq_n − k_n · dk_n          for n < T, and what the final state adds to the last
    Σ_n ∂L/∂b_n = ⟨S_{-1}, dS_{-1}⟩            since shifting all b, that before the first too, changes nothing
    ∂L/∂ln γ_t = Σ_{n≥t} ∂L/∂b_n = ⟨S_{-1}, dS_{-1}⟩ − Σ_{n<t} (q_n · dq_n − k_n · dk_n)

which needs neither the final state nor anything inside a chunk (Yang et al. 2024, "Gated Linear Attention", C, sums from the
other end). Sums over tokens are taken in fp64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.ops.decay import documents_of, wide_type
from retnet.ops.inputs import RetentionInputs

Parts = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of q, k, v and the state


def gradient(x: RetentionInputs, *products: tuple[Parts, Parts]) -> Tensor:
    """The gradient of `x.log_decay`, in its shape and type.

    Args:
        x: the inputs of the call.
        products: pairs of (q, k, v, state) and their gradients, over whose products the formula sums: one for the
            gradient itself; for its derivative along a direction, the direction's with the gradients and the inputs'
            with the change of these. None is zero.
    """
    shape, wide = x.v.shape[:3], wide_type(x.device)
    tokens = torch.zeros(shape, dtype=wide, device=x.device)
    first = torch.zeros(x.sequences, shape[2], dtype=wide, device=x.device)
    for (q, k, _, state), (dq, dk, _, d_state) in products:
        if q is not None and dq is not None:
            tokens = tokens + (q * dq).sum(-1)
        if k is not None and dk is not None:
            tokens = tokens - (k * dk).sum(-1)
        if state is not None and d_state is not None:
            first = first + (state * d_state).sum((-2, -1))
    found = _sums(tokens)[:, :-1]
    if x.cu_seqlens is None:
        found = first[:, None] - found
    else:
        document, begins = documents_of(shape[1], x.cu_seqlens)
        found = first[document] - (found - found[:, begins])
    return (found if x.gated else found.sum((0, 1))).to(x.log_decay.dtype)


def running(x: RetentionInputs, direction: Tensor) -> tuple[Tensor, Tensor]:
    """The change of b when the decays change in a direction: β [B,T,H] of each token, [N,H] at the end of each document."""
    sums = _sums(direction.to(wide_type(x.device)).expand(x.v.shape[:3]))
    if x.cu_seqlens is None:
        return sums[:, 1:], sums[:, -1]
    _, begins = documents_of(x.v.shape[1], x.cu_seqlens)
    return sums[:, 1:] - sums[:, begins], sums[0, x.cu_seqlens.long()].diff(dim=0)


def _sums(x: Tensor) -> Tensor:
    """Σ_{i<t} x_i for t = 0 … T: [B,T,H] → [B,T+1,H]."""
    return F.pad(x.cumsum(1), (0, 0, 1, 0))
