"""RWKV-4's TimeMix (Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era")."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from retnet.mixers.base import MixerConfig, state_place
from retnet.mixers.packing import SequenceMixer
from retnet.nn import Linear, Precise, widened


@dataclass(frozen=True)
class Rwkv4Config(MixerConfig):
    """RWKV-4 has nothing to choose: its width is the model's, its decay and bonus are learned for each channel."""

    name: Literal["rwkv4"] = "rwkv4"


class Rwkv4State(NamedTuple):
    """The last token and a weighted mean of all; constant in their number. fp32 or fp64, [B,D] each."""

    shifted: Tensor  # the last token, zeros before the first
    numerator: Tensor  # Σ exp(weight − exponent) v
    denominator: Tensor  # Σ exp(weight − exponent)
    exponent: Tensor  # the largest weight so far, −∞ before the first token


class TimeMix(SequenceMixer):
    """W_o (σ(r_t) ⊙ wkv_t), where r, k, v are projections of token t interpolated with token t − 1.

        wkv_t = (Σ_{i<t} e^{−(t−1−i)w + k_i} v_i + e^{u + k_t} v_t) / (Σ_{i<t} e^{−(t−1−i)w + k_i} + e^{u + k_t}).

    Weights: receptance_proj, k_proj, v_proj, out_proj [D,D]; time.{decay,bonus,mix_r,mix_k,mix_v} [D], w = exp(decay).
    """

    Config: ClassVar[type[Rwkv4Config]] = Rwkv4Config
    paper_row: ClassVar[str | None] = "RWKV"
    along_time: ClassVar[str] = "√T chunks of √T tokens"

    def __init__(self, d_model: int, config: Rwkv4Config) -> None:
        super().__init__(d_model, config)
        self.d_model = d_model
        self.receptance_proj = Linear(d_model, d_model)
        self.k_proj = Linear(d_model, d_model)
        self.v_proj = Linear(d_model, d_model)
        self.out_proj = Linear(d_model, d_model)
        self.time = _Time(d_model)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Rwkv4State:
        """Nothing seen. fp32 unless `dtype` is fp64."""
        device, wide = state_place(self.k_proj.weight, device, dtype)
        zero = torch.zeros(batch, self.d_model, device=device, dtype=wide)
        return Rwkv4State(zero, zero.clone(), zero.clone(), torch.full_like(zero, -math.inf))

    def mixing_flops(self, length: int) -> int:
        """Interpolation (9 per channel), summing inside a chunk and across chunks (12 and 17), gate."""
        return 40 * self.d_model

    def _extend(self, x: Tensor, state: Rwkv4State) -> tuple[Tensor, Rwkv4State]:
        wide, time = widened(x), self.time
        before = torch.cat([state.shifted[:, None].to(x.dtype), x[:, :-1]], dim=1)
        r, k, v = (
            proj(torch.lerp(before, x, mix.to(x.dtype))).to(wide)
            for proj, mix in (
                (self.receptance_proj, time.mix_r),
                (self.k_proj, time.mix_k),
                (self.v_proj, time.mix_v),
            )
        )
        y, past = wkv(k, v, time.decay.to(wide).exp(), time.bonus.to(wide), Weighted(*state[1:]))
        return self.out_proj((torch.sigmoid(r) * y).to(x.dtype)), Rwkv4State(x[:, -1].to(wide), *past)


class _Time(Precise):
    """What differs from channel to channel: RWKV-4's initial values, of the middle layer in every layer."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        n = torch.arange(d_model)
        place, depth = n / d_model, 0.5
        rank = n / max(1, d_model - 1)
        self.decay = nn.Parameter(-5 + 8 * rank ** (0.7 + 1.3 * depth))
        self.bonus = nn.Parameter(math.log(0.3) + 0.5 * ((n + 1) % 3 - 1))
        self.mix_k = nn.Parameter(place**depth)
        self.mix_v = nn.Parameter(place**depth + 0.3 * depth)
        self.mix_r = nn.Parameter(place ** (0.5 * depth))


class Weighted(NamedTuple):
    """A sum of values with weights e^{w_i}, Σ e^{w_i − exponent} v_i and Σ e^{w_i − exponent}: no power exceeds 1."""

    numerator: Tensor
    denominator: Tensor
    exponent: Tensor  # the largest w_i; a mere scale, so gradients need not pass through it

    def decayed(self, by: Tensor) -> Weighted:
        """All weights times e^{−by}."""
        return self._replace(exponent=self.exponent - by)

    def plus(self, *others: Weighted) -> Weighted:
        """The sum over the terms of all; one of them at least must not be empty."""
        terms = (self, *others)
        largest = terms[0].exponent.detach()
        for term in others:
            largest = torch.maximum(largest, term.exponent.detach())
        scales = [torch.exp(term.exponent - largest) for term in terms]
        numerator = sum(s * t.numerator for s, t in zip(scales, terms, strict=True))
        denominator = sum(s * t.denominator for s, t in zip(scales, terms, strict=True))
        return Weighted(numerator, denominator, largest)  # type: ignore[arg-type]  # there is a first term


def wkv(k: Tensor, v: Tensor, w: Tensor, u: Tensor, past: Weighted) -> tuple[Tensor, Weighted]:
    """The weighted means of the class above, and the sum after the last token.

    √T chunks of √T tokens: all chunks walk through their tokens at once, each from nothing; then the sums of whole chunks
    are added up in order; then every token joins the chunks before its own, the tokens before it, and itself. That is
    3√T steps in a row instead of T, and the work of three.

    Args:
        k: weights of the tokens, as logarithms, [B,T,D] with T ≥ 1, of any size.
        v: values [B,T,D].
        w: decay of each channel, [D] ≥ 0.
        u: bonus of the present token, [D].
        past: what came before, [B,D] each.
    """
    size = math.isqrt(k.shape[1])
    full = k.shape[1] // size * size
    outputs = []
    for part, chunk in ((slice(0, full), size), (slice(full, None), k.shape[1] - full)):
        if chunk:
            out, past = _chunks(
                k[:, part].unflatten(1, (-1, chunk)), v[:, part].unflatten(1, (-1, chunk)), w, u, past
            )
            outputs.append(out)
    return torch.cat(outputs, dim=1), past


def _chunks(k: Tensor, v: Tensor, w: Tensor, u: Tensor, past: Weighted) -> tuple[Tensor, Weighted]:
    """`wkv` of k, v [B,n,C,D], n chunks of C tokens → [B,n·C,D]."""
    B, n, C, D = k.shape
    zero = k.new_zeros(B, n, D)
    local = Weighted(zero, zero, zero - math.inf)
    inside = []  # for each token, the sum of those before it in its chunk
    for k_j, v_j in zip(k.unbind(2), v.unbind(2), strict=True):
        inside.append(local)
        local = local.decayed(w).plus(Weighted(v_j, torch.ones_like(v_j), k_j))
    entering = []  # for each chunk, the sum of all before it
    for chunk in zip(*(x.unbind(1) for x in local), strict=True):
        entering.append(past)
        past = past.decayed(C * w).plus(Weighted(*chunk))
    ago = torch.arange(C, device=k.device, dtype=k.dtype)[:, None] * w  # [C,D]
    earlier = Weighted(*(torch.stack(x, dim=1)[:, :, None] for x in zip(*entering, strict=True))).decayed(ago)
    own = Weighted(*(torch.stack(x, dim=2) for x in zip(*inside, strict=True)))
    total = Weighted(v, torch.ones_like(v), u + k).plus(earlier, own)
    return (total.numerator / total.denominator).flatten(1, 2), past
