"""Gated retention, the successor whose decay depends on the token (Sun et al. 2024, "You Only Cache Once")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.mixers.base import PROJECTION_AXES, Mixer, MixerConfig, head_width, state_place
from retnet.nn import Linear, Positions, Rotary, Rotation, linear_of, widened
from retnet.ops import CHUNK, head_norm, retention, retention_step
from retnet.ops.dispatch import check_backend
from retnet.settings import At, Count, UserError


@dataclass(frozen=True)
class GatedRetentionConfig(MixerConfig):
    """As multi-scale retention, with γ_t = σ(x_t W_γ)^(1/τ) in place of a constant; τ is `temperature`."""

    name: Literal["gated_retention"] = "gated_retention"
    num_heads: Count = 4
    value_dim: Count | None = None  # per head; twice the width of the keys
    temperature: Annotated[float, At(above=0)] = 16.0
    rotary: Rotation = "interleaved"
    rotary_base: Annotated[float, At(above=0)] = 10000.0
    head_norm: Literal["group", "rms"] = "group"
    head_norm_eps: Annotated[float, At(least=0, most=1)] = 1e-6
    chunk_size: Count | None = None  # that of the op
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            check_backend(self.backend)
        except ValueError as error:
            raise UserError(str(error)) from None


class GatedRetentionState(NamedTuple):
    """What one layer remembers; constant in the number of tokens seen."""

    kv: Tensor  # [B,H,K,V], fp32 or fp64
    position: Tensor  # int64 [B], tokens seen so far


class GatedRetention(Mixer):
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
        self.rotary = Rotary(self.key_dim, config.rotary, config.rotary_base, backend=config.backend)

    def positions(
        self, x: Tensor, cu_seqlens: Tensor | None = None, state: GatedRetentionState | None = None
    ) -> Positions:
        """Those of queries and keys."""
        return self.rotary.positions(x, cu_seqlens, None if state is None else state.position)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> GatedRetentionState:
        """Zeros: nothing seen. fp32 unless `dtype` is fp64."""
        device, wide = state_place(self.q_proj.weight, device, dtype)
        kv = torch.zeros(batch, self.num_heads, self.key_dim, self.value_dim, device=device, dtype=wide)
        return GatedRetentionState(kv, torch.zeros(batch, dtype=torch.int64, device=device))

    def mixing_flops(self, length: int) -> int:
        """Chunkwise: scores and their sum inside a chunk of C tokens, and the state's update and reading."""
        K, V, C = self.key_dim, self.value_dim, min(self.config.chunk_size or CHUNK, length)
        return self.num_heads * (2 * C * (K + V) + 4 * K * V)

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, positions: Positions | None = None
    ) -> Tensor:
        """x [B,T,D] → [B,T,D], every sequence from its beginning."""
        heads = self._project(x, positions or self.positions(x, cu_seqlens))
        return self._finish(self._retention(*heads, None, cu_seqlens)[0], x)

    def prefill(
        self,
        x: Tensor,
        state: GatedRetentionState,
        *,
        cu_seqlens: Tensor | None = None,
        positions: Positions | None = None,
    ) -> tuple[Tensor, GatedRetentionState]:
        """x [B,T,D] from `state` → [B,T,D] and the state after it; with `cu_seqlens`, a row of the state a document."""
        heads = self._project(x, positions or self.positions(x, cu_seqlens, state))
        o, kv = self._retention(*heads, state.kv, cu_seqlens)
        seen = x.shape[1] if cu_seqlens is None else cu_seqlens.diff()
        return self._finish(o, x), GatedRetentionState(kv, state.position + seen)

    def step(
        self, x: Tensor, state: GatedRetentionState, *, positions: Positions | None = None
    ) -> tuple[Tensor, GatedRetentionState]:
        """x [B,D] from `state` → [B,D]; the state is updated in place."""
        heads = self._project(x, positions or self.positions(x, None, state))
        o = retention_step(*heads, state.kv, backend=self.config.backend)
        state.position.add_(1)
        return self._finish(o, x), state

    def _project(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys [...,H,K], rotated, values [...,H,V] and ln γ [...,H], fp32 or better, of x [...,D]."""
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        log_decay = F.logsigmoid(self.decay_proj(x).to(widened(x))) / self.config.temperature
        return *self.rotary(q, k, positions), v, log_decay

    def _retention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        kv: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        c = self.config
        return retention(q, k, v, log_decay, kv, cu_seqlens, chunk_size=c.chunk_size, backend=c.backend)

    def _finish(self, o: Tensor, x: Tensor) -> Tensor:
        """Normalises the heads o [...,H,V] of x [...,D], gates them and projects back to [...,D]."""
        c = self.config
        normed = partial(head_norm, norm=c.head_norm, eps=c.head_norm_eps, dtype=x.dtype, backend=c.backend)
        return linear_of(self.out_proj, normed, o, self.gate_proj(x), lead=x.dim() - 1)
