"""Retention with torchscale's two score normalisations, in the one form in which both exist: the parallel one."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from retnet.ops.reference import decay_mask


def clamped_retention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """(R / clamp(Σ|R|, 1, 5·10⁴)) V with R = K^(−1/2) Q Kᵀ ⊙ D and rows of D divided by √Σ_m D_nm.

    Paper §2 has max(|Σ R|, 1) for the clamp; this is the reference code's, Σ over a row of absolute values, whose gradient
    is not taken there either. Time and memory grow with T²; nothing of it has a recurrent form.

    Args:
        q: queries [B,T,H,K].
        k: keys [B,T,H,K].
        v: values [B,T,H,V].
        log_decay: ln γ of each head, [H].
        cu_seqlens: [N+1] bounds of packed documents (B = 1), which do not see each other.

    Returns:
        [B,T,H,V] in the type of v; the arithmetic is at least fp32.
    """
    if cu_seqlens is not None:
        pieces = [slice(*ends) for ends in itertools.pairwise(cu_seqlens.tolist())]
        outputs = [clamped_retention(q[:, i], k[:, i], v[:, i], log_decay) for i in pieces]
        return torch.cat(outputs, dim=1) if outputs else v
    wide = torch.promote_types(v.dtype, torch.float32)
    mask = decay_mask(log_decay.to(wide), q.shape[1])
    mask = mask / mask.sum(-1, keepdim=True).sqrt()
    scores = torch.einsum("bnhk,bmhk->bhnm", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5 * mask
    scores = scores / scores.detach().abs().sum(-1, keepdim=True).clamp(1, 5e4)
    return torch.einsum("bhnm,bmhv->bnhv", scores, v.to(wide)).to(v.dtype)
