"""Reference implementation of retention, the law: the paper's equations (§2), any floating type, differentiable by autograd.

Every faster path is tested against these functions. They are written to be read beside the paper, not to be fast.

All three forms compute, per head with decay γ, from the state S_{-1} that came before:

    o_n = scale · Σ_{m≤n} γ^{n-m} (q_n · k_m) v_m  +  scale · γ^{n+1} q_n S_{-1}
    S_n = γ S_{n-1} + k_nᵀ v_n

Arguments of all forms: q, k [B,T,H,K]; v [B,T,H,V]; log_decay [H], natural logarithm of γ; state [B,H,K,V].
They return the output [B,T,H,V] in v's type and the state after the last token in the type of the computation
(fp32, or fp64 for fp64 inputs).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from retnet.ops.inputs import RetentionInputs

Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, int], tuple[Tensor, Tensor]]


def decay_mask(log_decay: Tensor, length: int) -> Tensor:
    """D of the paper: D_nm = γ^{n-m} for n ≥ m, else 0; [H,T,T] in the type of `log_decay`."""
    n = torch.arange(length, device=log_decay.device)
    distance = n[:, None] - n[None, :]
    weights = torch.exp(log_decay[:, None, None] * distance.clamp(min=0))
    return torch.where(distance >= 0, weights, torch.zeros_like(weights))


def parallel(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """(Q Kᵀ ⊙ D) V, all tokens at once; what came before enters through its state, decayed by ξ_j = γ^{j+1}."""
    T = q.shape[1]
    j = torch.arange(T, device=q.device)
    xi = torch.exp(log_decay * (j[:, None] + 1))  # [T,H]
    zeta = torch.exp(log_decay * (T - 1 - j[:, None]))  # [T,H]
    scores = torch.einsum("bnhk,bmhk->bhnm", q, k) * decay_mask(log_decay, T)
    inner = torch.einsum("bhnm,bmhv->bnhv", scores, v)
    cross = torch.einsum("bnhk,bhkv->bnhv", q, state) * xi[..., None]
    after = torch.einsum("bmhk,bmhv->bhkv", k, v * zeta[..., None])
    return scale * (inner + cross), after + state * torch.exp(log_decay * T)[:, None, None]


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """S_n = γ S_{n-1} + k_nᵀ v_n, o_n = q_n S_n, one token after the other."""
    gamma = torch.exp(log_decay)[:, None, None]
    outputs = []
    for n in range(q.shape[1]):
        state = gamma * state + torch.einsum("bhk,bhv->bhkv", k[:, n], v[:, n])
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, n], state))
    return (torch.stack(outputs, dim=1) if outputs else v * scale), state


def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Parallel inside a chunk, recurrent from chunk to chunk: R_i = K_[i]ᵀ(V_[i] ⊙ ζ) + γ^C R_{i-1}."""
    outputs = []
    for start in range(0, q.shape[1], chunk_size):
        part = slice(start, start + chunk_size)
        out, state = parallel(q[:, part], k[:, part], v[:, part], log_decay, state, scale, chunk_size)
        outputs.append(out)
    return (torch.cat(outputs, dim=1) if outputs else v * scale), state


_FORMS: dict[str, Form] = {"parallel": parallel, "recurrent": recurrent, "chunkwise": chunkwise}


def retention(x: RetentionInputs, form: str, chunk_size: int) -> tuple[Tensor, Tensor]:
    """One of the three forms; with `cu_seqlens`, document by document, each from its own row of the state.

    Types below fp32 are computed in fp32.
    """
    run, state = _FORMS[form], x.fresh_state() if x.state is None else x.state
    q, k, v, log_decay = (y.to(state.dtype) for y in x[:4])
    if x.cu_seqlens is None:
        out, state = run(q, k, v, log_decay, state, x.scale, chunk_size)
        return out.to(x.v.dtype), state
    outputs, states = [], []
    for i, (start, end) in enumerate(itertools.pairwise(x.cu_seqlens.tolist())):
        part = slice(start, end)
        out, after = run(q[:, part], k[:, part], v[:, part], log_decay, state[i : i + 1], x.scale, chunk_size)
        outputs.append(out)
        states.append(after)
    if not states:
        return (v * x.scale).to(x.v.dtype), state
    return torch.cat(outputs, dim=1).to(x.v.dtype), torch.cat(states)


def retention_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    """One step of the recurrent form on rows of `state` [N,H,K,V], which are updated in place. Slot −1 is padding."""
    rows = torch.arange(q.shape[0], device=q.device) if slots is None else slots.long()
    real: Tensor | slice = slice(None) if slots is None else rows >= 0
    out = torch.zeros_like(v)
    after = torch.exp(log_decay.to(state.dtype))[:, None, None] * state[rows[real]]
    after = after + torch.einsum("bhk,bhv->bhkv", k[real].to(state.dtype), v[real].to(state.dtype))
    state[rows[real]] = after
    out[real] = (scale * torch.einsum("bhk,bhkv->bhv", q[real].to(state.dtype), after)).to(v.dtype)
    return out
