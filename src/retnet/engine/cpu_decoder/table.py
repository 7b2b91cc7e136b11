"""The weight table of the compiled decoder: addresses, sizes and constants that its kernel reads, checked once.

Checking costs more than the step of a small block, so a plan is kept while its tensors are used and have not `moved`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retnet.ops.cpu.decode import MIN_SIZE
from retnet.ops.cpu.openmp import bits, in_large_pages, readable

_NORMS = {"none": 0, "group": 1, "rms": 2}
_LAYOUTS = {"none": 0, "interleaved": 1, "halves": 2}
_NUMBERS = (torch.float32, torch.int8)


class Core(NamedTuple):
    """Multi-scale retention, as the kernel of a block reads it: weights [out,in] and constants of a mixer."""

    weights: Sequence[Tensor | None]  # q and k [H·K,D], v and gate (or None) [H·V,D], out [D,H·V]
    scales: Sequence[Tensor | None]  # [out] fp32 of each weight that is int8
    log_decay: Tensor  # [H] fp32
    theta: Tensor  # [K/2] fp64, empty without rotation
    layout: str  # "interleaved", "halves" or "none"
    bridge: bool  # rows divided by √Σγ before the norm (score_norm "decay")
    norm: str  # "group", "rms" or "none"
    eps: float


class Shell(NamedTuple):
    """What a block has around its mixer: two norms (without bias: RMSNorm) and the FFN."""

    mixer_norm: Tensor  # [D]
    mixer_bias: Tensor | None  # [D]
    ffn_norm: Tensor  # [D]
    ffn_bias: Tensor | None  # [D]
    weights: Sequence[Tensor | None]  # fc1 and gate (or None) [N,D], fc2 [D,N]
    scales: Sequence[Tensor | None]  # [out] fp32 of each weight that is int8
    norm_eps: float
    act: str  # "gelu" or "silu"


class Ends(NamedTuple):
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


class Plan(NamedTuple):
    """Blocks, with the ends of their model or without, whose tensors have been checked; see `make_plan`."""

    tensors: list[Tensor | None]
    pointers: list[int]  # their addresses
    memory: list[Tensor | None]  # what lies there, kept while somebody may read it
    number: torch.dtype  # of the weights
    sizes: tuple[int, int, int, int, int]  # D H K V N
    blocks: int
    tokens: int  # in the vocabulary of the embedding; 0 without ends
    width: int  # of a row that comes out: D, or logits
    table: ctypes.Array[ctypes.c_int64]  # what the kernel reads, see `make_plan`

    @property
    def address(self) -> int:
        """Of the table."""
        return ctypes.addressof(self.table)

    def moved(self) -> bool:
        """Whether a tensor got other memory, as `.to` and assignments to `.data` give it."""
        return self.pointers != _addresses(self.tensors)


class _Block(NamedTuple):
    """What one block gives to a plan."""

    number: torch.dtype
    sizes: tuple[int, int, int, int, int]
    flags: tuple[int, ...]
    reals: tuple[float, float]
    tensors: tuple[Tensor | None, ...]


def make_plan(blocks: Sequence[tuple[Core, Shell]], ends: Ends | None = None) -> Plan | None:
    """A plan of these blocks, in their order; None where the kernel cannot run them, or where they are not alike.

    Its table: D H K V N; whether heads are gated, layout of the rotation, bridge, norm of the heads, whether the FFN is
    gated, whether its activation is SiLU; ε of the heads' norm and of the others; number of blocks; with ends or 0. Then
    the ends: size of the vocabulary, logits, scale; addresses of their seven tensors. Then for each block addresses of 22
    tensors: norms (4), weights (8), log_decay, theta, scales (8); 0 where there is none.
    """
    checked = [_check(core, shell) for core, shell in blocks]
    if not checked or (first := checked[0]) is None or any(b is None or b[:4] != first[:4] for b in checked):
        return None
    D = first.sizes[0]
    outer: tuple[Tensor | None, ...] = (None,) * 7
    numbers, width = [0, 0, bits(1.0)], D
    if ends is not None:
        if not _ends_fit(ends, first):
            return None
        outer = (ends.embedding, *ends[2:8])
        width = ends.head.shape[0]
        numbers = [ends.embedding.shape[0], width, bits(ends.scale)]
    tensors = [*outer, *(x for b in checked if b is not None for x in b.tensors)]
    in_large_pages(tensors[1:])  # of an embedding a step reads a row, unless it is the head as well
    pointers = _addresses(tensors)
    head = [
        *first.sizes,
        *map(int, first.flags),
        *map(bits, first.reals),
        len(checked),
        int(ends is not None),
    ]
    table = [*head, *numbers, *pointers]
    return Plan(
        tensors,
        pointers,
        [None if x is None else x.detach() for x in tensors],
        first.number,
        first.sizes,
        len(checked),
        numbers[0],
        width,
        (ctypes.c_int64 * len(table))(*table),
    )


def _check(core: Core, shell: Shell) -> _Block | None:
    weights, scales = (*core.weights, *shell.weights), (*core.scales, *shell.scales)
    q, _, v, gate, _, fc1, ffn_gate, _ = weights
    if q is None or v is None or fc1 is None or fc1.numel() < MIN_SIZE:
        return None
    (N, D), H, number = fc1.shape, len(core.log_decay), fc1.dtype
    K, V = q.shape[0] // H, v.shape[0] // H
    rows = (H * K, H * K, H * V, H * V, D, N, N, D)
    columns = (D, D, D, D, H * V, D, D, N)
    missing = {i for i, w in enumerate(weights) if w is None}
    fits = (
        number in _NUMBERS
        and readable(weights, number, [n * m for n, m in zip(rows, columns, strict=True)])
        and readable(shell[:4], torch.float32, (D, D, D, D))
        and readable((core.log_decay,), torch.float32, (H,))
        and readable((core.theta,), torch.float64, (0 if core.layout == "none" else K // 2,))
        and readable(scales, torch.float32, rows)
        and missing <= {3, 6}  # the gates
        and (number is torch.float32 or missing == {i for i, s in enumerate(scales) if s is None})
    )
    if not fits:
        return None
    flags = (
        gate is not None,
        _LAYOUTS[core.layout],
        core.bridge,
        _NORMS[core.norm],
        ffn_gate is not None,
        shell.act == "silu",
    )
    tensors = (*shell[:4], *weights, core.log_decay, core.theta, *scales)
    return _Block(number, (D, H, K, V, N), flags, (core.eps, shell.norm_eps), tensors)


def _ends_fit(ends: Ends, block: _Block) -> bool:
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


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]
