"""Arguments of retention as one record: what all forms, backends and passes take, once they have been checked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RetentionInputs(NamedTuple):
    """One call of retention; types and shapes as in `retnet.ops.retention`."""

    q: Tensor  # [B,T,H,K]
    k: Tensor  # [B,T,H,K]
    v: Tensor  # [B,T,H,V]
    log_decay: Tensor  # [H], or by token [B,T,H]
    state: Tensor | None  # [B,H,K,V], or [N,H,K,V] if packed; None: zeros
    cu_seqlens: Tensor | None  # [N+1], bounds of packed documents
    scale: float  # of the query-key products

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return self.q.device

    @property
    def gated(self) -> bool:
        """Whether every token has a decay of its own."""
        return self.log_decay.dim() == 3

    @property
    def sequences(self) -> int:
        """N documents of a packed row, or B rows."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def fresh_state(self) -> Tensor:
        """The state to start from, fp32 or fp64, in memory of its own that may be changed: [N,H,K,V]."""
        if self.state is not None:
            return self.state.clone(memory_format=torch.contiguous_format)
        wide = torch.promote_types(self.q.dtype, torch.float32)
        return self.q.new_zeros(self.sequences, *self.q.shape[2:], self.v.shape[3], dtype=wide)
