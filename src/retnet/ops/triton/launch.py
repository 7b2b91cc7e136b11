"""Launch of the Triton kernels of retention: addresses, compile-time constants and grids of every pass.

Imports Triton; import it when it is needed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from retnet.ops import decay
from retnet.ops.torch_private import assert_on_device
from retnet.ops.triton import chunkwise_kernels, tile_table
from retnet.ops.triton.autotune import tuned
from retnet.ops.triton.capability import architecture
from retnet.ops.triton.step_kernel import retention_step_triton
from retnet.ops.triton.tile_table import OutTiles, StateTiles

LOG2_E = 1.4426950408889634
_REACH = 1 << 31  # what a tile addresses from its first element fits 32 bits
_LONGEST = 256  # tokens in a tile, at most


class Chunks(NamedTuple):
    """How the tokens of a call are cut: `length` tokens a chunk, chunks counted over all rows or documents."""

    length: int
    rows: int  # of the batch, or documents
    tokens: int  # T
    per_row: int  # chunks of each row; of packed documents an upper bound, all together
    total: int
    bounds: Tensor | None  # [rows+1] int32, begin of each document
    first: Tensor | None  # [rows] int32, number of its first chunk
    table: Tensor | None  # [total,2] int32, begin and end of each chunk


def cut(q: Tensor, cu_seqlens: Tensor | None, length: int) -> Chunks:
    """Cuts rows or packed documents into chunks of `length` tokens. No value is read back from the device."""
    B, T = q.shape[:2]
    if cu_seqlens is None:
        per_row = tile_table.count_chunks(1, T, None, length)
        return Chunks(length, B, T, per_row, B * per_row, None, None, None)
    documents = len(cu_seqlens) - 1
    total = tile_table.count_chunks(B, T, documents, length)
    bounds = cu_seqlens.long()
    lengths = bounds.diff()
    fits = (bounds[0] == 0) & (bounds[-1] == T) & (lengths >= 0).all()
    assert_on_device(fits, f"cu_seqlens must rise from 0 to T = {T}")
    chunks = (lengths + length - 1) // length
    ends = chunks.cumsum(0)
    first = ends - chunks
    number = torch.arange(total, device=q.device)
    document = torch.searchsorted(ends, number, right=True).clamp(max=max(0, documents - 1))
    if documents:
        begin = bounds[document] + (number - first[document]) * length  # past the last chunk: end ≤ begin
        table = torch.stack([begin, torch.minimum(begin + length, bounds[document + 1])], dim=1)
    else:
        table = bounds.new_zeros(total, 2)
    return Chunks(length, documents, T, total, total, bounds.int(), first.int(), table.int())


def log2_sums(log_decay: Tensor, cu_seqlens: Tensor | None, length: int) -> Tensor:
    """What STATE and OUT read of the decays: ln γ [H] as it is; by token, log2 of the γ's product since its chunk began.

    The sums over a chunk of `length` tokens are differences of fp64 sums over all, [B,T,H,2]: in fp32, and what that rounds
    off. A γ > 1 makes those NaN that it is in.
    """
    if log_decay.dim() == 1:
        return log_decay.contiguous()
    T, device = log_decay.shape[1], log_decay.device
    log_decay = torch.where(log_decay <= 0, log_decay, torch.nan)
    token = torch.arange(T, device=device)
    place = token if cu_seqlens is None else token - decay.documents_of(T, cu_seqlens)[1]
    sums = decay.sums_between(log_decay.clamp(min=decay.LEAST), token - place % length, token + 1) * LOG2_E
    return torch.stack([sums, sums - sums.float()], dim=-1).float()


def precisions(dtype: torch.dtype, nvidia: bool) -> tuple[str, str]:
    """How fp32 numbers are multiplied, in the scores and with the state.

    fp32 inputs follow `torch.set_float32_matmul_precision`, as torch's own products do: exact unless allowed otherwise.
    The fp32 snapshots of fp16 inputs meet fp16 numbers, and TF32 has their precision.
    """
    loose = "tf32" if nvidia else "ieee"
    exact = torch.get_float32_matmul_precision() == "highest"
    return ("ieee" if exact else loose), (loose if dtype == torch.float16 or not exact else "ieee")


def state_constants(
    A: int,
    Z: int,
    tiles: StateTiles,
    precision: str,
    *,
    reverse: bool,
    from_zero: bool,
    packed: bool,
    gated: bool = False,
) -> dict[str, Any]:
    """The compile-time arguments of STATE."""
    return {
        "A": A,
        "Z": Z,
        "BT": tiles.bt,
        "BA": tiles.ba,
        "BZ": tiles.bz,
        "REVERSED": reverse,
        "FROM_ZERO": from_zero,
        "PACKED": packed,
        "GATED": gated,
        "PRECISION": precision,
    }


def out_constants(
    X: int,
    Z: int,
    tiles: OutTiles,
    precision: tuple[str, str],
    *,
    reverse: bool,
    transposed: bool,
    packed: bool,
    gated: bool = False,
) -> dict[str, Any]:
    """The compile-time arguments of OUT."""
    return {
        "X": X,
        "Z": Z,
        "BM": tiles.bm,
        "BN": tiles.bn,
        "BX": tiles.bx,
        "BS": tiles.bs,
        "BZ": tiles.bz,
        "REVERSED": reverse,
        "TRANSPOSED": transposed,
        "PACKED": packed,
        "GATED": gated,
        "PRECISION": precision[0],
        "STATE_PRECISION": precision[1],
    }


def options(warps: int, stages: int = 1) -> dict[str, Any]:
    """How Triton compiles. Fusion of multiply and add is asked for by name, since its default moves between versions."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def _addressable(x: Tensor) -> Tensor:
    """x itself where a kernel can address it, else a contiguous copy: the last dimension dense, tiles within 32 bits."""
    dense = x.shape[-1] <= 1 or x.stride(-1) == 1
    near = x.stride(1) * _LONGEST + x.shape[-1] < _REACH
    return x if dense and near else x.clone(memory_format=torch.contiguous_format)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def start(kernel: Any, programs: int, device: torch.device, *arguments: object, **constants: Any) -> None:  # noqa: ANN401
    """Runs a kernel as so many programs, none of which is nothing to do.

    Raises:
        RuntimeError: its tiles do not fit the device.
    """
    if programs == 0:
        return
    try:
        with _on(device):
            kernel[(programs,)](*arguments, **constants)
    except triton.runtime.errors.OutOfResources as error:
        raise RuntimeError(
            f"the tiles of {kernel.__name__} do not fit {architecture(device)}: {error} "
            "Set RETNET_TRITON_AUTOTUNE=1 to look for tiles that do, or use backend='reference'"
        ) from error


