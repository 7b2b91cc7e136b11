"""Compiles every kernel for GPUs that are not there, and says what each needs: `python -m tools.compile_report`.

Registers, spilled bytes, shared memory against the architecture's limit, the matrix instruction in use, and whether the
pattern that Triton 3.4 to 3.7.0 miscompiles on Hopper is there. No driver is needed; NVIDIA's assembler and disassembler
come with Triton. Speed is not in it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.console import Console
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import JITFunction

from retnet.ops.triton import launch, rotary_norm_kernels, rotary_norm_launch, tile_table
from retnet.ops.triton.chunkwise_kernels import (
    retention_chunkwise_out_triton,
    retention_chunkwise_state_triton,
)
from retnet.ops.triton.step_kernel import retention_step_triton
from retnet.tables import MISSING, Table, print_table

SHAPES = ((64, 128), (128, 256), (256, 512))
SPILL_LIMIT = 64  # bytes a thread; a spill of a few registers outside the inner loop costs nothing


class Target(NamedTuple):
    """An architecture to compile for, its limits and its sign of matrix units at work."""

    gpu: GPUTarget
    shared: int  # bytes a program may have
    instruction: str
    stage: str  # of compilation, where the instruction shows


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166_912, "mma.sync", "ptx"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232_448, "HGMMA", "sass"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232_448, "tcgen05.mma", "ptx"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65_536, "v_mfma", "amdgcn"),
}


class KernelNeeds(NamedTuple):
    """What one compiled kernel needs."""

    architecture: str
    key_dim: int
    value_dim: int
    kernel: str
    tiles: str
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes a program
    matrix: bool  # runs on the matrix units
    copies: str  # how loads reach shared memory: "bulk" (TMA), "async" (cp.async), or they do not
    programs: int  # that fit one multiprocessor at a time; 0: not known of this architecture
    miscompiled: bool  # the transposed result of a product goes into a product
    faults: tuple[str, ...]


# name, kernel, constants, options, tiles
Entry = tuple[str, JITFunction, dict[str, Any], dict[str, Any], str]


def kernels_of(architecture: str, K: int, V: int, dtype: torch.dtype, packed: bool) -> Iterator[Entry]:
    """(name, kernel, constants, options, tiles) of everything that a head [K,V] runs, forward, backward and decoding."""
    yield from _retention_kernels(architecture, K, V, dtype, packed)
    for name, interleaved in (("ROTARY i", True), ("ROTARY h", False)):  # interleaved, halves
        if K % 2 == 0:
            constants, rows = rotary_norm_launch.rotary_constants(K, interleaved)
            yield _tiled(name, rotary_norm_kernels.rotary_triton, constants, rows)
    for name, kernel, more in (
        ("NORM", rotary_norm_kernels.head_norm_triton, {"SUMS": True}),
        ("NORM dx", rotary_norm_kernels.head_norm_backward_triton, {}),
    ):
        constants, rows = rotary_norm_launch.norm_constants(
            V, "group", gated=True, weighed=True, shifted=True
        )
        yield _tiled(name, kernel, constants | more, rows)


def _retention_kernels(
    architecture: str, K: int, V: int, dtype: torch.dtype, packed: bool
) -> Iterator[Entry]:
    precision = launch.precisions(dtype, architecture.startswith("sm"))
    state = tile_table.fit_state(tile_table.state_tiles(architecture, K, V, dtype), tile_table.CHUNK)
    for name, reverse in (("STATE h", False), ("STATE dh", True)):
        constants = launch.state_constants(
            K, V, state, precision[0], reverse=reverse, from_zero=not reverse, packed=packed
        )
        yield _tiled(name, retention_chunkwise_state_triton, constants, state)
    passes = (
        ("OUT o", K, V, False, False),
        ("OUT dq", V, K, False, True),
        ("OUT dk", V, K, True, True),
        ("OUT dv", K, V, True, False),
    )
    for name, X, Z, reverse, transposed in passes:
        out = tile_table.fit_out(
            tile_table.out_tiles(architecture, X, Z, dtype), tile_table.CHUNK, tile_table.CHUNK
        )
        constants = launch.out_constants(
            X, Z, out, precision, reverse=reverse, transposed=transposed, packed=packed
        )
        yield _tiled(name, retention_chunkwise_out_triton, constants, out)
    keys, values, warps = tile_table.step_tiles(architecture, K, V)
    constants = {"K": K, "V": V, "BK": keys, "BV": values, "SLOTS": True, "GATED": False}
    yield "STEP", retention_step_triton, constants, launch.options(warps), f"{keys}×{values} w{warps}"


def _tiled(
    name: str,
    kernel: JITFunction,
    constants: dict[str, Any],
    tiles: tile_table.StateTiles | tile_table.OutTiles | tile_table.RowTiles,
) -> Entry:
    if isinstance(tiles, tile_table.RowTiles):
        words = f"{tiles.rows}×{tiles.columns} w{tiles.warps}"
        return name, kernel, constants, launch.options(tiles.warps), words
    words = "×".join(map(str, tiles[:-2])) + f" w{tiles.warps} s{tiles.stages}"
    return name, kernel, constants, launch.options(tiles.warps, tiles.stages), words


_NARROW = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_TYPES = {
    **dict.fromkeys(("initial", "final", "state", "log_decay"), "*fp32"),
    **dict.fromkeys(("weight", "bias", "mean", "rstd", "d_weight", "d_bias"), "*fp32"),
    **dict.fromkeys(("theta", "sums"), "*fp64"),
    **dict.fromkeys(("bounds", "first_chunk", "table", "slots"), "*i32"),
    **dict.fromkeys(("scale", "sign", "eps"), "fp32"),
    "position": "*i64",
}
_INPUTS = ("a", "x", "y", "z", "out", "q", "k", "v", "q_out", "k_out", "o", "gate", "d_out", "d_o", "d_gate")
_PRODUCTS = ("STATE", "OUT")  # kernels that must run on the matrix units


def compile_for(
    target: Target,
    kernel: JITFunction,
    constants: dict[str, Any],
    options: dict[str, Any],
    dtype: torch.dtype,
) -> CompiledKernel:
    """The compiled kernel, for inputs of `dtype` with addresses and strides that are multiples of 16."""
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in _INPUTS:
            signature[name] = _NARROW[dtype]
        elif name == "snapshots":
            signature[name] = _NARROW[tile_table.snapshot_dtype(dtype)]
        else:
            signature[name] = _TYPES.get(name, "i32")
        if signature[name].startswith("*") or name.endswith(("_row", "_token", "_head")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target.gpu, options=options)


def resources(compiled: CompiledKernel) -> tuple[int, int]:
    """(registers a thread, bytes a thread spills)."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        number = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s*(\d+)", text)}
        return number["vgpr_count"], 4 * (number["vgpr_spill_count"] + number["sgpr_spill_count"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        shown = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown)
    assert found is not None, shown
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def copies(compiled: CompiledKernel) -> str:
    """How NVIDIA's kernels bring tiles into shared memory: by the bulk copy engine, asynchronous copies, or not at all."""
    text = compiled.asm.get("ptx", "")
    kinds = {"bulk": "cp.async.bulk", "async": "cp.async.c"}  # cp.async.ca and cp.async.cg
    return next((kind for kind, instruction in kinds.items() if instruction in text), MISSING)


def programs_at_once(target: Target, registers: int, shared: int, warps: int) -> int:
    """Programs that one multiprocessor of an NVIDIA GPU holds: bounded by registers, shared memory and warps."""
    if target.gpu.backend != "cuda":
        return 0
    each = -(-registers * 32 // 256) * 256 * warps  # registers are handed out to warps in 256s
    room = target.shared + 1024  # of which every program takes a KB more than it asks for
    return min(65_536 // each, room // (shared + 1024), 64 // warps)


def transposes_a_product(compiled: CompiledKernel) -> bool:
    """Whether the result of a product is transposed in registers, the pattern that Hopper miscompiled."""
    return re.search(r"tt\.trans .*#mma\w*> ->", compiled.asm["ttgir"]) is not None


def examine(
    architecture: str, K: int, V: int, dtype: torch.dtype = torch.bfloat16, *, packed: bool = False
) -> list[KernelNeeds]:
    """Compiles all kernels of a head [K,V] for an architecture; each row lists what is wrong with it."""
    target, rows = TARGETS[architecture], []
    for name, kernel, constants, options, tiles in kernels_of(architecture, K, V, dtype, packed):
        compiled = compile_for(target, kernel, constants, options, dtype)
        registers, spilled = resources(compiled)
        shared = int(compiled.metadata.shared)
        matrix = target.instruction in compiled.asm[target.stage]
        miscompiled = transposes_a_product(compiled)
        faults = []
        if shared > target.shared:
            faults.append(f"{shared} bytes of shared memory, the limit is {target.shared}")
        if spilled > SPILL_LIMIT:
            faults.append(f"{spilled} bytes spilled, the limit is {SPILL_LIMIT}")
        if name.startswith(_PRODUCTS) and dtype != torch.float32 and not matrix:
            faults.append(f"no {target.instruction}")
        if miscompiled:
            faults.append("a product of the transposed result of a product")
        rows.append(
            KernelNeeds(
                architecture,
                K,
                V,
                name,
                tiles,
                registers,
                spilled,
                shared,
                matrix,
                copies(compiled),
                programs_at_once(target, registers, shared, options["num_warps"]),
                miscompiled,
                tuple(faults),
            )
        )
    return rows


def print_report(architectures: Sequence[str]) -> int:
    """Prints a row for every kernel of every head shape; returns how many kernels break a limit."""
    print(f"Triton {triton.__version__}, bf16, chunks of {tile_table.CHUNK} tokens")
    found: list[KernelNeeds] = []
    for architecture in architectures:
        for K, V in SHAPES:
            print(f"compiling for {architecture}, K {K}, V {V}", file=sys.stderr)
            found += examine(architecture, K, V)
    columns = (
        "GPU",
        "K/V",
        "kernel",
        "tiles",
        "registers",
        "spilled, B",
        "shared, KB",
        "matrix units",
        "copies",
        "programs a multiprocessor",
        "faults",
    )
    rows = tuple(
        (
            row.architecture,
            f"{row.key_dim}/{row.value_dim}",
            row.kernel,
            row.tiles,
            str(row.registers),
            str(row.spilled),
            f"{row.shared / 1024:.0f}",
            TARGETS[row.architecture].instruction if row.matrix else MISSING,
            row.copies,
            str(row.programs or MISSING),
            "; ".join(row.faults),
        )
        for row in found
    )
    print_table(Table("What each kernel needs", columns, rows), Console(highlight=False))
    faults = sum(bool(row.faults) for row in found)
    print(f"{faults} kernels break a limit." if faults else "All within limits.")
    return faults
