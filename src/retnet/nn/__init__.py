"""Modules that mixers and models are made of."""

from retnet.nn.convolution import ShortConvolution, fft_convolution, fft_flops
from retnet.nn.derivatives import needs_formula, once_differentiable
from retnet.nn.feed_forward import FeedForward
from retnet.nn.linear import Int8Linear, Linear, linear_of
from retnet.nn.narrow import narrow_parameter
from retnet.nn.norm import Norm
from retnet.nn.precise import Precise, exactly, widened
from retnet.nn.rotary import Positions, Rotary, Rotation

__all__ = [
    "FeedForward",
    "Int8Linear",
    "Linear",
    "Norm",
    "Positions",
    "Precise",
    "Rotary",
    "Rotation",
    "ShortConvolution",
    "exactly",
    "fft_convolution",
    "fft_flops",
    "linear_of",
    "narrow_parameter",
    "needs_formula",
    "once_differentiable",
    "widened",
]
