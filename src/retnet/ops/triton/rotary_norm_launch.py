"""Launch of the Triton kernels of rotary and head norm (`rotary_norm_kernels`): addresses, constants and grids.

Imports Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from retnet.ops.triton import rotary_norm_kernels, tile_table
from retnet.ops.triton.launch import options, start


def rotary_constants(K: int, interleaved: bool) -> tuple[dict[str, Any], tile_table.RowTiles]:
    """The compile-time arguments of ROTARY, and its tiles."""
    tiles = tile_table.rotary_tiles(K // 2)
    return {"K": K, "BN": tiles.rows, "BP": tiles.columns, "INTERLEAVED": interleaved}, tiles


def norm_constants(
    V: int, norm: str, *, gated: bool, weighed: bool, shifted: bool
) -> tuple[dict[str, Any], tile_table.RowTiles]:
    """The compile-time arguments that NORM and NORM' share, and their tiles."""
    tiles = tile_table.norm_tiles(V)
    constants = {"V": V, "BN": tiles.rows, "BV": tiles.columns, "NORM": norm}
    return constants | {"GATED": gated, "WEIGHED": weighed, "SHIFTED": shifted}, tiles


def _tokens(x: Tensor) -> Tensor:
    """[...,H,W] as [tokens,H,W], its last dimension dense; a view wherever there is one."""
    x = x.flatten(0, -3)
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1)


def rotary_pass(
    q: Tensor, k: Tensor, position: Tensor, theta: Tensor, interleaved: bool, backwards: bool
) -> tuple[Tensor, Tensor]:
    """ROTARY: q and k [...,H,K] turned by position · θ, or back by it; contiguous."""
    H, K = q.shape[-2:]
    position = position.contiguous()
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    q, k = _tokens(q), _tokens(k)
    constants, tiles = rotary_constants(K, interleaved)
    blocks = triton.cdiv(len(q), tiles.rows)
    heads = min(
        H, max(1, blocks * H // tile_table.PROGRAMS)
    )  # a long sequence computes its angles once for all heads
    start(
        rotary_norm_kernels.rotary_triton,
        blocks * triton.cdiv(H, heads) if H else 0,
        q.device,
        *(q, k, q_out, k_out, position, theta, -1.0 if backwards else 1.0),
        *(len(q), position.numel(), heads, H, *_strides(q), *_strides(k)),
        **constants,
        **options(tiles.warps),
    )
    return q_out, k_out


def norm_pass(
    o: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """NORM: o [...,H,V] normalised and gated, [...,H·V]; mean (if the norm centres) and rstd, fp32 [...,H]."""
    H, V = o.shape[-2:]
    out = (o if gate is None else gate).new_empty(*o.shape[:-2], H * V)
    rstd = o.new_empty(o.shape[:-1], dtype=torch.float32)
    mean = rstd.new_empty(rstd.shape if norm == "group" else (0,))
    sums = None if sums is None else sums.contiguous()
    o = _tokens(o)
    gate = None if gate is None else _tokens(gate.unflatten(-1, (H, V)))
    constants, tiles = norm_constants(
        V, norm, gated=gate is not None, weighed=weight is not None, shifted=bias is not None
    )
    start(
        rotary_norm_kernels.head_norm_triton,
        triton.cdiv(len(o), tiles.rows) * H,
        o.device,
        *(o, *_or(o, gate, weight, bias, sums), out, mean, rstd, eps),
        *(
            len(o),
            1 if sums is None else sums.numel() // H,
            H,
            *_strides(o),
            *_strides(o if gate is None else gate),
        ),
        **constants,
        SUMS=sums is not None,
        **options(tiles.warps),
    )
    return out, mean, rstd


def norm_backward_pass(
    d_out: Tensor,
    o: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """NORM': gradients of o, gate, weight and bias, in their types and shapes; empty for those that are not there."""
    H, V = o.shape[-2:]
    d_o, d_gate, d_weight, d_bias = (
        o.new_empty(0) if x is None else x.new_empty(x.shape) for x in (o, gate, weight, bias)
    )
    constants, tiles = norm_constants(
        V, norm, gated=gate is not None, weighed=weight is not None, shifted=bias is not None
    )
    o, d_out = _tokens(o), _tokens(d_out.unflatten(-1, (H, V)))
    gate = None if gate is None else _tokens(gate.unflatten(-1, (H, V)))
    blocks = triton.cdiv(len(o), tiles.rows)
    parts = blocks if weight is None and bias is None else min(blocks, tile_table.PARTS)
    partial = [o.new_empty(parts * (x is not None), H * V, dtype=torch.float32) for x in (weight, bias)]
    start(
        rotary_norm_kernels.head_norm_backward_triton,
        parts * H,
        o.device,
        *(d_out, o, *_or(o, gate, weight, bias), mean, rstd, d_o, d_gate, *partial),
        *(len(o), parts, H, *_strides(d_out), *_strides(o), *_strides(o if gate is None else gate)),
        **constants,
        **options(tiles.warps),
    )
    for total, sums, x in ((d_weight, partial[0], weight), (d_bias, partial[1], bias)):
        if x is not None:
            total.copy_(sums.sum(0).view(x.shape))
    return d_o, d_gate, d_weight, d_bias


def _or(unused: Tensor, *given: Tensor | None) -> list[Tensor]:
    """Each tensor, or a stand-in for a pointer that the variant in use never reads."""
    return [unused if x is None else x for x in given]
