"""The weight table of the compiled decoder: addresses, sizes and constants that its kernel reads, checked once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from retnet.ops.cpu.decode import MIN_SIZE
from retnet.ops.cpu.openmp import bits, in_large_pages, readable

_NORMS = {"none": 0, "group": 1, "rms": 2}
_LAYOUTS = {"none": 0, "interleaved": 1, "halves": 2}
_NUMBERS = (torch.float32, torch.int8)


class NotCompiledError(Exception):
    """Why the compiled decoder cannot run a model: its parts have to be called."""


class ModelTable(IntEnum):
    """The beginning of a weight table: sizes, constants (an ε and the scale as the bits of fp64), addresses or 0."""

    D = 0
    H = 1
    K = 2
    V = 3
    N = 4  # of the FFN
    GATED = 5
    LAYOUT = 6  # of the rotation: 0 none, 1 interleaved, 2 halves
    BRIDGE = 7  # heads divided by √Σγ before their norm
    HEAD_NORM = 8  # 0 none, 1 group, 2 rms
    FFN_GATED = 9
    SILU = 10  # else GELU
    HEAD_EPS = 11
    EPS = 12  # of all other norms
    LAYERS = 13
    TOKENS = 14  # in the vocabulary of the embedding
    LOGITS = 15
    SCALE = 16  # of the embedding
    EMBEDDING = 17
    EMBEDDING_NORM = 18
    EMBEDDING_BIAS = 19
    NORM = 20
    NORM_BIAS = 21
    HEAD = 22
    HEAD_SCALES = 23


class LayerTable(IntEnum):
    """What follows for each layer: addresses, 0 where there is none."""

    MIXER_NORM = 0
    MIXER_BIAS = 1
    FFN_NORM = 2
    FFN_BIAS = 3
    Q = 4
    K = 5
    V = 6
    GATE = 7
    OUT = 8
    FC1 = 9
    FFN_GATE = 10
    FC2 = 11
    LOG_DECAY = 12
    THETA = 13
    Q_SCALES = 14
    K_SCALES = 15
    V_SCALES = 16
    GATE_SCALES = 17
    OUT_SCALES = 18
    FC1_SCALES = 19
    FFN_GATE_SCALES = 20
    FC2_SCALES = 21


class MixerWeights(NamedTuple):
    """Multi-scale retention, as the kernel of a block reads it: weights [out,in] and constants of a mixer."""

    weights: Sequence[Tensor | None]  # q and k [H·K,D], v and gate (or None) [H·V,D], out [D,H·V]
    scales: Sequence[Tensor | None]  # [out] fp32 of each weight that is int8
    log_decay: Tensor  # [H] fp32
    theta: Tensor  # [K/2] fp64, empty without rotation
    layout: str  # "interleaved", "halves" or "none"
    bridge: bool  # rows divided by √Σγ before the norm (score_norm "decay")
    norm: str  # "group", "rms" or "none"
    eps: float


class BlockWeights(NamedTuple):
    """What a block has around its mixer: two norms (without bias: RMSNorm) and the FFN."""

    mixer_norm: Tensor  # [D]
    mixer_bias: Tensor | None  # [D]
    ffn_norm: Tensor  # [D]
    ffn_bias: Tensor | None  # [D]
    weights: Sequence[Tensor | None]  # fc1 and gate (or None) [N,D], fc2 [D,N]
    scales: Sequence[Tensor | None]  # [out] fp32 of each weight that is int8
    norm_eps: float
    act: str  # "gelu" or "silu"


class EndWeights(NamedTuple):
    """What a model has around its blocks: the embedding, its norm if it has one, the last norm and the head."""

    embedding: Tensor  # fp32 [vocabulary,D]
    scale: float  # that multiplies its rows
    embedding_norm: Tensor | None  # [D]
    embedding_bias: Tensor | None  # [D]
    norm: Tensor  # [D]
    bias: Tensor | None  # [D]
    head: Tensor  # [logits,D]
    head_scale: Tensor | None  # [logits] fp32 if the head is int8
    norm_eps: float


class WeightTable(NamedTuple):
    """A model whose tensors have been checked; see `make_table`."""

    numbers: ctypes.Array[
        ctypes.c_int64
    ]  # what the kernel reads: a `ModelTable`, then a `LayerTable` for each layer
    memory: list[Tensor | None]  # what lies at the addresses, kept while somebody may read it
    number: torch.dtype  # of the weights
    sizes: tuple[int, int, int, int, int]  # D H K V N

    @property
    def address(self) -> int:
        """Of the numbers."""
        return ctypes.addressof(self.numbers)


class _BlockEntry(NamedTuple):
    """What one block gives to a table."""

    number: torch.dtype
    sizes: tuple[int, int, int, int, int]
    flags: tuple[int, ...]
    reals: tuple[float, float]
    tensors: tuple[Tensor | None, ...]


def make_table(blocks: Sequence[tuple[MixerWeights, BlockWeights]], ends: EndWeights) -> WeightTable:
    """The table of a model with these blocks, in their order.

    Raises:
        NotCompiledError: the kernel cannot run them.
    """
    checked = [_check(mixer, block) for mixer, block in blocks]
    known = [block for block in checked if block is not None]
    if not known or len(known) < len(checked):
        raise NotCompiledError(
            "its weights are not fp32 or int8 in CPU memory, are too small, or do not fit each other"
        )
    first = known[0]
    if any(block[:4] != first[:4] for block in known):
        raise NotCompiledError("its layers are not alike")
    if not _ends_fit(ends, first):
        raise NotCompiledError(
            "its embedding, last norm or head are not fp32 or int8 in CPU memory, or do not fit its layers"
        )
    outer = (ends.embedding, *ends[2:8])
    tensors = [*outer, *(x for block in known for x in block.tensors)]
    in_large_pages(tensors[1:])  # of an embedding a step reads a row, unless it is the head as well
    numbers = [
        *first.sizes,
        *map(int, first.flags),
        *map(bits, first.reals),
        len(known),
        ends.embedding.shape[0],
        ends.head.shape[0],
        bits(ends.scale),
        *(0 if x is None else x.data_ptr() for x in tensors),
    ]
    assert len(numbers) == len(ModelTable) + len(known) * len(LayerTable)
    memory = [None if x is None else x.detach() for x in tensors]
    return WeightTable((ctypes.c_int64 * len(numbers))(*numbers), memory, first.number, first.sizes)


def _check(mixer: MixerWeights, outer: BlockWeights) -> _BlockEntry | None:
    weights, scales = (*mixer.weights, *outer.weights), (*mixer.scales, *outer.scales)
    q, _, v, gate, _, fc1, ffn_gate, _ = weights
    if q is None or v is None or fc1 is None or fc1.numel() < MIN_SIZE:
        return None
    (N, D), H, number = fc1.shape, len(mixer.log_decay), fc1.dtype
    K, V = q.shape[0] // H, v.shape[0] // H
    rows = (H * K, H * K, H * V, H * V, D, N, N, D)
    columns = (D, D, D, D, H * V, D, D, N)
    missing = {i for i, w in enumerate(weights) if w is None}
    fits = (
        number in _NUMBERS
        and readable(weights, number, [n * m for n, m in zip(rows, columns, strict=True)])
        and readable(outer[:4], torch.float32, (D, D, D, D))
        and readable((mixer.log_decay,), torch.float32, (H,))
        and readable((mixer.theta,), torch.float64, (0 if mixer.layout == "none" else K // 2,))
        and readable(scales, torch.float32, rows)
        and missing <= {3, 6}  # the gates
        and (number is torch.float32 or missing == {i for i, s in enumerate(scales) if s is None})
    )
    if not fits:
        return None
    flags = (
        gate is not None,
        _LAYOUTS[mixer.layout],
        mixer.bridge,
        _NORMS[mixer.norm],
        ffn_gate is not None,
        outer.act == "silu",
    )
    tensors = (*outer[:4], *weights, mixer.log_decay, mixer.theta, *scales)
    return _BlockEntry(number, (D, H, K, V, N), flags, (mixer.eps, outer.norm_eps), tensors)


def _ends_fit(ends: EndWeights, block: _BlockEntry) -> bool:
    D, number = block.sizes[0], block.number
    norms = (ends.embedding_norm, ends.embedding_bias, ends.norm, ends.bias)
    return (
        readable((ends.embedding,), torch.float32, (ends.embedding.shape[0] * D,))
        and readable(norms, torch.float32, (D, D, D, D))
        and readable((ends.head,), number, (ends.head.shape[0] * D,))
        and readable((ends.head_scale,), torch.float32, ends.head.shape[:1])
        and (number is torch.float32) == (ends.head_scale is None)
        and ends.norm_eps == block.reals[1]
    )
