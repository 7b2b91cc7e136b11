"""exp, SiLU and GELU of fp32 numbers, written so that LLVM computes a vector of them at once; libm takes them one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from retnet.ops.cpu.jit import Compiler

_LOG2_E = np.float32(1.44269504)
_LN_2 = np.float32(0.693359375), np.float32(-2.12194440e-4)  # one number with few bits, and the rest
_EXP = tuple(
    map(np.float32, (1.9875691e-4, 1.3981999e-3, 8.3334519e-3, 4.1665796e-2, 1.6666665e-1, 5.0000001e-1))
)
_ERFC = (
    0.17087277,
    -0.82215223,
    1.48851587,
    -1.13520398,
    0.27886807,
    -0.18628806,
    0.09678418,
    0.37409196,
    1.00002368,
)
_ERFC_LAST = np.float32(-1.26551223)
_ERFC_FIRST = tuple(map(np.float32, _ERFC))


class Activations(NamedTuple):
    """Compiled functions of one fp32 number, within a few units of its last place.

    Attributes:
        exp: e^x, from −87 to 88; what is beyond becomes these.
        silu: x / (1 + e^−x).
        gelu: x Φ(x), with Φ from the Chebyshev fit of erfc in Numerical Recipes (§6.2).
    """

    exp: Callable[..., Any]
    silu: Callable[..., Any]
    gelu: Callable[..., Any]


def compile_activations(compiler: Compiler) -> Activations:
    """The functions; see `Activations`."""
    half, one, root = np.float32(0.5), np.float32(1), np.float32(math.sqrt(0.5))
    low, high, bias, bits = np.float32(-87), np.float32(88), np.int32(127), np.int32(23)

    @compiler.function
    def exp(x: Any) -> Any:  # noqa: ANN401
        """2^n e^r with |r| ≤ ln 2 / 2; a polynomial of r (Cephes)."""
        x = min(max(x, low), high)
        n = np.floor(x * _LOG2_E + half)
        r = x - n * _LN_2[0] - n * _LN_2[1]
        p = _EXP[0]
        p = p * r + _EXP[1]
        p = p * r + _EXP[2]
        p = p * r + _EXP[3]
        p = p * r + _EXP[4]
        p = p * r + _EXP[5]
        return (p * r * r + r + one) * np.int32((np.int32(n) + bias) << bits).view(np.float32)

    @compiler.function
    def silu(x: Any) -> Any:  # noqa: ANN401
        return x / (one + exp(-x))

    @compiler.function
    def gelu(x: Any) -> Any:  # noqa: ANN401
        z = abs(x) * root
        t = one / (one + half * z)
        p = _ERFC_FIRST[0]
        p = p * t + _ERFC_FIRST[1]
        p = p * t + _ERFC_FIRST[2]
        p = p * t + _ERFC_FIRST[3]
        p = p * t + _ERFC_FIRST[4]
        p = p * t + _ERFC_FIRST[5]
        p = p * t + _ERFC_FIRST[6]
        p = p * t + _ERFC_FIRST[7]
        p = p * t + _ERFC_FIRST[8]
        tail = half * t * exp(p * t + _ERFC_LAST - z * z)
        return x * (tail if x < 0 else one - tail)

    return Activations(exp, silu, gelu)
