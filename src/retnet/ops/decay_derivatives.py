"""Derivatives of retention by its decays, of head or token, from what its forward and backward pass compute anyway.

Let b_n be the sum of ln γ up to token n, with b_{-1} = 0 before the first. Everything retention computes is a sum of terms
with one e^(b_n − b_m) each, m being where a key and value, or the state, came in and n where they are read. A change of b_n
scales all that q_n reads and unscales all that k_n brought. So for a loss L, with a dot for sums over a head's width,

    ∂L/∂ln γ_t = Σ_{n≥t} ∂L/∂b_n = Σ_{n≥t} (q_n · dq_n − k_n · dk_n) + f

where f is the final state's part of the last, as in Yang et al. 2024, "Gated Linear Attention". Shifting all b, that before
the first token too, changes nothing, so all sums together are ⟨S_{-1}, dS_{-1}⟩, from which f follows without the final
state. Nothing inside a chunk is needed. Sums over tokens are taken in fp64, from the last one on: what comes after an output
adds zeros, and has no gradient of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retnet.ops.decay import documents_of, sums_between, wide_type
from retnet.ops.inputs import RetentionInputs

Parts = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of q, k, v and the state


def gradient(x: RetentionInputs, final: bool, *products: tuple[Parts, Parts]) -> Tensor:
    """The gradient of `x.log_decay`, in its shape and type.

    Args:
        x: the inputs of the call.
        final: whether the final state has a gradient.
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
    bounds, document, _ = _documents(x)
    left = shape[1] - bounds  # tokens after each bound
    backwards, own = tokens.flip(1), shape[1] - torch.arange(shape[1], device=x.device)
    found = sums_between(backwards, left[document + 1], own)  # of each token and those after it
    if final:
        whole = sums_between(backwards, left[1:], left[:-1])
        found = found + (first.reshape(whole.shape) - whole)[:, document]
    return (found if x.gated else found.sum((0, 1))).to(x.log_decay.dtype)


def running(x: RetentionInputs, direction: Tensor) -> tuple[Tensor, Tensor]:
    """The change of b when the decays change in a direction: β [B,T,H] of each token, [N,H] at the end of each document."""
    direction = direction.expand(x.v.shape[:3])
    bounds, _, begins = _documents(x)
    up_to = sums_between(direction, begins, torch.arange(1, x.v.shape[1] + 1, device=x.device))
    return up_to, sums_between(direction, bounds[:-1], bounds[1:]).flatten(0, 1)


def _documents(x: RetentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds of documents, int64 [N+1], and of each token its document and where that begins; a row is one document."""
    T = x.v.shape[1]
    bounds = torch.arange(2, device=x.device) * T if x.cu_seqlens is None else x.cu_seqlens.long()
    return bounds, *documents_of(T, bounds)
