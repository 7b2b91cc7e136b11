"""Causal softmax attention with rotary positions and a KV cache: the Transformer's mixer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from retnet.mixers.base import PROJECTION_AXES, MixerConfig, TrainingForm, head_width
from retnet.mixers.cache import Cache, append
from retnet.mixers.packing import SequenceMixer, batch_positions
from retnet.nn import Linear, Norm, Positions, Rotary, Rotation, needs_formula, once_differentiable
from retnet.settings import At, Count, UserError

QUERIES = (
    512  # tokens read at once from a cache: a mask of them against all keys is the largest thing there is
)


@dataclass(frozen=True)
class SoftmaxConfig(MixerConfig):
    """Multi-head attention as in Llama: rotary positions; by default as many heads of keys as of queries, and no biases.

    `kv_heads`, `key_dim`, `bias` and `qk_norm` are what Llama, Mistral and Qwen have beside that, `rotary_dim`, the first
    numbers of a head, which alone turn, what MiniMax and Ring have. `sdpa` is how whole sequences are computed:
    ``"math"`` is the plain formula, which holds a matrix of T × T scores, ``"flash"`` FlashAttention, which does not (on a
    CPU torch's own; on a GPU it needs half types), ``"auto"`` torch's choice.
    Derivatives of derivatives, and those of `torch.func`, want ``"math"``; ``"auto"`` takes it for the latter.
    """

    name: Literal["softmax"] = "softmax"
    num_heads: Count = 4
    kv_heads: Count | None = None  # of keys and values, each for a group of query heads (GQA); num_heads
    key_dim: Count | None = None  # per head; d_model / num_heads
    bias: bool = False  # of queries, keys and values, as Qwen2 has them
    qk_norm: bool = False  # RMSNorm of each head's queries and keys before they turn, as Qwen3 has it
    qk_norm_eps: Annotated[float, At(least=0, most=1)] = 1e-6
    rotary: Rotation = "halves"
    rotary_dim: Count | None = None  # numbers of a head that turn; key_dim
    rotary_base: Annotated[float, At(above=0)] = 10000.0
    sdpa: Literal["auto", "math", "flash"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % (self.kv_heads or 1):
            raise UserError(
                f"num_heads {self.num_heads} is not a multiple of kv_heads {self.kv_heads}, whose keys are shared by equal "
                "groups; change one"
            )


class SoftmaxState(NamedTuple):
    """The KV cache; it grows with every token. Places from a row's length on are room to grow into."""

    keys: Cache  # [B,S,G,K] of G = kv_heads, in the type of the computation: nothing accumulates in it
    values: Cache  # [B,S,G,K]
    length: Tensor  # int64 [B], tokens seen so far


class SoftmaxAttention(SequenceMixer):
    """softmax(Q Kᵀ / √K + causal mask) V for each head (Vaswani et al. 2017), Q and K rotated (Su et al. 2021).

    Heads of keys and values may be fewer than those of queries, each shared by a group of them (Ainslie et al. 2023).

    Weights: q_proj [H·K,D], k_proj, v_proj [G·K,D], out_proj [D,H·K]; where the configuration has them, biases q_bias [H·K],
    k_bias, v_bias [G·K], and q_norm, k_norm [K].
    """

    Config: ClassVar[type[SoftmaxConfig]] = SoftmaxConfig
    caches: ClassVar[tuple[str, ...]] = ("keys", "values")
    paper_row: ClassVar[str | None] = "Transformer"
    along_time: ClassVar[str] = "all tokens at once"
    head_axes: ClassVar[Mapping[str, int]] = {**PROJECTION_AXES, "q_bias": 0, "k_bias": 0, "v_bias": 0}
    shared_norms: ClassVar[tuple[str, ...]] = ("q_norm", "k_norm")
    training_forms: ClassVar[tuple[TrainingForm, ...]] = (
        TrainingForm("math", {"sdpa": "math"}),
        TrainingForm("flash", {"sdpa": "flash"}, memory="N"),
    )

    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None

    def __init__(self, d_model: int, config: SoftmaxConfig) -> None:
        super().__init__(d_model, config)
        self.config = config
        self.num_heads = config.num_heads
        self.group = config.num_heads // (config.kv_heads or config.num_heads)  # of queries that share keys
        self.key_dim = config.key_dim or head_width(d_model, config.num_heads)
        queries = self.num_heads * self.key_dim
        keys = queries // self.group
        self.q_proj = Linear(d_model, queries)
        self.k_proj = Linear(d_model, keys)
        self.v_proj = Linear(d_model, keys)
        self.out_proj = Linear(queries, d_model)
        for name, width in (("q_bias", queries), ("k_bias", keys), ("v_bias", keys)):
            self.register_parameter(name, nn.Parameter(torch.zeros(width)) if config.bias else None)
        normed = config.qk_norm
        self.q_norm = Norm(self.key_dim, "rmsnorm", config.qk_norm_eps) if normed else None
        self.k_norm = Norm(self.key_dim, "rmsnorm", config.qk_norm_eps) if normed else None
        self.rotary = Rotary(self.key_dim, config.rotary, config.rotary_base, turned=config.rotary_dim)

    def positions(
        self, x: Tensor, cu_seqlens: Tensor | None = None, state: SoftmaxState | None = None
    ) -> Positions | None:
        """Those of queries and keys."""
        return batch_positions(self.rotary, x, cu_seqlens, None if state is None else state.length)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> SoftmaxState:
        """An empty cache, in `dtype`."""
        weight = self.q_proj.weight
        device = weight.device if device is None else device
        empty = torch.zeros(
            batch, 0, self.num_heads // self.group, self.key_dim, device=device, dtype=dtype or weight.dtype
        )
        return SoftmaxState(empty, empty.clone(), torch.zeros(batch, dtype=torch.int64, device=device))

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        """Keys and values of all tokens, and the length."""
        width = self.num_heads // self.group * self.key_dim
        return 2 * length * width * (dtype or self.q_proj.weight.dtype).itemsize + 8

    def mixing_flops(self, length: int) -> int:
        """Scores and their weighted sum over half the length, which is what a token sees on average."""
        return 2 * self.num_heads * self.key_dim * (length + 1)

    def _whole(self, x: Tensor, *, positions: Positions | None = None) -> Tensor:
        q, k, v = self.project(x, positions or self.rotary.positions(x))
        return self._finish(self._causal(q, k, v))

    def _extend(
        self, x: Tensor, state: SoftmaxState, *, positions: Positions | None = None
    ) -> tuple[Tensor, SoftmaxState]:
        T, dtype, lengths = x.shape[1], state.keys[0].dtype, state.length.tolist()
        positions = positions or self.rotary.positions(x, None, state.length)
        q, k, v = (y.to(dtype) for y in self.project(x, positions))
        keys, values = append(state.keys, state.length, k), append(state.values, state.length, v)
        if isinstance(keys, Tensor) and isinstance(values, Tensor):
            seen = (keys, values) if any(lengths) else (k, v)
            o = self._see(q, *seen, positions.position, lengths)
        else:  # where they lie, and with nothing of the size of the longest
            rows = zip(q.split(1), keys, values, positions.position.split(1), lengths, strict=True)
            o = torch.cat([self._see(q, k[None], v[None], at, [length]) for q, k, v, at, length in rows])
        return self._finish(o.to(x.dtype)), SoftmaxState(keys, values, state.length + T)

    def _see(
        self, q: Tensor, keys: Tensor, values: Tensor, position: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        """q [B,T,H,K] on a cache [B,S,G,K] that has so many tokens before them in each row, and then them."""
        T, longest = q.shape[1], max(lengths)
        keys, values = keys[:, : longest + T], values[:, : longest + T]
        if not longest:
            return self._causal(q, keys, values)
        masked = T > 1 or min(lengths) < longest
        sdpa = "math" if _chosen(self.config.sdpa) == "math" else "auto"  # flash on a GPU takes no mask
        return _attend(q, keys, values, position, masked=masked, sdpa=sdpa)

    def project(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B,T,H,K], keys and values [B,T,G,K] of x [B,T,D]."""
        projected = [proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        if self.q_bias is not None:
            biases = (self.q_bias, self.k_bias, self.v_bias)
            projected = [y + bias for y, bias in zip(projected, biases, strict=True)]
        q, k, v = (y.unflatten(-1, (-1, self.key_dim)) for y in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.group > 1:  # the operator turns as many keys as queries
            k = k.repeat_interleave(self.group, dim=-2)
        q, k = self.rotary(q, k, positions)
        return q, k[..., :: self.group, :], v

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Sequences from their beginning, by the chosen backend: q [B,T,H,K], k, v [B,T,G,K] → [B,T,H,K]."""
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        try:
            return _attention(q, k, v, _chosen(self.config.sdpa), is_causal=True).transpose(1, 2)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            raise UserError(
                f"sdpa = 'flash' has no kernel for {q.dtype} of head width {self.key_dim} on {q.device}; "
                "use 'auto' or 'math' (on a GPU: train.precision = 'bf16')"
            ) from None

    def _finish(self, o: Tensor) -> Tensor:
        return self.out_proj(o.flatten(-2))


def _chosen(sdpa: str) -> str:
    """The backend of the configuration, or the one that has the derivatives that are wanted."""
    if not needs_formula():
        return sdpa
    if sdpa == "flash":
        raise NotImplementedError(
            "sdpa = 'flash' has neither forward-mode derivatives nor those of torch.func; use sdpa = 'auto' or 'math'"
        )
    return "math"


def _attention(q: Tensor, k: Tensor, v: Tensor, sdpa: str, **settings: Any) -> Tensor:  # noqa: ANN401
    """q [B,H,T,K] on keys and values [B,G,S,K], each of which a group of H / G heads of q reads → [B,H,T,K]."""
    if (group := q.shape[1] // k.shape[1]) > 1:
        k, v = (y.repeat_interleave(group, dim=1) for y in (k, v))
    with _backend(sdpa):
        o = F.scaled_dot_product_attention(q, k, v, **settings)
    if torch.compiler.is_compiling():  # reading grad_fn would break the graph
        return o
    if o.grad_fn is None or not o.grad_fn.name().startswith("ScaledDotProduct"):  # the formula
        return o
    return once_differentiable(
        o, f"sdpa = {sdpa!r} has no second derivative on {q.device}; use sdpa = 'math'"
    )


def _backend(name: str) -> AbstractContextManager[None]:
    if name == "auto":
        return nullcontext()
    return sdpa_kernel({"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}[name])


def _attend(q: Tensor, keys: Tensor, values: Tensor, position: Tensor, *, masked: bool, sdpa: str) -> Tensor:
    """q [B,T,H,K] at `position` [B,T] on keys and values [B,S,G,K], of which each sees those up to its own place."""
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if not masked:
        return _attention(q.transpose(1, 2), keys, values, sdpa).transpose(1, 2)
    place, outputs = torch.arange(keys.shape[2], device=q.device), []
    for part, at in zip(q.split(QUERIES, dim=1), position.split(QUERIES, dim=1), strict=True):
        mask = (place <= at[..., None])[:, None]  # [B,1,t,S]
        outputs.append(_attention(part.transpose(1, 2), keys, values, sdpa, attn_mask=mask))  # [B,H,t,K]
    return torch.cat(outputs, dim=2).transpose(1, 2)
