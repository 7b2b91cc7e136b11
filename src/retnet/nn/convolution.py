"""Causal convolutions along time: by FFT with a filter of any length, or of a few taps on each channel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.nn.precise import exactly, widened


def fft_convolution(x: Tensor, h: Tensor) -> Tensor:
    """Causal convolution y_t = Σ_{s≤t} h_{t−s} x_s along the last dimension, in O(T log T).

    Args:
        x: [...,T], fp32 or fp64.
        h: a filter of at least T places, its other dimensions broadcast against those of x.

    Returns:
        As x. Rounding knows no order: what comes later leaves traces of the size of the type's ε.
    """
    T = x.shape[-1]
    n = 1 << (2 * T - 1).bit_length()  # no wrapping around; powers of two are fastest
    spectrum = torch.fft.rfft(x, n=n) * torch.fft.rfft(h[..., :T], n=n)
    return torch.fft.irfft(spectrum, n=n)[..., :T]


def fft_flops(length: int) -> int:
    """Operations of `fft_convolution` per token and channel, the filter's own transform counted as for a batch of one."""
    n = 1 << (2 * length - 1).bit_length()
    return round((3 * 2.5 * n * math.log2(n) + 3 * n) / length)


class ShortConvolution(nn.Module):
    """A causal filter of a few taps on each channel: y_t = Σ_{j<taps} w_j x_{t−j}. Computed in fp32 or better."""

    def __init__(self, channels: int, taps: int, std: float) -> None:
        super().__init__()
        self.taps = taps
        self.weight = nn.Parameter(torch.randn(channels, taps) * std)

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B,T,D], with the `taps` − 1 inputs before it [B,taps−1,D] (default: zeros); y [B,T,D] and the next such."""
        wide = widened(x)
        x = x.to(wide)
        x = F.pad(x, (0, 0, self.taps - 1, 0)) if before is None else torch.cat([before.to(wide), x], dim=1)
        after, weight = x[:, x.shape[1] - self.taps + 1 :], self.weight.to(wide).flip(1)
        if x.shape[1] == self.taps:  # one token, which is decoding
            return (x * weight.mT).sum(1, keepdim=True), after
        with exactly(x):
            return F.conv1d(x.mT, weight[:, None], groups=x.shape[2]).mT, after
