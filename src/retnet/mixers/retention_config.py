"""Configuration of multi-scale retention: the paper's choices, its ablations, and those of lightning attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Literal

import torch

from retnet.mixers.base import MixerConfig
from retnet.ops import Decay, log_decays
from retnet.ops.dispatch import check_backend
from retnet.settings import At, Count, UserError

DecayByLayer = Literal["alike", "lightning", "lightning-1"] | tuple[float, ...]


@dataclass(frozen=True)
class RetentionConfig(MixerConfig):
    """Multi-scale retention; the paper's ablations (§7) are its fields.

    `score_norm` is the paper's score normalisation (§2): ``"decay"`` divides each output row by s_t = √Σ_{i≤t} γ^{t−i}
    (factor 2), ``"paper"`` also by max(|Σ_i R_ti|, 1) (factor 3). Under a head norm both cancel up to its ε, and the
    default is ``"none"``; ``"decay"`` is then exactly a head norm with ε·s_t² in place of ε, which is what torchscale
    computes, but for a clamp. Without a head norm they change the function, so the choice must be written down.
    ``"torchscale"`` has the clamp too: rows of scores divided by √Σγ, then by clamp(Σ|R|, 1, 5·10⁴). A sum of absolute
    values has no recurrent form, so it runs whole sequences alone, in the parallel form.

    What others changed in retention, lightning attention first of all (MiniMax-01, arXiv 2501.08313; Ring-linear, arXiv
    2510.19338), are fields too. `decay_by_layer` multiplies ln γ of layer l of L, counted from 0: ``"lightning"`` by
    1 − l/(L−1) + 10⁻⁵, ``"lightning-1"`` by the same of l − 1, a list by one number a layer. `activation`, and then
    `qk_norm`, an RMSNorm of each head's queries and keys with weights that all heads share, come before the rotation, which
    turns the first `rotary_dim` numbers of a head. `head_norm_groups` is how many groups the heads are normalised in, 1
    being one norm over all of them; `head_norm_affine` gives the norm weights.
    """

    name: Literal["retention"] = "retention"
    num_heads: Count = 4
    key_dim: Count | None = None  # per head; d_model / num_heads
    value_dim: Count | None = None  # per head; twice key_dim
    decay: Decay = "paper"  # or "experiments", "alibi", "none", one γ, one γ a head
    decay_by_layer: DecayByLayer = "alike"
    scale: Annotated[float, At(above=0)] | None = None  # of query-key products; key_dim^(−1/2)
    activation: Literal["none", "silu"] = "none"  # of queries, keys and values
    qk_norm: bool = False
    qk_norm_eps: Annotated[float, At(least=0, most=1)] = 1e-6
    gate: bool = True
    gate_activation: Literal["swish", "sigmoid"] = "swish"
    head_norm: Literal["group", "rms", "none"] = "group"
    head_norm_affine: bool = False
    head_norm_eps: Annotated[float, At(least=0, most=1)] = 1e-6
    head_norm_groups: Count | None = None  # num_heads: every head by itself
    score_norm: Literal["none", "decay", "paper", "torchscale"] | None = None
    rotary: Literal["interleaved", "halves", "none"] = "interleaved"
    rotary_dim: Count | None = None  # numbers of a head that turn; key_dim
    rotary_spacing: Literal["inclusive", "geometric"] = "inclusive"
    rotary_base: Annotated[float, At(above=0)] = 10000.0
    form: Literal["auto", "parallel", "chunkwise", "recurrent"] = (
        "auto"  # auto: parallel where one chunk holds all
    )
    chunk_size: Count | None = None  # of the op's choice
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_norm == "none" and self.score_norm is None:
            raise UserError(
                "head_norm = 'none' leaves the outputs unnormalised, so score_norm must be chosen: "
                "'none', 'decay' (rows divided by √Σγ) or 'paper' (also by max(|Σ scores|, 1))"
            )
        if self.score_norm == "torchscale" and self.form not in ("auto", "parallel"):
            raise UserError(
                f"score_norm = 'torchscale' runs in the parallel form alone, not {self.form!r}; "
                "set form = 'parallel', or score_norm = 'decay', which runs in every form"
            )
        groups = self.head_norm_groups or self.num_heads
        if self.num_heads % groups:
            raise UserError(
                f"num_heads {self.num_heads} is not a multiple of head_norm_groups {groups}, which are equal; change one"
            )
        if groups < self.num_heads and self.head_norm == "none":
            raise UserError(f"head_norm_groups is {groups}, but head_norm = 'none' has none; change one")
        if self.score_norm not in (None, "none") and groups < self.num_heads:
            raise UserError(
                f"score_norm = {self.score_norm!r} is for heads that are normalised one by one; leave out "
                "head_norm_groups, or set score_norm = 'none'"
            )
        if self.score_norm == "torchscale" and self.scale is not None:
            raise UserError("score_norm = 'torchscale' has the scale key_dim^(−1/2) alone; leave out scale")
        try:
            check_backend(self.backend)
            log_decays(self.decay, self.num_heads)
        except ValueError as error:
            raise UserError(str(error)) from None

    def widths(self, d_model: int) -> tuple[int, int]:
        """(K, V) per head for a model of this width.

        Raises:
            UserError: the width does not divide by the heads and no `key_dim` is given, or a rotated K is odd.
        """
        if self.key_dim is None and d_model % self.num_heads:
            raise UserError(
                f"d_model {d_model} is not a multiple of num_heads {self.num_heads}; change one, or set key_dim"
            )
        key_dim = self.key_dim or d_model // self.num_heads
        if self.rotary != "none" and self.rotary_dim is None and key_dim % 2:
            raise UserError(
                f"key_dim {key_dim} is odd, and rotation turns pairs; make it even or set rotary = 'none'"
            )
        return key_dim, self.value_dim or 2 * key_dim

    def of_layer(self, layer: int, num_layers: int) -> RetentionConfig:
        """As of any mixer: `decay_by_layer` becomes one γ a head."""
        return self if self.decay_by_layer == "alike" else _of_layer(self, layer, num_layers)


@lru_cache(maxsize=1024)  # a model asks for all its layers several times
def _of_layer(config: RetentionConfig, layer: int, num_layers: int) -> RetentionConfig:
    by_layer, last = config.decay_by_layer, max(1, num_layers - 1)
    factor: float | str
    if by_layer == "lightning":
        factor = 1 - layer / last + 1e-5
    elif by_layer == "lightning-1":
        factor = 1 - (layer - 1) / last + 1e-5
    elif len(by_layer) != num_layers:
        raise UserError(
            f"decay_by_layer lists {len(by_layer)} numbers for {num_layers} layers; give one a layer"
        )
    else:
        factor = by_layer[layer]
    if not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
        raise UserError(
            f"decay_by_layer has {factor!r}, by which ln γ cannot be multiplied; give numbers from 0"
        )
    slowed = (factor * log_decays(config.decay, config.num_heads, torch.float64)).exp()
    return replace(config, decay=tuple(slowed.tolist()), decay_by_layer="alike")
