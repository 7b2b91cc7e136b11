"""The step ``tune``: the tile table of this card's architecture, row by row, by climbing from the rows that are there.

A row serves several passes (OUT's rows all passes that contract over so much, at any head shape), so a candidate is judged
by the geometric mean of its times ÷ those of the row in use. Winners go into a patch of the table, and are checked again.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, wait
from contextlib import suppress
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from retnet.io import write_text
from retnet.measure.clock import stopwatch
from retnet.measure.summary import Summary
from retnet.ops.triton import capability, tile_table
from retnet.tables import MISSING, Table
from tools.gpu_day.cases import Case, replaced, table_with
from tools.gpu_day.checks import Checks
from tools.gpu_day.notebook import Found, file_name
from tools.gpu_day.place import Place, Run, StoppedError, interpret_exactly, usable
from tools.gpu_day.tiles import NUM_HEADS, TOKENS, WIDTHS, Pass, Tiles, neighbours, passes
from tools.gpu_day.verify import HEADS, TYPES, base, of_heads, tiny

AT_ONCE = 14  # candidates compiled at a time
WAKING = 30.0  # seconds that the processes which compile have to begin
CHECK = 10.0  # seconds kept for checking the best
GAIN = 0.98  # of the time in use that a winner takes at most: less is noise
SINGLE = ("state", "step")  # kernels with one row in the table
NOTES = (
    "Geometric mean over all passes that the row serves. Tiles: tokens, rows, columns, warps, stages (STATE); rows, "
    "columns, contraction of scores, of the state, columns of the output, warps, stages (OUT); numbers of the state, warps "
    "(STEP). The best was checked in all "
    "three types at every head shape whose kernels it changes, and is in the patch only if all of it was right.",
)


def search(kind: str, place: Place) -> Found:
    """Climbs from the row in use as long as there is time, and checks where it has come to against fp64.

    Raises:
        StoppedError: there was no time to try any other, or to check it; another attempt begins anew, its kernels compiled.
    """
    found = climb(kind, place)
    if found["best"] == found["start"]:
        return found
    name, best = found["architecture"], found["best"]
    rows = _rows(kind, best)
    cases = [
        case
        for K, V in shapes_of(kind, name, rows)
        for dtype in TYPES
        for case in _cases(kind, K, V, dtype, tiles=rows)
    ]
    if place.rehearsal:
        cases = [tiny(case) for case in cases[:1]]
    checks = Checks(place, cases, lambda checked: place.note({**found, "checked": checked}))
    checked = checks.run(min(place.until, place.ended - CHECK))
    found |= {"checked": checked, "verified": 0 < len(cases) == checked["right"]}
    if checked["missed"]:
        place.note(found)
        raise StoppedError("there was no time to check its winner")
    return found


def _cases(kind: str, K: int, V: int, dtype: str, **more: Any) -> Iterable[Case]:  # noqa: ANN401
    """That the row of a kind is checked with at one head shape."""
    if kind == "step":
        return [{**base(K=K, V=V, dtype=dtype, B=5, T=T, **more), "kind": "step"} for T in (1, 3)]
    return of_heads(K, V, dtype, **more)


def shapes_of(kind: str, name: str, rows: dict[str, Any]) -> list[tuple[int, int]]:
    """The head shapes whose kernels are others with these rows in the table of an architecture, in any type."""

    def used() -> Sequence[object]:
        if kind == "step":
            return [tile_table.step_tiles(name, K, V) for K, V in HEADS]
        types = [getattr(torch, dtype) for dtype in TYPES]
        if kind == "state":
            return [[tile_table.state_tiles(name, K, V, dtype) for dtype in types] for K, V in HEADS]
        pairs = [((K, V), (V, K), (K, K), (V, V)) for K, V in HEADS]
        return [
            [tile_table.out_tiles(name, X, Z, dtype) for dtype in types for X, Z in of_head]
            for of_head in pairs
        ]

    before = used()
    with table_with(name, rows):
        after = used()
    return [shape for shape, a, b in zip(HEADS, before, after, strict=True) if a != b]


def climb(kind: str, place: Place) -> Found:
    """The best row found, noted after every batch; compiles candidates in several processes beforehand.

    Raises:
        StoppedError: no other could be tried.
    """
    _wake(place)
    until, device = time.time() + 60 * place.minutes - CHECK * (not place.rehearsal), place.device
    shapes, tokens, heads = (((16, 32),), 32, 1) if place.rehearsal else (HEADS, TOKENS, NUM_HEADS)
    name = tile_table.family(capability.architecture(device))
    start = _in_use(kind, tile_table.table(name))
    runs = passes(kind, device, tokens, heads, shapes)
    found = {"architecture": name, "kind": kind, "start": list(start), "best": list(start), "tried": []}
    if not runs:
        return found
    began = _times(runs, device, name, kind, start)
    if began is None:
        raise RuntimeError(f"the tiles in use, {tuple(start)}, do not run here; tune.log says why")
    tried, best, ratio = {start: 1.0}, start, 1.0
    compile_all = partial(_compile, kind, device.type, shapes)
    while waiting := [tiles for tiles in neighbours(best) if tiles not in tried]:
        before = best
        for first in range(0, 2 if place.rehearsal else len(waiting), AT_ONCE):
            batch = waiting[first : first + (2 if place.rehearsal else AT_ONCE)]
            for tiles in (ready := _compiled(compile_all, batch, place, until)):
                if time.time() > place.ended - 2 * CHECK:  # one that is compiled as it is timed takes long
                    break
                times = _times(runs, device, name, kind, tiles)
                tried[tiles] = _mean(times, began) if times else math.inf
                if tried[tiles] < GAIN * ratio:
                    best, ratio = tiles, tried[tiles]
            found |= {
                "best": list(best),
                "ratio": ratio,
                "milliseconds": [1e3 * t for t in began],
                "tried": [{"tiles": list(tiles), "ratio": ratio} for tiles, ratio in tried.items()],
            }
            place.note(found)
            if len(ready) < len(batch) and time.time() > until:
                break
        if best == before or place.rehearsal or time.time() > until:
            break
    if len(tried) < 2 and not place.rehearsal:
        raise StoppedError("no other tiles could be tried in its time")
    again = _times(runs, device, name, kind, start)  # the beginning once more: how far times wander
    return {**found, "start again": _mean(again, began) if again else None}


def winners(parts: dict[str, Found]) -> dict[str, Any]:
    """The rows that are faster than those in use, and right, as `tools.gpu_day.cases.replaced` has them."""
    found: dict[str, Any] = {}
    for kind, row in parts.items():
        if row.get("verified"):
            one = _rows(kind, row["best"])
            found |= {"out": found.get("out", {}) | one["out"]} if "out" in one else one
    return found


def patch(name: str, parts: dict[str, Found]) -> str:
    """The table with the winners in it, as source to be put in the place of the old one."""
    table = replaced(tile_table.table(name), winners(parts))
    lines = [f'    "{name}": ArchitectureTiles(', f"        {_written(table.state)},", "        {"]
    lines += [f"            {width}: {_written(tiles)}," for width, tiles in table.out.items()]
    return "\n".join([*lines, "        },", f"        {_written(table.step)},", "    ),"])


def _written(tiles: tuple[int, ...]) -> str:
    return f"{type(tiles).__name__}({', '.join(map(str, tiles))})"


def _in_use(kind: str, table: tile_table.ArchitectureTiles) -> Tiles:
    if kind in SINGLE:
        row: Tiles = getattr(table, kind)
        return row
    width = int(kind.removeprefix("out-"))
    return table.out[min(row for row in table.out if row >= width)]


def _times(runs: list[Pass], device: torch.device, name: str, kind: str, tiles: Tiles) -> list[float] | None:
    """Seconds of each pass with these tiles in the table; None if they do not fit."""
    with table_with(name, _rows(kind, tiles)):
        try:
            return [_seconds(run, device) for run in runs]
        except Exception as error:  # out of resources, or the compiler gave up: these tiles are out
            print(f"{kind} {tuple(tiles)}: {type(error).__name__}: {str(error)[:200]}")
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return None


def _seconds(run: Pass, device: torch.device) -> float:
    measure = stopwatch(run, device, budget=0.02)
    measure()
    return measure()


def _mean(times: list[float], began: list[float]) -> float:
    return math.exp(sum(math.log(a / b) for a, b in zip(times, began, strict=True)) / len(times))


def _rows(kind: str, tiles: Sequence[int]) -> dict[str, Any]:
    """One row as `tools.gpu_day.cases.replaced` has it."""
    return {kind: list(tiles)} if kind in SINGLE else {"out": {kind.removeprefix("out-"): list(tiles)}}


def _compiled(
    compile_all: Callable[[list[int]], bool], batch: Sequence[Tiles], place: Place, until: float
) -> list[Tiles]:
    """Compiles candidates before any of them is timed; those that there was time for.

    Compilers are replaced when one of them has died (what it was at is then compiled as it is timed), or has lost the card:
    then the candidates it was given are left out, for they would take the card from this process as well.
    """
    if time.time() > until:
        return []
    if (pool := _compilers(place.rehearsal)) is None:
        return list(batch)
    try:
        begun = [pool.submit(compile_all, list(tiles)) for tiles in batch]
        wait(begun, max(1.0, until - time.time()))
        answers = [None if one.cancel() or not one.done() else one.result() for one in begun]
    except BrokenExecutor:
        _compilers.cache_clear()
        return list(batch)
    if False in answers:
        pool.shutdown(wait=False, cancel_futures=True)
        _compilers.cache_clear()
    return [tiles for tiles, compiled in zip(batch, answers, strict=True) if compiled]


def _wake(place: Place) -> None:
    """Waits until all compilers have imported torch and met the card: no row is charged with it."""
    if (pool := _compilers(place.rehearsal)) is not None:
        with suppress(TimeoutError, BrokenExecutor):  # the next batch finds out
            list(pool.map(usable, [place.device] * AT_ONCE, timeout=WAKING))


@cache
def _compilers(rehearsal: bool) -> ProcessPoolExecutor | None:
    """Processes that compile candidates into Triton's cache; none in a rehearsal, which interprets."""
    count = min(AT_ONCE, (os.cpu_count() or 2) - 2)
    return None if rehearsal or count < 2 else ProcessPoolExecutor(count, get_context("spawn"))


