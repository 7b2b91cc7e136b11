"""Tile sizes of the Triton kernels by GPU architecture and head shape: plain numbers, without Triton or a GPU.

The rows are chosen so that every kernel compiles without spilled registers within the shared memory of its architecture;
`python -m tools.compile_report` compiles them all and prints what each needs. They are not measured on a GPU:
`RETNET_TRITON_AUTOTUNE=1` (see `autotune`) looks for better ones on the machine it runs on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

CHUNK = (
    256  # C: bytes of snapshots against operations inside a chunk; near the optimum of both from K 64 to 256
)
MAX_KEY_DIM = 256  # a step keeps a column of K numbers in registers
MAX_VALUE_DIM = 1024
ROTARY_SIZE = 1024  # pairs of q, and of k, in a program's registers
NORM_SIZE = 2048  # numbers of the heads' outputs in a program's registers
PARTS = (
    64  # partial sums of the gradients of a norm's weights, a head; a constant, so that their order is one
)
PROGRAMS = 2048  # enough to fill any GPU; a program of ROTARY takes more heads where there are more


class StateTiles(NamedTuple):
    """Of STATE: tokens at a time, rows and columns of the state, warps, stages of the software pipeline."""

    bt: int
    ba: int
    bz: int
    warps: int
    stages: int


class OutTiles(NamedTuple):
    """Of OUT: rows and columns of scores, widths of their contraction and of the state's, columns of the output."""

    bm: int
    bn: int
    bx: int
    bs: int
    bz: int
    warps: int
    stages: int


class StepTiles(NamedTuple):
    """Of STEP: numbers of the state in a program's registers, warps."""

    size: int
    warps: int


class RowTiles(NamedTuple):
    """Of the kernels around retention, which memory bounds: tokens and columns of a program, warps."""

    rows: int
    columns: int
    warps: int


class ArchitectureTiles(NamedTuple):
    """One architecture: STATE, OUT by the widest contraction a row serves, both for half types; and STEP."""

    state: StateTiles
    out: dict[int, OutTiles]
    step: StepTiles


TABLES: dict[str, ArchitectureTiles] = {
    "sm_80": ArchitectureTiles(
        StateTiles(64, 64, 128, 4, 3),
        {
            64: OutTiles(128, 64, 64, 64, 128, 8, 3),
            128: OutTiles(128, 64, 128, 64, 128, 8, 2),
            1024: OutTiles(128, 64, 64, 64, 128, 8, 3),
        },
        StepTiles(8192, 4),
    ),
    "sm_90": ArchitectureTiles(
        StateTiles(64, 64, 128, 4, 3),
        {
            64: OutTiles(128, 64, 64, 64, 256, 8, 3),
            128: OutTiles(128, 64, 128, 64, 256, 8, 2),
            256: OutTiles(128, 32, 256, 64, 256, 8, 3),
            1024: OutTiles(128, 64, 64, 64, 256, 8, 2),
        },
        StepTiles(8192, 4),
    ),
    "sm_100": ArchitectureTiles(
        StateTiles(64, 64, 128, 4, 3),
        {
            64: OutTiles(128, 64, 64, 64, 256, 8, 3),
            128: OutTiles(128, 64, 128, 64, 256, 8, 2),
            1024: OutTiles(128, 64, 64, 64, 256, 8, 3),
        },
        StepTiles(8192, 4),
    ),
    "gfx942": ArchitectureTiles(
        StateTiles(64, 64, 128, 4, 2),
        {
            64: OutTiles(128, 64, 64, 64, 128, 8, 2),
            1024: OutTiles(128, 64, 64, 64, 128, 8, 2),
        },
        StepTiles(8192, 4),
    ),
    "default": ArchitectureTiles(  # within 64 KB of shared memory
        StateTiles(32, 64, 64, 4, 2),
        {1024: OutTiles(64, 32, 64, 32, 64, 4, 2)},
        StepTiles(4096, 4),
    ),
}
# fp32 in full precision runs without tensor cores: the same small tiles everywhere.
WIDE_STATE = StateTiles(32, 64, 64, 4, 2)
WIDE_OUT = OutTiles(64, 32, 32, 32, 64, 4, 2)


