"""Hyena (Poli et al. 2023, "Hyena Hierarchy"), order 2: long convolutions with implicit filters, gated by the data."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from retnet.mixers.base import MixerConfig, state_place
from retnet.mixers.cache import Cache, append, right_aligned
from retnet.mixers.packing import SequenceMixer
from retnet.nn import Linear, Precise, ShortConvolution, exactly, fft_convolution, fft_flops
from retnet.settings import At, Count, UserError

ORDER = 2


@dataclass(frozen=True)
class HyenaConfig(MixerConfig):
    """`time_scale` is the number of tokens over which filters run through their range.

    It is a constant: a filter is the same function of the distance whatever the length of the text, and it goes on
    decaying beyond.
    """

    name: Literal["hyena"] = "hyena"
    short_taps: Count = 3
    filter_width: Count = 64  # of the network that makes the filters
    filter_bands: Count = 16  # frequencies of its positional features
    filter_frequency: Annotated[float, At(above=0)] = 10.0  # of its sines
    time_scale: Count = 2048
    fast_decay: Annotated[float, At(above=0)] = (
        0.3  # share of the time scale after which the fastest channel's window has fallen to 1 %
    )
    slow_decay: Annotated[float, At(above=0)] = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slow_decay < self.fast_decay:
            raise UserError(
                f"slow_decay is {self.slow_decay}; it must be at least fast_decay = {self.fast_decay}"
            )


class HyenaState(NamedTuple):
    """The inputs of both long convolutions: it grows with every token. Places from a row's length on are room to grow."""

    projected: Tensor  # the last short_taps − 1 projections, [B,short_taps−1,3D], fp32 or fp64
    inputs: Cache  # [B,S,2,D], in the type of the computation: nothing accumulates in it
    length: Tensor  # int64 [B], tokens seen so far