def state_pass(
    a: Tensor,
    z: Tensor,
    initial: Tensor | None,
    log_decay: Tensor,
    chunks: Chunks,
    *,
    reverse: bool,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """STATE: snapshots [total,H,A,Z] at the chunk boundaries, and the state at the far end [rows,H,A,Z] fp32.

    Forward, a is k and z is v. Reversed, a is q and z the gradient of the output, and the far end is the beginning.
    `log_decay` is what `log2_sums` makes of it.
    """
    a, z = _addressable(a), _addressable(z)
    H, A, Z = a.shape[2], a.shape[3], z.shape[3]
    snapshots = a.new_empty(chunks.total, H, A, Z, dtype=tile_table.snapshot_dtype(a.dtype))
    final = a.new_empty(chunks.rows, H, A, Z, dtype=torch.float32)
    initial = None if initial is None else initial.contiguous()
    gated = log_decay.dim() == 4
    unused = final  # stands in for a pointer that the variant in use never reads
    precision = precisions(a.dtype, torch.version.hip is None)[0]

    def run(tiles: StateTiles) -> None:
        tiles = tile_table.fit_state(tiles, chunks.length)
        start(
            chunkwise_kernels.retention_chunkwise_state_triton,
            chunks.rows * H * triton.cdiv(A, tiles.ba) * triton.cdiv(Z, tiles.bz),
            a.device,
            *(a, z, snapshots, unused if initial is None else initial, final, log_decay),
            *(unused if x is None else x for x in (chunks.bounds, chunks.first)),
            *(scale, chunks.tokens, chunks.per_row, chunks.length, H),
            *(*_strides(a), *_strides(z)),
            **state_constants(
                A,
                Z,
                tiles,
                precision,
                reverse=reverse,
                from_zero=initial is None,
                packed=chunks.bounds is not None,
                gated=gated,
            ),
            **options(tiles.warps, tiles.stages),
        )

    arch = architecture(a.device)
    run(
        tuned(
            "state", arch, (A, Z, reverse, gated), a.dtype, tile_table.state_tiles(arch, A, Z, a.dtype), run
        )
    )
    return snapshots, final


def out_pass(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    snapshots: Tensor,
    log_decay: Tensor,
    scale: float,
    chunks: Chunks,
    *,
    reverse: bool,
    transposed: bool,
    out: Tensor | None = None,
) -> Tensor:
    """OUT: [B,T,H,Z] in the type of z, from inputs x, y [B,T,H,X], z [B,T,H,Z] and the snapshots of STATE.

    Args:
        x: what a row of scores belongs to.
        y: what a column of scores belongs to.
        z: what the scores weigh.
        snapshots: [total,H,X,Z], or [total,H,Z,X] when `transposed`.
        log_decay: what `log2_sums` makes of it.
        scale: of the scores.
        chunks: as `cut` made them.
        reverse: sums over later tokens instead of earlier ones.
        transposed: how the snapshots lie.
        out: to write to; by default fresh memory.
    """
    x, y, z = _addressable(x), _addressable(y), _addressable(z)
    H, X, Z = x.shape[2], x.shape[3], z.shape[3]
    out = z.new_empty(z.shape) if out is None else out
    gated, unused = log_decay.dim() == 4, log_decay
    precision = precisions(x.dtype, torch.version.hip is None)
    longest = min(chunks.length, chunks.tokens)

    def run(tiles: OutTiles) -> None:
        tiles = tile_table.fit_out(tiles, chunks.length, longest)
        per_chunk = triton.cdiv(longest, tiles.bm)
        start(
            chunkwise_kernels.retention_chunkwise_out_triton,
            chunks.total * H * per_chunk * triton.cdiv(Z, tiles.bz),
            x.device,
            *(x, y, z, snapshots, out, log_decay, unused if chunks.table is None else chunks.table),
            *(scale, chunks.tokens, chunks.per_row, per_chunk, chunks.length, H),
            *(*_strides(x), *_strides(y), *_strides(z), *_strides(out)),
            **out_constants(
                X,
                Z,
                tiles,
                precision,
                reverse=reverse,
                transposed=transposed,
                packed=chunks.table is not None,
                gated=gated,
            ),
            **options(tiles.warps, tiles.stages),
        )

    arch = architecture(x.device)
    run(
        tuned(
            "out",
            arch,
            (X, Z, reverse, transposed, gated),
            x.dtype,
            tile_table.out_tiles(arch, X, Z, x.dtype),
            run,
        )
    )
    return out


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def step_pass(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    """STEP: one token [B,H,·] or a few [B,T,H,·] on slots of `state` [N,H,K,V], in place; the output in the type of v.

    log_decay is [H], or by token [B,H] or [B,T,H].
    """
    out = v.new_empty(v.shape)
    q, k, v = (x.unsqueeze(1) if x.dim() == 3 else x for x in (q, k, v))
    q, k, v = (_addressable(x) for x in (q, k, v))
    B, T, H, K = q.shape
    V = v.shape[3]
    keys, values, warps = tile_table.step_tiles(architecture(q.device), K, V)
    start(
        retention_step_triton,
        B * H * triton.cdiv(V, values) if T else 0,
        q.device,
        *(q, k, v, out, state, state if slots is None else slots.contiguous(), log_decay.contiguous()),
        *(scale, state.shape[0], T, H, *_strides(q), *_strides(k), *_strides(v)),
        K=K,
        V=V,
        BK=keys,
        BV=values,
        SLOTS=slots is not None,
        GATED=log_decay.dim() > 1,
        **options(warps),
    )
    return out