def _compile(kind: str, device: str, shapes: tuple[tuple[int, int], ...], tiles: list[int]) -> bool:
    """Runs every pass once on few tokens, which leaves its kernel in the cache; whether this process still has the card."""
    interpret_exactly()
    where = torch.device(device)
    try:
        name = tile_table.family(capability.architecture(where))
        with table_with(name, _rows(kind, tiles)):
            for run in passes(kind, where, 512, NUM_HEADS, shapes):
                run()
    except Exception as error:
        print(f"{kind} {tuple(tiles)}: {type(error).__name__}: {str(error)[:200]}")
    return usable(where)


PARTS: dict[str, Run] = {
    **{kind: partial(search, kind) for kind in SINGLE},
    **{f"out-{width}": partial(search, f"out-{width}") for width in WIDTHS},
}


def write_patch(out: Path, rehearsal: bool, parts: dict[str, Found]) -> Path | None:
    """The table with all rows in it that were found faster and right; the file is removed if there are none."""
    path = out / file_name("tile_table.txt", rehearsal)
    if not winners(parts):
        path.unlink(missing_ok=True)
        return None
    write_text(path, patch(next(iter(parts.values()))["architecture"], parts) + "\n")
    return path


def summarise(parts: dict[str, Found]) -> Summary:
    """What was found for each row, and the patch of what was checked."""
    searched = {kind: found for kind, found in parts.items() if "best" in found}
    rows = tuple(
        (
            kind,
            "×".join(map(str, found["start"])),
            "×".join(map(str, found["best"])),
            f"{found.get('ratio', 1.0):.3f}",
            _checked(found),
            str(len(found["tried"])),
        )
        for kind, found in searched.items()
    )
    columns = ("row", "in use", "best", "time of the best ÷ in use", "the best against fp64", "tried")
    tables = [Table("Tiles", columns, rows, NOTES)]
    findings = [
        f"Tiles for {kind} that are faster, {'×'.join(map(str, found['best']))}, are {_checked(found)}; they are not in the "
        "patch."
        for kind, found in searched.items()
        if found["best"] != found["start"] and not found.get("verified")
    ]
    findings += [
        f"Tiles for {kind} that are right, {'×'.join(map(str, found['best']))}, take {found['ratio']:.2f} of the time of "
        "those in use; they are in the patch."
        for kind, found in searched.items()
        if found.get("verified")
    ]
    if winners(searched):
        source = patch(next(iter(searched.values()))["architecture"], searched).splitlines()
        lines = tuple((str(n + 1), line.strip()) for n, line in enumerate(source))
        tables.append(Table("For src/retnet/ops/triton/tile_table.py", ("line", "source"), lines))
    elif any(len(found["tried"]) > 1 for found in searched.values()) and not findings:
        findings.append("No tiles were faster than those in the table by more than 2 %.")
    return Summary(tuple(tables), (), tuple(findings))


def _checked(found: Found) -> str:
    """Of the best row, whether it is right."""
    if found["best"] == found["start"]:
        return MISSING
    checked = found.get("checked", {})
    if wrong := len(checked.get("wrong", ())):
        return f"wrong in {wrong} of {checked['cases']} cases"
    return f"right in {checked['cases']} cases" if found.get("verified") else "unverified"
