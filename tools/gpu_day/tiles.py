"""Rows of the tile table as `tune` tries them: the passes that a row serves, and its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from retnet.bench.kernels import chunkwise_passes
from retnet.ops import log_decays
from retnet.ops.triton import launch, tile_table
from retnet.ops.triton.autotune import candidates

SEQUENCES, TOKENS, NUM_HEADS = 4, 4096, 8  # as in training: a single sequence has few programs
WIDTHS = (64, 128, 256, 1024)  # of the rows of OUT
Tiles = tile_table.StateTiles | tile_table.OutTiles | tile_table.StepTiles
Pass = Callable[[], object]


def passes(
    kind: str, device: torch.device, tokens: int, heads: int, shapes: tuple[tuple[int, int], ...]
) -> list[Pass]:
    """All passes that a row serves: ``state``, ``out-WIDTH``, or ``step``."""
    if kind == "step":
        return [_step(device, tokens, heads, K, V) for K, V in shapes]
    found: list[Pass] = []
    for K, V in shapes:
        q, k, v, d_out = (
            torch.randn(SEQUENCES, tokens, heads, width, device=device, dtype=torch.bfloat16)
            for width in (K, K, V, V)
        )
        for name, run in chunkwise_passes(q, k, v, d_out).items():
            width = run.args[0].shape[3]  # that it contracts over
            row = "state" if name.startswith("STATE") else f"out-{min(n for n in WIDTHS if n >= width)}"
            found += [run] if row == kind else []
    return found


def _step(device: torch.device, tokens: int, heads: int, K: int, V: int) -> Pass:
    """A token of so many sequences that their states, 256 MiB with `TOKENS`, come from memory."""
    rows = max(1, min(tokens, (SEQUENCES * tokens << 12) // (heads * K * V)))
    q, k, v = (torch.randn(rows, heads, width, device=device, dtype=torch.bfloat16) for width in (K, K, V))
    state, log_decay = torch.zeros(rows, heads, K, V, device=device), log_decays("paper", heads).to(device)
    return partial(launch.step_pass, q, k, v, log_decay, state, None, K**-0.5)


def neighbours(tiles: Tiles) -> list[Tiles]:
    """What tuning in use would try, and one width doubled with another halved: as many registers, other traffic."""
    if isinstance(tiles, tile_table.StepTiles):
        sizes = (tiles.size // 2, tiles.size, 2 * tiles.size)
        every = (tile_table.StepTiles(size, warps) for size in sizes for warps in (2, 4, 8))
        return [other for other in every if other != tiles]
    found: list[Tiles] = list(candidates(tiles))[1:]
    if isinstance(tiles, tile_table.OutTiles):
        for up, down in (("bz", "bm"), ("bm", "bz"), ("bn", "bx"), ("bx", "bn"), ("bs", "bn")):
            more, less = getattr(tiles, up) * 2, getattr(tiles, down) // 2
            if more <= 512 and less >= 32:
                found.append(tiles._replace(**{up: more, down: less}))
                # a wider output fills shared memory: room for it is in the state's
                if up == "bz" and tiles.bs >= 64:
                    found.append(tiles._replace(**{up: more, down: less, "bs": tiles.bs // 2}))
    else:  # larger tiles of the state read less and are fewer: which counts depends on the card
        for ba, bz in ((2 * tiles.ba, tiles.bz), (tiles.ba, 2 * tiles.bz), (tiles.ba // 2, 2 * tiles.bz)):
            found += [tiles._replace(ba=ba, bz=bz, warps=warps) for warps in (4, 8) if ba >= 32 and bz <= 256]
        found.append(tiles._replace(bt=tiles.bt * 2))
    return list(dict.fromkeys(found))
