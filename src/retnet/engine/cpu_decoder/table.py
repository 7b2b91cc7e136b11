"""The weight table of the compiled decoder: addresses, sizes and constants that its kernel reads, checked once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from retnet.ops.cpu.decode import MIN_SIZE
from retnet.ops.cpu.openmp import bits, in_large_pages, readable
from retnet.ops.cpu.tile import LANES

_KINDS = {"retention": 0, "softmax": 1}
_NORMS = {"none": 0, "group": 1, "rms": 2}
_LAYOUTS = {"none": 0, "interleaved": 1, "halves": 2}
_NUMBERS = (torch.float32, torch.int8)


class NotCompiledError(Exception):
    """Why the compiled decoder cannot run a model: its parts have to be called."""


class ModelTable(IntEnum):
    """The beginning of a weight table: sizes, constants (an ε and the scale as the bits of fp64), addresses or 0."""

    D = 0
    PROJECTED = 1  # of the layers the widest row of queries, keys, values and gates
    N = 2  # the widest FFN
    WIDEST = 3  # the widest row that enters a product, and a vector more
    ANGLES = 4  # the most that a layer turns by
    EPS = 5  # of all norms but those of heads
    LAYERS = 6
    TOKENS = 7  # in the vocabulary of the embedding
    LOGITS = 8
    SCALE = 9  # of the embedding
    NORMED = 10  # whether a branch f of x makes it α norm(x) + β f, else α x + β f
    EMBEDDING = 11
    EMBEDDING_NORM = 12
    EMBEDDING_BIAS = 13
    NORM = 14
    NORM_BIAS = 15
    HEAD = 16
    HEAD_SCALES = 17


class LayerTable(IntEnum):
    """What follows for each layer: sizes, choices, constants (as the bits of fp64), addresses or 0.

    Projections stand in the order of their outputs, `Q` to `GATE`, and so do their scales.
    """

    KIND = 0  # 0 retention, 1 softmax
    H = 1
    G = 2  # heads of keys and values
    K = 3
    V = 4
    N = 5  # of the FFN
    ANGLES = 6  # half the numbers of a head that are turned
    LAYOUT = 7  # of the rotation: 0 none, 1 interleaved, 2 halves
    BRIDGE = 8  # heads divided by √Σγ before their norm
    HEAD_NORM = 9  # 0 none, 1 group, 2 rms
    TOGETHER = 10  # heads that have one norm
    ACTIVATED = 11  # queries, keys and values through SiLU
    SIGMOID = 12  # gates, else swish
    SILU = 13  # between the products of the FFN, else GELU
    SCALE = 14  # of query-key products
    QK_EPS = 15  # of the norm of queries and keys
    HEAD_EPS = 16
    ALPHA = 17  # of the residual sums by mixer and by FFN
    BETA = 18
    FFN_ALPHA = 19
    FFN_BETA = 20
    MIXER_NORM = 21
    MIXER_BIAS = 22
    FFN_NORM = 23
    FFN_BIAS = 24
    Q = 25
    KEYS = 26
    VALUES = 27
    GATE = 28
    OUT = 29
    FC1 = 30
    FFN_GATE = 31
    FC2 = 32
    Q_SCALES = 33
    K_SCALES = 34
    V_SCALES = 35
    GATE_SCALES = 36
    OUT_SCALES = 37
    FC1_SCALES = 38
    FFN_GATE_SCALES = 39
    FC2_SCALES = 40
    LOG_DECAY = 41
    THETA = 42
    Q_NORM = 43
    K_NORM = 44
    Q_BIAS = 45
    K_BIAS = 46
    V_BIAS = 47
    HEAD_WEIGHT = 48
    HEAD_BIAS = 49


class MixerWeights(NamedTuple):
    """Retention or softmax attention, as the kernel reads it: weights [out,in] and constants of a mixer."""

    kind: str  # "retention" or "softmax"
    weights: Sequence[Tensor | None]  # q [H·K,D], k [G·K,D], v [G·V,D], gate (or None) [H·V,D], out [D,H·V]
    scales: Sequence[Tensor | None]  # [out] fp32 of each weight that is int8
    heads: int
    kv_heads: int
    theta: Tensor  # fp64, the angles of pairs of numbers, empty without rotation
    layout: str  # "interleaved", "halves" or "none"
    log_decay: Tensor | None = None  # [H] fp32, of retention
    bridge: bool = False  # rows divided by √Σγ before the norm (score_norm "decay")
    norm: str = "none"  # of heads: "group", "rms" or "none"
    eps: float = 0.0
    affine: tuple[Tensor | None, Tensor | None] = (None, None)  # weight and bias of that norm, [H·V]
    together: int = 1  # heads that have one norm
    sigmoid: bool = False  # gates, else swish
    activated: bool = False  # queries, keys and values through SiLU
    scale: float | None = None  # of query-key products, K^(−1/2)
    qk_norms: tuple[Tensor | None, Tensor | None] = (None, None)  # [K] of queries and of keys
    qk_eps: float = 0.0
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)  # of q, k and v


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
    residuals: Sequence[tuple[float, float]]  # α and β of the mixer's residual sum, and of the FFN's


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
    normed: bool  # whether α of residual sums multiplies what the norm made of x


class Sizes(NamedTuple):
    """Of what the kernel works in, over all layers; see `ModelTable`."""

    D: int
    projected: int
    N: int
    widest: int
    angles: int


class WeightTable(NamedTuple):
    """A model whose tensors have been checked; see `make_table`."""

    numbers: ctypes.Array[
        ctypes.c_int64
    ]  # what the kernel reads: a `ModelTable`, then a `LayerTable` for each layer
    memory: list[Tensor | None]  # what lies at the addresses, kept while somebody may read it
    number: torch.dtype  # of the weights
    sizes: Sizes

    @property
    def address(self) -> int:
        """Of the numbers."""
        return ctypes.addressof(self.numbers)


class _BlockEntry(NamedTuple):
    """What one block gives to a table."""

    number: torch.dtype
    sizes: Sizes
    norm_eps: float
    constants: list[int]  # the first of a `LayerTable`
    tensors: tuple[Tensor | None, ...]  # at the addresses of the rest


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
    if any((b.number, b.sizes.D, b.norm_eps) != (first.number, first.sizes.D, first.norm_eps) for b in known):
        raise NotCompiledError(
            "its layers differ in their weights' type, in their width or in the ε of norms"
        )
    if not _ends_fit(ends, first):
        raise NotCompiledError(
            "its embedding, last norm or head are not fp32 or int8 in CPU memory, or do not fit its layers"
        )
    outer = (ends.embedding, *ends[2:8])
    tensors = [*outer, *(x for block in known for x in block.tensors)]
    in_large_pages(tensors[1:])  # of an embedding a step reads a row, unless it is the head as well
    sizes = Sizes(*map(max, zip(*(block.sizes for block in known), strict=True)))
    numbers = [
        *sizes,
        bits(first.norm_eps),
        len(known),
        ends.embedding.shape[0],
        ends.head.shape[0],
        bits(ends.scale),
        int(ends.normed),
        *_addresses(outer),
    ]
    for block in known:
        numbers += [*block.constants, *_addresses(block.tensors)]
    assert len(numbers) == len(ModelTable) + len(known) * len(LayerTable)
    memory = [None if x is None else x.detach() for x in tensors]
    return WeightTable((ctypes.c_int64 * len(numbers))(*numbers), memory, first.number, sizes)


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def _check(mixer: MixerWeights, outer: BlockWeights) -> _BlockEntry | None:
    weights, scales = (*mixer.weights, *outer.weights), (*mixer.scales, *outer.scales)
    q, _, v, gate, _, fc1, _, _ = weights
    if q is None or v is None or fc1 is None or fc1.numel() < MIN_SIZE:
        return None
    (N, D), H, G, number = fc1.shape, mixer.heads, mixer.kv_heads, fc1.dtype
    K, V = q.shape[0] // H, v.shape[0] // G
    angles = len(mixer.theta)
    rows = (H * K, G * K, G * V, H * V, D, N, N, D)
    columns = (D, D, D, D, H * V, D, D, N)
    missing = {i for i, w in enumerate(weights) if w is None}
    small = (*outer[:4], mixer.log_decay, *mixer.qk_norms, *mixer.biases, *mixer.affine)
    fits = (
        number in _NUMBERS
        and readable(weights, number, [n * m for n, m in zip(rows, columns, strict=True)])
        and readable(small, torch.float32, (D, D, D, D, H, K, K, H * K, G * K, G * V, H * V, H * V))
        and readable((mixer.theta,), torch.float64, (angles,))
        and (2 * angles <= K if mixer.layout != "none" else angles == 0)
        and readable(scales, torch.float32, rows)
        and missing <= {3, 6}  # the gates
        and (number is torch.float32 or missing == {i for i, s in enumerate(scales) if s is None})
        and (mixer.kind == "softmax") == (mixer.log_decay is None)
    )
    if not fits:
        return None
    constants = [
        _KINDS[mixer.kind],
        *(H, G, K, V, N),
        angles,
        _LAYOUTS[mixer.layout],
        int(mixer.bridge),
        _NORMS[mixer.norm],
        *map(int, (mixer.together, mixer.activated, mixer.sigmoid)),
        int(outer.act == "silu"),
        *map(bits, (mixer.scale or K**-0.5, mixer.qk_eps, mixer.eps, *chain(*outer.residuals))),
    ]
    projected = H * K + G * (K + V) + H * V * (gate is not None)
    sizes = Sizes(D, projected, N, max(D, H * V, N) + LANES, angles)
    others = (mixer.log_decay, mixer.theta, *mixer.qk_norms, *mixer.biases, *mixer.affine)
    return _BlockEntry(number, sizes, outer.norm_eps, constants, (*outer[:4], *weights, *scales, *others))


def _ends_fit(ends: EndWeights, block: _BlockEntry) -> bool:
    D, number = block.sizes.D, block.number
    norms = (ends.embedding_norm, ends.embedding_bias, ends.norm, ends.bias)
    return (
        readable((ends.embedding,), torch.float32, (ends.embedding.shape[0] * D,))
        and readable(norms, torch.float32, (D, D, D, D))
        and readable((ends.head,), number, (ends.head.shape[0] * D,))
        and readable((ends.head_scale,), torch.float32, ends.head.shape[:1])
        and (number is torch.float32) == (ends.head_scale is None)
        and ends.norm_eps == block.norm_eps
    )
