"""Linear attention: positive features in place of softmax (Katharopoulos et al. 2020, "Transformers are RNNs")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from retnet.mixers.base import PROJECTION_AXES, Mixer, MixerConfig, head_width, state_place
from retnet.nn import Linear, Positions, Rotary, Rotation, widened
from retnet.ops import CHUNK, retention, retention_step
from retnet.settings import At, Count


@dataclass(frozen=True)
class LinearConfig(MixerConfig):
    """Linear attention with φ(x) = elu(x) + 1 and its normaliser.

    The shared embedding knows no positions, so they enter here, as rotations of the features in the numerator alone
    (Su et al. 2021, RoFormer, eq. 19), which leaves the normaliser positive; ``rotary = "none"`` is the bare formula.
    """

    name: Literal["linear"] = "linear"
    num_heads: Count = 4
    rotary: Rotation = "halves"
    rotary_base: Annotated[float, At(above=0)] = 10000.0
    eps: Annotated[float, At(above=0, most=1)] = 1e-6  # added to the normaliser


class LinearState(NamedTuple):
    """Two sums over all tokens; constant in their number."""

    kv: Tensor  # Σ φ(k)ᵀ v, [B,H,K,K], fp32 or fp64
    normaliser: Tensor  # Σ φ(k), [B,H,K]
    position: Tensor  # int64 [B], tokens seen so far


class LinearAttention(Mixer):
    """o_t = φ(q_t) Σ_{s≤t} φ(k_s)ᵀ v_s / (φ(q_t) · Σ_{s≤t} φ(k_s) + ε) for each head (eq. 9 to 12).

    Both sums are retention without decay. Weights: q_proj, k_proj, v_proj, out_proj [D,D].
    """

    Config: ClassVar[type[LinearConfig]] = LinearConfig
    paper_row: ClassVar[str | None] = "Linear Transformer"
    along_time: ClassVar[str] = "chunks"
    head_axes: ClassVar[Mapping[str, int]] = PROJECTION_AXES

    def __init__(self, d_model: int, config: LinearConfig) -> None:
        super().__init__(d_model, config)
        self.config = config
        self.num_heads = config.num_heads
        self.key_dim = head_width(d_model, config.num_heads)
        self.q_proj = Linear(d_model, d_model)
        self.k_proj = Linear(d_model, d_model)
        self.v_proj = Linear(d_model, d_model)
        self.out_proj = Linear(d_model, d_model)
        self.rotary = Rotary(self.key_dim, config.rotary, config.rotary_base)

    def positions(
        self, x: Tensor, cu_seqlens: Tensor | None = None, state: LinearState | None = None
    ) -> Positions:
        """Those of queries and keys."""
        return self.rotary.positions(x, cu_seqlens, None if state is None else state.position)

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, positions: Positions | None = None
    ) -> Tensor:
        """x [B,T,D] → [B,T,D], every sequence from its beginning."""
        rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        state = self.init_state(rows, device=x.device, dtype=x.dtype)
        positions = positions or self.positions(x, cu_seqlens)
        return self.prefill(x, state, cu_seqlens=cu_seqlens, positions=positions)[0]

    def prefill(
        self,
        x: Tensor,
        state: LinearState,
        *,
        cu_seqlens: Tensor | None = None,
        positions: Positions | None = None,
    ) -> tuple[Tensor, LinearState]:
        """x [B,T,D] from `state` → [B,T,D] and the state after it; with `cu_seqlens`, a row of the state a document."""
        positions = positions or self.positions(x, cu_seqlens, state)
        q, k, turned_q, turned_k, v = self._project(x, positions)
        no_decay = torch.zeros(self.num_heads, device=x.device)
        sums, kv = retention(turned_q, turned_k, v, no_decay, state.kv, cu_seqlens, scale=1.0)
        ones = torch.ones_like(v[..., :1])
        total, normaliser = retention(
            q, k, ones, no_decay, state.normaliser[..., None], cu_seqlens, scale=1.0
        )
        seen = x.shape[1] if cu_seqlens is None else cu_seqlens.diff()
        after = LinearState(kv, normaliser[..., 0], state.position + seen)
        return self._finish(sums, total, x.dtype), after

    def step(
        self, x: Tensor, state: LinearState, *, positions: Positions | None = None
    ) -> tuple[Tensor, LinearState]:
        """x [B,D] from `state` → [B,D] and the state after it, in part updated in place."""
        positions = positions or self.positions(x, None, state)
        q, k, turned_q, turned_k, v = self._project(x, positions)
        no_decay = torch.zeros(self.num_heads, device=x.device)
        sums = retention_step(turned_q, turned_k, v, no_decay, state.kv, scale=1.0)
        normaliser = state.normaliser + k  # not in place: autograd keeps it
        total = (q * normaliser).sum(-1, keepdim=True)
        state.position.add_(1)
        return self._finish(sums, total, x.dtype), state._replace(normaliser=normaliser)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LinearState:
        """Zeros: nothing seen. fp32 unless `dtype` is fp64."""
        device, wide = state_place(self.q_proj.weight, device, dtype)
        H, K = self.num_heads, self.key_dim
        kv = torch.zeros(batch, H, K, K, device=device, dtype=wide)
        normaliser = torch.zeros(batch, H, K, device=device, dtype=wide)
        return LinearState(kv, normaliser, torch.zeros(batch, dtype=torch.int64, device=device))

    def mixing_flops(self, length: int) -> int:
        """Two chunkwise sums: of values, K wide, and of ones."""
        K, C = self.key_dim, min(CHUNK, length)
        return self.num_heads * sum(2 * C * (K + V) + 4 * K * V for V in (K, 1))

    def _project(self, x: Tensor, positions: Positions) -> tuple[Tensor, ...]:
        """φ(q), φ(k), both rotated, and v, each [...,H,K], in fp32 or better, of x [...,D]."""
        wide, heads = widened(x), (self.num_heads, self.key_dim)
        q, k, v = (proj(x).to(wide).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = features(q), features(k)
        return q, k, *self.rotary(q, k, positions), v

    def _finish(self, sums: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
        return self.out_proj((sums / (total + self.config.eps)).flatten(-2).to(dtype))


def features(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1, written so that the exponential of a very negative x is not lost beside the 1."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
