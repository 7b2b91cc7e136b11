"""Multi-scale retention, gated (paper §3): MSR(X) = (swish(X W_G) ⊙ GroupNorm_h(heads)) W_O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.mixers.base import PROJECTION_AXES, Mixer, state_place
from retnet.mixers.retention_config import RetentionConfig
from retnet.nn import Linear, Norm, Positions, Rotary, linear_of
from retnet.ops import (
    CHUNK,
    Remade,
    head_norm,
    log_decays,
    retention,
    retention_step,
)
from retnet.ops.clamped import clamped_retention
from retnet.ops.context_parallel import ContextParallel
from retnet.settings import UserError


class RetentionState(NamedTuple):
    """What one layer remembers; constant in the number of tokens seen."""

    kv: Tensor  # [B,H,K,V], fp32 or fp64 (V + 1 columns under score_norm "paper")
    position: Tensor  # int64 [B], tokens seen so far


class MultiScaleRetention(Mixer):
    """Retention with one γ a head, each head normalised by itself, gated (paper §3).

    Weights: q_proj, k_proj [H·K, D], v_proj, gate_proj [H·V, D], out_proj [D, H·V], head_norm [H·V] if affine, and q_norm,
    k_norm [K] where the configuration has them.
    γ and the angles are constants of the configuration: they keep their precision when the module's type changes.

    Attributes:
        keeps_heads: in training, keep the op's output for the backward pass (2·d_model numbers a token) instead of running
            the op's forward pass once more.
        context: where `forward` sees one stretch of sequences that are cut over processes, what it is; set from outside.
    """

    keeps_heads = False
    context: ContextParallel | None = None

    Config: ClassVar[type[RetentionConfig]] = RetentionConfig
    paper_row: ClassVar[str | None] = "RetNet"
    along_time: ClassVar[str] = "chunks"
    cuttable: ClassVar[bool] = True
    head_axes: ClassVar[Mapping[str, int]] = {
        **PROJECTION_AXES,
        "gate_proj.weight": 0,
        "head_norm_weight": 0,
        "head_norm_bias": 0,
    }
    shared_norms: ClassVar[tuple[str, ...]] = ("q_norm", "k_norm")

    log_decay: Tensor  # [H] fp32, fp64 beside fp64 weights

    def __init__(self, d_model: int, config: RetentionConfig) -> None:
        super().__init__(d_model, config)
        if config.decay_by_layer != "alike":
            raise UserError(
                "decay_by_layer says γ of a layer of a model; for a mixer alone take config.of_layer(layer, num_layers)"
            )
        self.config = config
        self.num_heads = config.num_heads
        self._heads = slice(None)  # those of the configuration's heads that are here
        self.norm_groups = config.head_norm_groups or config.num_heads
        self.key_dim, self.value_dim = config.widths(d_model)
        keys, values = self.num_heads * self.key_dim, self.num_heads * self.value_dim
        self.q_proj = Linear(d_model, keys)
        self.k_proj = Linear(d_model, keys)
        self.v_proj = Linear(d_model, values)
        self.gate_proj = Linear(d_model, values) if config.gate else None
        self.out_proj = Linear(values, d_model)
        affine = config.head_norm_affine and config.head_norm != "none"
        self.head_norm_weight = nn.Parameter(torch.ones(values)) if affine else None
        self.head_norm_bias = (
            nn.Parameter(torch.zeros(values)) if affine and config.head_norm == "group" else None
        )
        normed = config.qk_norm
        self.q_norm = Norm(self.key_dim, "rmsnorm", config.qk_norm_eps) if normed else None
        self.k_norm = Norm(self.key_dim, "rmsnorm", config.qk_norm_eps) if normed else None
        self.rotary = Rotary(
            self.key_dim,
            config.rotary,
            config.rotary_base,
            config.rotary_spacing,
            config.backend,
            config.rotary_dim,
        )
        self._set_decay(self.q_proj.weight.device)

    def _set_decay(self, device: torch.device) -> None:
        wide = torch.promote_types(self.q_proj.weight.dtype, torch.float32)
        log_decay = log_decays(self.config.decay, self.config.num_heads, wide)[self._heads].to(device)
        self.register_buffer("log_decay", log_decay, persistent=False)

    def keep_heads(self, begin: int, end: int) -> None:
        """As of any mixer; every head keeps its γ. Heads that are normalised together must stay together."""
        self.norm_groups = self.norm_groups * (end - begin) // self.num_heads
        super().keep_heads(begin, end)
        self._heads = slice(begin, end)
        self._set_decay(self.q_proj.weight.device)

    @property
    def theta(self) -> Tensor:
        """Angles of the rotation in radians a token, [K/2] fp64."""
        return self.rotary.theta

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiScaleRetention:
        """Moves like any module, but `.to(bfloat16)` must not round γ to 1, nor leave meta tensors uncomputed."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
        self._set_decay(self.q_proj.weight.device)
        return self

    def positions(
        self, x: Tensor, cu_seqlens: Tensor | None = None, state: RetentionState | None = None
    ) -> Positions:
        """Those of queries and keys."""
        start = None if state is None else state.position
        if state is None and self.context is not None:
            start = self.context.positions(x.device)
        return self.rotary.positions(x, cu_seqlens, start)

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, positions: Positions | None = None
    ) -> Tensor:
        """x [B,T,D] → [B,T,D], every sequence from its beginning."""
        positions = positions or self.positions(x, cu_seqlens)
        if self.config.score_norm == "torchscale":
            if self.context is not None:
                raise UserError(
                    "score_norm = 'torchscale' needs whole sequences, which cannot be cut over ranks; use another"
                )
            o = clamped_retention(*self._project(x, positions), self.log_decay, cu_seqlens)
            return self._finish(o, self._gate(x), x, positions)
        q, k, v = self._project(x, positions)
        entering = None if self.context is None else self.context.begin(k, v, self.log_decay)
        gate = self._gate(x)  # while states travel
        kv = None if entering is None else entering()
        if self.keeps_heads:
            o = self._retain(q, k, v, self.log_decay, kv, cu_seqlens=cu_seqlens)
            return self._finish(o, gate, x, positions)
        retain = partial(self._retain, cu_seqlens=cu_seqlens)
        return self._finish(Remade(retain, (q, k, v, self.log_decay, kv)), gate, x, positions)

    def prefill(
        self,
        x: Tensor,
        state: RetentionState,
        *,
        cu_seqlens: Tensor | None = None,
        positions: Positions | None = None,
    ) -> tuple[Tensor, RetentionState]:
        """x [B,T,D] from `state` → [B,T,D] and the state after it; with `cu_seqlens`, a row of the state a document."""
        self._refuse_if_stateless()
        positions = positions or self.positions(x, cu_seqlens, state)
        o, kv = self._retention(*self._project(x, positions), self.log_decay, state.kv, cu_seqlens)
        seen = x.shape[1] if cu_seqlens is None else cu_seqlens.diff()
        return self._finish(o, self._gate(x), x, positions), RetentionState(kv, state.position + seen)

    def step(
        self,
        x: Tensor,
        state: RetentionState,
        *,
        positions: Positions | None = None,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, RetentionState]:
        """x [B,D] from `state` → [B,D]; the state is updated in place.

        With `slots` [B], `state.kv` is a pool [N,H,K,V], and these are its rows; `state.position` is [B] all the same.
        """
        self._refuse_if_stateless()
        positions = positions or self.positions(x, None, state)
        q, k, v = self._project(x, positions)
        config = self.config
        o = retention_step(
            q, k, v, self.log_decay, state.kv, slots, scale=config.scale, backend=config.backend
        )
        y = self._finish(o, self._gate(x), x, positions)
        state.position.add_(1)
        return y, state

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RetentionState:
        """Zeros: nothing seen. On the module's own device by default, fp32 unless `dtype` is fp64.

        Raises:
            UserError: `score_norm` is "torchscale", which no state can carry.
        """
        weight = self.q_proj.weight
        if not weight.is_meta:  # there nothing is computed: somebody counts bytes
            self._refuse_if_stateless()
        device, wide = state_place(weight, device, dtype)
        values = self.value_dim + (self.config.score_norm == "paper")
        kv = torch.zeros(batch, self.num_heads, self.key_dim, values, device=device, dtype=wide)
        return RetentionState(kv, torch.zeros(batch, dtype=torch.int64, device=device))

    def _refuse_if_stateless(self) -> None:
        if self.config.score_norm == "torchscale":
            raise UserError(
                "score_norm = 'torchscale' clamps sums over whole rows of scores, which no state can carry, so it "
                "computes whole sequences alone; set score_norm = 'decay' to generate or to read in pieces"
            )

    def mixing_flops(self, length: int) -> int:
        """Chunkwise: scores and their sum inside a chunk of C tokens, and the state's update and reading."""
        K, V, C = self.key_dim, self.value_dim, min(self.config.chunk_size or CHUNK, length)
        return self.num_heads * (2 * C * (K + V) + 4 * K * V)

    def _retain(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        kv: Tensor | None,
        *,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        return self._retention(q, k, v, log_decay, kv, cu_seqlens)[0]

    def _retention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        kv: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The op as the configuration says: heads [B,T,H,V], and the state after them."""
        config = self.config
        form = config.form
        if form == "auto":
            form = "parallel" if q.shape[1] <= (config.chunk_size or CHUNK) else "chunkwise"
        return retention(
            q,
            k,
            v,
            log_decay,
            kv,
            cu_seqlens,
            scale=config.scale,
            form=form,
            chunk_size=config.chunk_size,
            backend=config.backend,
        )

    def _project(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys [...,H,K], rotated, and values [...,H,V] of x [...,D]."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.config.activation == "silu":
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotary(q, k, positions)
        if self.config.score_norm == "paper":  # a value of 1 sums the scores of a row
            v = F.pad(v, (0, 1), value=1.0)
        return q, k, v

    def _gate(self, x: Tensor) -> Tensor | None:
        return None if self.gate_proj is None else self.gate_proj(x)

    def _finish(self, o: Tensor | Remade, gate: Tensor | None, x: Tensor, positions: Positions) -> Tensor:
        """Normalises the heads o [...,H,V] of x [...,D], gates them and projects back to [...,D]."""
        position = None
        if self.config.score_norm in ("decay", "paper"):
            position = positions.position.expand(x.shape[:-1])
        return linear_of(
            self.out_proj,
            partial(self._normed, dtype=x.dtype),
            *(o, gate, position),
            shared=(self.log_decay, self.head_norm_weight, self.head_norm_bias),
            lead=x.dim() - 1,
        )

    def _normed(
        self,
        o: Tensor,
        gate: Tensor | None,
        position: Tensor | None,
        log_decay: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
    ) -> Tensor:
        """Heads [...,H,V] with their scores normalised, then themselves, and gated: [...,H·V]."""
        config = self.config
        sums = None
        if position is not None:
            o, sums = self._norm_scores(o, position, log_decay)
        swish = config.gate_activation == "swish"
        y = head_norm(
            o.unflatten(-2, (self.norm_groups, -1)).flatten(-2) if self.norm_groups < self.num_heads else o,
            gate if swish else None,
            config.head_norm,
            eps=config.head_norm_eps,
            weight=weight,
            bias=bias,
            sums=sums,
            dtype=dtype,
            backend=config.backend,
        )
        return y if swish or gate is None else (torch.sigmoid(gate) * y).to(gate.dtype)

    def _norm_scores(self, o: Tensor, position: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor | None]:
        """The heads with their scores normalised, but for the sums Σγ [...,H] that `head_norm` divides them by."""
        seen = (position[..., None] + 1).double()  # tokens up to and including this one
        log_decay = log_decay.double()
        # Σ_{i≤t} γ^{t−i} = (1 − γ^{t+1}) / (1 − γ), and t + 1 where γ = 1
        sums = torch.where(log_decay == 0, seen, torch.expm1(seen * log_decay) / torch.expm1(log_decay))
        if self.config.score_norm == "decay":
            return o, sums
        o = o.to(torch.promote_types(o.dtype, torch.float32))
        o = o * sums.rsqrt().to(o.dtype)[..., None]
        return o[..., :-1] / o[..., -1:].abs().clamp(min=1), None