class Hyena(SequenceMixer):
    """y = x² ⊙ (h² ∗ (x¹ ⊙ (h¹ ∗ v))), with v, x¹, x² short convolutions of projections (Definition 3.1, N = 2).

    There is no recurrence of constant size for an implicit filter: decoding sums over all earlier inputs, O(T) a token in
    time and memory. Weights: in_proj [3D,D], short.weight [3D,taps], filters, skip [2·D], out_proj [D,D].
    """

    Config: ClassVar[type[HyenaConfig]] = HyenaConfig
    caches: ClassVar[tuple[str, ...]] = ("inputs",)
    paper_row: ClassVar[str | None] = "Hyena"
    along_time: ClassVar[str] = "Fourier transforms"
    exactly_causal: ClassVar[bool] = False

    def __init__(self, d_model: int, config: HyenaConfig) -> None:
        super().__init__(d_model, config)
        self.config = config
        self.d_model = d_model
        self.in_proj = Linear(d_model, (ORDER + 1) * d_model)
        self.short = ShortConvolution((ORDER + 1) * d_model, config.short_taps, std=config.short_taps**-0.5)
        self.filters = ImplicitFilters(d_model, config)
        self.out_proj = Linear(d_model, d_model)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> HyenaState:
        """Nothing seen: no inputs, in `dtype`."""
        dtype = dtype or self.out_proj.weight.dtype
        device, wide = state_place(self.out_proj.weight, device, dtype)
        return HyenaState(
            torch.zeros(batch, self.short.taps - 1, (ORDER + 1) * self.d_model, device=device, dtype=wide),
            torch.zeros(batch, 0, ORDER, self.d_model, device=device, dtype=dtype),
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        """Inputs of both convolutions for all tokens, the last projections, and the length."""
        dtype = dtype or self.out_proj.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        projected = (self.short.taps - 1) * (ORDER + 1) * self.d_model * wide.itemsize
        return length * ORDER * self.d_model * dtype.itemsize + projected + 8

    def mixing_flops(self, length: int) -> int:
        """Short convolutions, filters (made once for a batch of one) and both long convolutions."""
        short = 2 * (ORDER + 1) * self.d_model * self.short.taps
        return short + self.filters.flops() + ORDER * self.d_model * (fft_flops(length) + 3)

    def _whole(self, x: Tensor) -> Tensor:
        return self._mix(x, None)[0]

    def _extend(self, x: Tensor, state: HyenaState) -> tuple[Tensor, HyenaState]:
        y, projected, inputs = self._mix(x, state)
        grown = append(state.inputs, state.length, inputs)
        return y, HyenaState(projected, grown, state.length + x.shape[1])

    def _mix(self, x: Tensor, state: HyenaState | None) -> tuple[Tensor, Tensor, Tensor]:
        """[B,T,D] → [B,T,D], the last projections, and the inputs of the long convolutions [B,T,2,D]."""
        T = x.shape[1]
        p, projected = self.short(self.in_proj(x), None if state is None else state.projected)
        z, *gates = p.chunk(ORDER + 1, dim=-1)
        past = None if state is None else right_aligned(state.inputs, state.length)
        h = self.filters.upto(T if past is None else T + past.shape[1])
        inputs = []
        for n, gate in enumerate(gates):
            z = z.to(x.dtype)  # as it is kept
            inputs.append(z)
            z = gate * _convolved(h[n], z.to(gate.dtype), None if past is None else past[:, :, n])
        return self.out_proj(z.to(x.dtype)), projected, torch.stack(inputs, dim=2)


def _convolved(h: Tensor, z: Tensor, past: Tensor | None) -> Tensor:
    """Places of z [B,T,D] in the convolution of (past [B,S,D], z) with h [≥S+T,D]."""
    T = z.shape[1]
    if T == 1 and past is not None:  # decoding
        before = past.to(z.dtype) * h[1 : past.shape[1] + 1].flip(0)
        return before.sum(1, keepdim=True) + z * h[0]
    whole = z if past is None else torch.cat([past.to(z.dtype), z], dim=1)
    return fft_convolution(whole.mT, h.mT)[..., whole.shape[1] - T :].mT


class ImplicitFilters(Precise):
    """h^n_t = window_n(t) · FFN(features(t)) + skip_n at t = 0: a small network with sines, made for any distance t ≥ 0.

    Features of s = t / time_scale are s and cos, sin of 2πfs for `filter_bands` frequencies f; windows are e^{−δs} with δ
    spread over channels.
    """

    def __init__(self, d_model: int, config: HyenaConfig) -> None:
        super().__init__()
        self.config, self.d_model = config, d_model
        sizes = [1 + 2 * config.filter_bands, config.filter_width, config.filter_width]
        self.weights = nn.ParameterList(
            torch.empty(after, before).uniform_(-1, 1) * before**-0.5
            for before, after in itertools.pairwise(sizes)
        )
        self.biases = nn.ParameterList(
            torch.empty(after).uniform_(-1, 1) * before**-0.5 for before, after in itertools.pairwise(sizes)
        )
        self.last = nn.Parameter(torch.empty(ORDER * d_model, sizes[-1]).uniform_(-1, 1) * sizes[-1] ** -0.5)
        self.skip = nn.Parameter(torch.randn(ORDER * d_model))
        self._memo: tuple[list[tuple[int, int]], Tensor] | None = None

    def upto(self, length: int) -> Tensor:
        """h at all distances below `length`, [2,T,D]. In evaluation they are made once for as long as weights stay."""
        device = self.skip.device
        uncounted = any(p.is_inference() for p in self.parameters())  # changes of such are not counted
        if self.training or torch.is_grad_enabled() or uncounted:
            self._memo = None
            return self(torch.arange(length, device=device))
        weights = [(p.data_ptr(), p._version) for p in self.parameters()]
        if self._memo is None or self._memo[0] != weights or self._memo[1].shape[1] < length:
            room = length + length // 8 + 64  # decoding asks for one more each time
            self._memo = weights, self(torch.arange(room, device=device))
        return self._memo[1][:, :length]

    def forward(self, distance: Tensor) -> Tensor:
        """h at int64 distances [T]: [2,T,D], in the type of the weights."""
        c, dtype = self.config, self.skip.dtype
        s = (distance.double() / c.time_scale)[:, None]
        bands = torch.linspace(1e-4, c.filter_bands - 1, c.filter_bands, device=s.device, dtype=s.dtype)
        angles = 2 * math.pi * bands * s
        x = torch.cat([s, angles.cos(), angles.sin()], dim=1).to(dtype)
        with exactly(x):
            for weight, bias in zip(self.weights, self.biases, strict=True):
                x = torch.sin(c.filter_frequency * nn.functional.linear(x, weight, bias))
            h = (x @ self.last.mT).unflatten(1, (ORDER, self.d_model)).transpose(0, 1)  # [2,T,D]
        rate = -math.log(0.01) / torch.linspace(
            c.slow_decay, c.fast_decay, self.d_model, device=s.device, dtype=s.dtype
        )
        window = torch.exp(-rate * s).to(dtype)  # [T,D]
        return h * window + self.skip.view(ORDER, 1, self.d_model) * (distance == 0)[:, None]

    def flops(self) -> int:
        """Operations per distance."""
        weights = sum(w.numel() for w in self.weights) + self.last.numel()
        return 2 * weights + 2 * ORDER * self.d_model
