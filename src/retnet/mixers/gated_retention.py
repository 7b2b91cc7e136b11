"""Gated retention, the successor whose decay depends on the token (Sun et al. 2024, "You Only Cache Once")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.mixers.base import PROJECTION_AXES, MixerConfig, head_width
from retnet.mixers.packing import SequenceMixer, batch_positions
from retnet.nn import Linear, Positions, Rotary, Rotation, exactly, widened
from retnet.ops import head_norm
from retnet.settings import At, Count

PIECE = 2048  # tokens whose chunks' states are held at once


@dataclass(frozen=True)
class GatedRetentionConfig(MixerConfig):
    """As multi-scale retention, with γ_t = σ(x_t W_γ)^(1/τ) in place of a constant; τ is `temperature`."""

    name: Literal["gated_retention"] = "gated_retention"
    num_heads: Count = 4
    value_dim: Count | None = None  # per head; twice the width of the keys
    temperature: Annotated[float, At(above=0)] = 16.0
    rotary: Rotation = "interleaved"
    rotary_base: Annotated[float, At(above=0)] = 10000.0
    head_norm_eps: Annotated[float, At(least=0, most=1)] = 1e-6
    chunk_size: Count = 64


class GatedRetentionState(NamedTuple):
    """What one layer remembers; constant in the number of tokens seen."""

    kv: Tensor  # [B,H,K,V], fp32 or fp64
    position: Tensor  # int64 [B], tokens seen so far


class GatedRetention(SequenceMixer):
    """S_t = γ_t S_{t−1} + k_tᵀ v_t, o_t = q_t S_t / √K for each head; heads normalised, gated by swish, projected.

    Weights: q_proj, k_proj [D,D], v_proj, gate_proj [H·V,D], out_proj [D,H·V], decay_proj [H,D].
    """

    Config: ClassVar[type[GatedRetentionConfig]] = GatedRetentionConfig
    along_time: ClassVar[str] = "chunks"
    head_axes: ClassVar[Mapping[str, int]] = {
        **PROJECTION_AXES,
        "gate_proj.weight": 0,
        "decay_proj.weight": 0,
    }

    def __init__(self, d_model: int, config: GatedRetentionConfig) -> None:
        super().__init__(d_model, config)
        self.config = config
        self.num_heads = config.num_heads
        self.key_dim = head_width(d_model, config.num_heads)
        self.value_dim = config.value_dim or 2 * self.key_dim
        values = self.num_heads * self.value_dim
        self.q_proj = Linear(d_model, d_model)
        self.k_proj = Linear(d_model, d_model)
        self.v_proj = Linear(d_model, values)
        self.gate_proj = Linear(d_model, values)
        self.decay_proj = Linear(d_model, self.num_heads)
        self.out_proj = Linear(values, d_model)
        self.rotary = Rotary(self.key_dim, config.rotary, config.rotary_base)

    def positions(
        self, x: Tensor, cu_seqlens: Tensor | None = None, state: GatedRetentionState | None = None
    ) -> Positions | None:
        """Those of queries and keys."""
        return batch_positions(self.rotary, x, cu_seqlens, None if state is None else state.position)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GatedRetentionState:
        """Zeros: nothing seen. fp32 unless `dtype` is fp64."""
        weight = self.q_proj.weight
        device = weight.device if device is None else device
        wide = torch.promote_types(dtype or weight.dtype, torch.float32)
        kv = torch.zeros(batch, self.num_heads, self.key_dim, self.value_dim, device=device, dtype=wide)
        return GatedRetentionState(kv, torch.zeros(batch, dtype=torch.int64, device=device))

    def mixing_flops(self, length: int) -> int:
        """Chunkwise: scores and their sum inside a chunk of C tokens, and the state's update and reading."""
        K, V, C = self.key_dim, self.value_dim, min(self.config.chunk_size, length)
        return self.num_heads * (2 * C * (K + V) + 4 * K * V)

    def _whole(self, x: Tensor, *, positions: Positions | None = None) -> Tensor:
        return self._extend(x, self.init_state(len(x), device=x.device, dtype=x.dtype), positions=positions)[
            0
        ]

    def _extend(
        self, x: Tensor, state: GatedRetentionState, *, positions: Positions | None = None
    ) -> tuple[Tensor, GatedRetentionState]:
        wide, kv, outputs = widened(x), state.kv, []
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.rotary(q, k, positions or self.rotary.positions(x, None, state.position))
        log_decay = F.logsigmoid(self.decay_proj(x).to(wide)) / self.config.temperature
        q = q.to(wide) * self.key_dim**-0.5
        with exactly(x):  # states and decays stay fp32
            pieces = (y.to(wide).split(PIECE, dim=1) for y in (q, k, v, log_decay))
            for q_i, k_i, v_i, log_decay_i in zip(*pieces, strict=True):
                o, kv = chunkwise(q_i, k_i, v_i, log_decay_i, kv, self.config.chunk_size)
                outputs.append(o)
        o, gate = torch.cat(outputs, dim=1), self.gate_proj(x)
        y = head_norm(o, gate, eps=self.config.head_norm_eps, dtype=x.dtype)
        return self.out_proj(y), GatedRetentionState(kv, state.position + x.shape[1])


def chunkwise(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """o_n = q_n S_n with S_n = γ_n S_{n−1} + k_nᵀ v_n, parallel inside chunks, recurrent from chunk to chunk.

    With a_j = Σ_{i≤j} ln γ_i inside a chunk that starts from S:

        o_j = Σ_{i≤j} e^{a_j − a_i} (q_j · k_i) v_i + e^{a_j} q_j S        S' = e^{a_C} S + Σ_i e^{a_C − a_i} k_iᵀ v_i

    No exponent is ever positive, so nothing overflows however fast a head forgets.

    Args:
        q: [B,T,H,K], T ≥ 1; fp32 or fp64, like all others.
        k: [B,T,H,K].
        v: [B,T,H,V].
        log_decay: ln γ of each token and head, [B,T,H] ≤ 0.
        state: [B,H,K,V].
        chunk_size: C.

    Returns:
        [B,T,H,V], and the state after the last token.
    """
    T = q.shape[1]
    C = min(chunk_size, T)
    fill = -T % C  # with tokens that add nothing and forget nothing
    q, k, v = (F.pad(y, (0, 0, 0, 0, 0, fill)).unflatten(1, (-1, C)).transpose(2, 3) for y in (q, k, v))
    a = F.pad(log_decay, (0, 0, 0, fill)).unflatten(1, (-1, C)).transpose(2, 3).cumsum(-1)  # [B,n,H,C]
    later = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1)
    decay = (a[..., :, None] - a[..., None, :]).masked_fill(later, -torch.inf).exp()  # [B,n,H,C,C]
    inside = (q @ k.mT * decay) @ v
    added = (k * (a[..., -1:] - a).exp()[..., None]).mT @ v  # [B,n,H,K,V]
    kept = a[..., -1].exp()[..., None, None]
    entering = []
    for add, keep in zip(added.unbind(1), kept.unbind(1), strict=True):
        entering.append(state)
        state = keep * state + add
    across = (q * a.exp()[..., None]) @ torch.stack(entering, dim=1)
    return (inside + across).transpose(2, 3).flatten(1, 2)[:, :T], state