def family(architecture: str) -> str:
    """The key of `TABLES` that stands for an architecture ("sm_90", "gfx942"), whether or not it is there."""
    return {"sm_103": "sm_100", "gfx950": "gfx942"}.get(architecture, architecture)


def table(architecture: str) -> ArchitectureTiles:
    """The row of an architecture by its name, its family's, or the one that fits any."""
    return TABLES.get(family(architecture), TABLES["default"])


def count_chunks(batch: int, tokens: int, documents: int | None, length: int) -> int:
    """Chunks of all rows; of packed documents the most there can be, so that nothing waits for their lengths."""
    return batch * ((tokens + length - 1) // length) if documents is None else tokens // length + documents


def snapshot_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the states at chunk boundaries: that of the inputs, but fp32 for fp16, whose range a state can leave."""
    return torch.float32 if dtype == torch.float16 else dtype


def round_up(length: int, multiple: int) -> int:
    """The least positive multiple that is at least `length`."""
    return max(1, (length + multiple - 1) // multiple) * multiple


def _power(n: int) -> int:
    """The least power of two that is at least n, and at least 16, which is what a matrix unit takes."""
    return max(16, 1 << (n - 1).bit_length())


def _divides(chunk: int, most: int) -> int:
    """The greatest power of two up to `most` that divides a chunk."""
    return min(most, chunk & -chunk)


def state_tiles(architecture: str, A: int, Z: int, dtype: torch.dtype) -> StateTiles:
    """Tiles of STATE for a state [A,Z] of inputs in `dtype`."""
    row = WIDE_STATE if dtype == torch.float32 else table(architecture).state
    return row._replace(ba=min(row.ba, _power(A)), bz=min(row.bz, _power(Z)))


def out_tiles(architecture: str, X: int, Z: int, dtype: torch.dtype) -> OutTiles:
    """Tiles of OUT for scores contracted over X and outputs of width Z."""
    if dtype == torch.float32:
        row = WIDE_OUT
    else:
        rows = table(architecture).out
        half = (
            dtype == torch.float16
        )  # its snapshots are fp32: half as many at a time, no wide rows kept beside them
        row = rows[max(rows) if half and X > 128 else min(width for width in rows if width >= X)]
        row = row._replace(bs=row.bs // 2) if half else row
    x, z = _power(X), _power(Z)
    return row._replace(bx=min(row.bx, x), bs=min(row.bs, x), bz=min(row.bz, z))


def step_tiles(architecture: str, K: int, V: int) -> tuple[int, int, int]:
    """(BK, BV, warps) of STEP for a state [K,V]."""
    size, warps = table(architecture).step
    keys = 1 << (K - 1).bit_length()
    return keys, max(1, min(size // keys, 1 << (V - 1).bit_length())), warps


def rotary_tiles(pairs: int) -> RowTiles:
    """Tiles of ROTARY for heads of so many pairs."""
    return _row_tiles(ROTARY_SIZE, pairs)


def norm_tiles(V: int) -> RowTiles:
    """Tiles of NORM for heads of width V."""
    return _row_tiles(NORM_SIZE, V)


def _row_tiles(size: int, width: int) -> RowTiles:
    columns = _power(width)
    return RowTiles(max(1, size // columns), columns, 4)


def fit_state(tiles: StateTiles, chunk: int) -> StateTiles:
    """Blocks of tokens that divide a chunk."""
    return tiles._replace(bt=_divides(chunk, tiles.bt))


def fit_out(tiles: OutTiles, chunk: int, tokens: int) -> OutTiles:
    """Rows that divide a chunk, and no more of them than a short sequence fills."""
    bm = min(_divides(chunk, tiles.bm), _power(tokens))
    return tiles._replace(bm=bm, bn=min(tiles.bn, bm))
