"""Reference implementation of retention, the law: the paper's equations (§2), any floating type, differentiable by autograd.

Every faster path is tested against these functions. They are written to be read beside the paper, not to be fast.

All three forms compute, per head with decay γ, from the state S_{-1} that came before:

    o_n = scale · Σ_{m≤n} γ^{n-m} (q_n · k_m) v_m  +  scale · γ^{n+1} q_n S_{-1}
    S_n = γ S_{n-1} + k_nᵀ v_n

In gated retention (Sun et al. 2024, "You Only Cache Once") each token n has a γ_n of its own: γ^{n-m} is then
Π_{m<i≤n} γ_i, and γ^{n+1} is Π_{i≤n} γ_i.

Arguments of all forms: q, k [B,T,H,K]; v [B,T,H,V]; log_decay, natural logarithm of γ, [H], or [B,T,H] by token;
state [B,H,K,V].
They return the output [B,T,H,V] in v's type and the state after the last token in the type of the computation
(fp32, or fp64 for fp64 inputs).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from retnet.ops.decay import decay_sums
from retnet.ops.inputs import RetentionInputs

Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, int], tuple[Tensor, Tensor]]


def decay_mask(log_decay: Tensor, length: int) -> Tensor:
    """D of the paper: D_nm = γ^{n-m} for n ≥ m, else 0; [H,T,T] in the type of `log_decay`."""
    n = torch.arange(length, device=log_decay.device)
    distance = n[:, None] - n[None, :]
    weights = torch.exp(log_decay[:, None, None] * distance.clamp(min=0))
    return torch.where(distance >= 0, weights, torch.zeros_like(weights))


class DecayWeights(NamedTuple):
    """The weights of T tokens, in the type of the computation."""

    mask: Tensor  # D_nm, [H,T,T], or [B,H,T,T] by token
    xi: Tensor  # from before the first token to each, [T,H] or [B,T,H]
    zeta: Tensor  # from each token to the last
    total: Tensor  # over all tokens, [H] or [B,H]


def decays(log_decay: Tensor, length: int) -> DecayWeights:
    """Of one γ a head: D_nm = γ^{n-m}, ξ_n = γ^{n+1}, ζ_n = γ^{T-1-n}; by token, the products of γ between."""
    if log_decay.dim() == 1:
        n = torch.arange(length, device=log_decay.device)[:, None]
        xi, zeta = torch.exp(log_decay * (n + 1)), torch.exp(log_decay * (length - 1 - n))
        return DecayWeights(decay_mask(log_decay, length), xi, zeta, torch.exp(log_decay * length))
    sums = decay_sums(log_decay)
    a = sums[:, 1:].transpose(1, 2)  # [B,H,T]
    later = torch.ones(length, length, dtype=torch.bool, device=a.device).triu(1)
    mask = (a[..., :, None] - a[..., None, :]).masked_fill(later, -torch.inf)
    exponents = (mask, sums[:, 1:], sums[:, -1:] - sums[:, 1:], sums[:, -1])
    return DecayWeights(*(torch.exp(x).to(log_decay.dtype) for x in exponents))


def parallel(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """(Q Kᵀ ⊙ D) V, all tokens at once; what came before enters through its state, decayed by ξ_j = γ^{j+1}."""
    D, xi, zeta, total = decays(log_decay, q.shape[1])
    scores = torch.einsum("bnhk,bmhk->bhnm", q, k) * D
    inner = torch.einsum("bhnm,bmhv->bnhv", scores, v)
    cross = torch.einsum("bnhk,bhkv->bnhv", q, state) * xi[..., None]
    after = torch.einsum("bmhk,bmhv->bhkv", k, v * zeta[..., None])
    return scale * (inner + cross), after + state * total[..., None, None]


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """S_n = γ S_{n-1} + k_nᵀ v_n, o_n = q_n S_n, one token after the other."""
    gamma = torch.exp(log_decay).expand(q.shape[:3])[..., None, None]
    outputs = []
    for n in range(q.shape[1]):
        state = gamma[:, n] * state + torch.einsum("bhk,bhv->bhkv", k[:, n], v[:, n])
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, n], state))
    return (torch.stack(outputs, dim=1) if outputs else v * scale), state


def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Parallel inside a chunk, recurrent from chunk to chunk: R_i = K_[i]ᵀ(V_[i] ⊙ ζ) + γ^C R_{i-1}."""
    outputs = []
    for start in range(0, q.shape[1], chunk_size):
        part = slice(start, start + chunk_size)
        decay = _of(log_decay, part)
        out, state = parallel(q[:, part], k[:, part], v[:, part], decay, state, scale, chunk_size)
        outputs.append(out)
    return (torch.cat(outputs, dim=1) if outputs else v * scale), state


def _of(log_decay: Tensor, part: slice) -> Tensor:
    """The decays of some of the tokens."""
    return log_decay[:, part] if log_decay.dim() == 3 else log_decay


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
        tokens = (q[:, part], k[:, part], v[:, part], _of(log_decay, part))
        out, after = run(*tokens, state[i : i + 1], x.scale, chunk_size)
        outputs.append(out)
        states.append(after)
    if not states:
        return (v * x.scale).to(x.v.dtype), state
    return torch.cat(outputs, dim=1).to(x.v.dtype), torch.cat(states)


def retention_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    """One step of the recurrent form on rows of `state` [N,H,K,V], which are updated in place. Slot −1 is padding.

    log_decay is [H], or [B,H] by token.
    """
    rows = torch.arange(q.shape[0], device=q.device) if slots is None else slots.long()
    real: Tensor | slice = slice(None) if slots is None else rows >= 0
    out = torch.zeros_like(v)
    gamma = torch.exp(log_decay.to(state.dtype)).expand(q.shape[:2])[real]
    after = gamma[..., None, None] * state[rows[real]]
    after = after + torch.einsum("bhk,bhv->bhkv", k[real].to(state.dtype), v[real].to(state.dtype))
    state[rows[real]] = after
    out[real] = (scale * torch.einsum("bhk,bhkv->bhv", q[real].to(state.dtype), after)).to(v.dtype)
    return out
