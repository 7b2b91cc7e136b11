"""Autotuning of the Triton kernels: opt-in search for better tiles than the table's, remembered on disk.

With `RETNET_TRITON_AUTOTUNE=1` the first call of each kernel at each head shape, type and architecture times its
neighbours in the table's sense (`candidates`) on the call's own arguments, which takes seconds; the winner is kept in
`$RETNET_CACHE/triton.json` (default: `retnet/` in the user's cache directory) and used from then on.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import triton

from retnet.io import cache_folder
from retnet.ops.triton.tile_table import OutTiles, StateTiles

Tiles = TypeVar("Tiles", StateTiles, OutTiles)
_log = logging.getLogger("retnet.ops")
_known: dict[Path, dict[str, list[int]]] = {}  # what each file holds


def tuned(
    kernel: str,
    architecture: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tiles: Tiles,
    run: Callable[[Tiles], None],
) -> Tiles:
    """The tiles to run with: the table's unless tuning is on, then the fastest found now or before.

    Args:
        kernel: ``"state"`` or ``"out"``.
        architecture: as `capability.architecture` names it.
        shape: of the head and the pass: the key must hold whatever changes the compiled code.
        dtype: of the inputs.
        tiles: the table's.
        run: runs the pass with given tiles; its outputs may be overwritten again and again.
    """
    if os.environ.get("RETNET_TRITON_AUTOTUNE", "0") in ("", "0"):
        return tiles
    key = "/".join(map(str, (kernel, architecture, *shape, dtype, triton.__version__)))
    known = _read(path())
    if len(known.get(key, ())) != len(tiles):
        known[key] = list(_fastest(key, candidates(tiles), run))
        _write(path(), known)
    return type(tiles)(*known[key])


def path() -> Path:
    """Where the winners are kept."""
    return cache_folder() / "triton.json"


def candidates(tiles: Tiles) -> list[Tiles]:
    """The tiles themselves, and each with one thing changed: stages, warps, or one width halved."""
    found = [tiles]
    changes = {"stages": (1, 2, 3, 4), "warps": (4, 8)}
    for name, value in tiles._asdict().items():
        for other in changes.get(name, (value // 2,)):
            if other != value and (name in changes or other >= 16):
                found.append(tiles._replace(**{name: other}))
    return found


def _fastest(key: str, found: list[Tiles], run: Callable[[Tiles], None]) -> Tiles:
    times: dict[Tiles, float] = {}
    for tiles in found:
        try:
            times[tiles] = float(triton.testing.do_bench(partial(run, tiles), return_mode="median"))
        except (RuntimeError, triton.runtime.errors.PTXASError) as error:  # does not fit this GPU
            _log.debug("tuning %s: %s cannot run: %s", key, tiles, error)
    if not times:
        raise RuntimeError(f"no tiles for {key} fit this GPU; use backend='reference'")
    best = min(times, key=times.__getitem__)
    _log.info(
        "tuning %s: %s, %.3f ms (the table's: %.3f ms)",
        key,
        best,
        times[best],
        times.get(found[0], float("nan")),
    )
    return best


def _read(file: Path) -> dict[str, list[int]]:
    if file not in _known:
        try:
            content = json.loads(file.read_text()) if file.exists() else {}
            _known[file] = {key: [int(size) for size in tiles] for key, tiles in content.items()}
        except (ValueError, TypeError, AttributeError):
            _log.warning("tuning: %s does not hold what tuning writes; it is written anew", file)
            _known[file] = {}
    return _known[file]


def _write(file: Path, known: dict[str, list[int]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    _known.pop(file, None)
    known |= _read(file) | known  # what other processes found meanwhile
    _known[file] = known
    temporary.write_text(json.dumps(known, indent=1, sort_keys=True))
    temporary.replace(file)  # there completely or not at all
