"""Shuffling of training data: a seeded permutation computed per index, so no order is ever stored.

A balanced Feistel network permutes [0, 4^b); walking along its cycles until the value falls below `size` restricts it
to a permutation of [0, size) (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Everything is integer
arithmetic modulo 2^64, so every machine gives the same order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUND_CONSTANTS = (np.arange(1, 7, dtype=np.uint64) * _GOLDEN)[:, None]  # six rounds
_MASK = (1 << 64) - 1


def permute(index: NDArray[np.uint64], size: int, seed: int, epoch: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Where each index goes.

    Args:
        index: uint64 [N], each below `size`.
        size: of the domain, from 1 to 2^62.
        seed: any integer.
        epoch: uint64 [N]; every epoch has a permutation of its own.

    Returns:
        uint64 [N], each below `size`; for one seed and epoch, distinct indices have distinct values.
    """
    half = max(
        2, ((size - 1).bit_length() + 1) // 2
    )  # bits; two at least, or tiny domains hardly get shuffled
    key = _mix(epoch * _GOLDEN + _mix(np.full(1, seed & _MASK, np.uint64)))
    value = _network(index, key, half)
    outside = np.flatnonzero(value >= size)
    while outside.size:
        value[outside] = _network(value[outside], key[outside], half)
        outside = outside[value[outside] >= size]
    return value


def _network(value: NDArray[np.uint64], key: NDArray[np.uint64], half: int) -> NDArray[np.uint64]:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> bits, value & mask
    for constant in _ROUND_CONSTANTS:
        left, right = right, left ^ (_mix(right + key + constant) & mask)
    return (left << bits) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
