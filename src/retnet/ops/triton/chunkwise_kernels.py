# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202, SIM108, RET505 (Triton compiles it)
"""Chunkwise retention, forward and backward, as two Triton kernels.

All of it is compiled for a GPU, or interpreted; Python never runs it as written.

STATE walks over the tokens of a sequence and writes the state at every chunk boundary; OUT computes one tile of outputs
from the state at its chunk's boundary and from the scores inside the chunk. With a constant decay per head the backward
pass is the forward pass with its arguments permuted and time reversed, so these two are the whole training op:

    h  = STATE(k, v)               o  = OUT(q, k, v, h)
    dh = STATE_reversed(q, do)     dq = OUT(do, v, k, hᵀ)
                                   dk = OUT_reversed(v, do, q, dhᵀ)
                                   dv = OUT_reversed(k, q, do, dh)

Rules that keep compiled code right, whatever the version of Triton:

* Weights are exp2(log2 γ · distance) with a distance ≥ 0 under the mask, never a quotient of powers: nothing overflows.
* Accumulators and the running state are fp32; only the snapshots at chunk boundaries are rounded.
* Never `tl.dot(tl.trans(the result of a dot), …)`: Triton 3.4 to 3.7.0 miscompiles it on Hopper. Transposes are made by
  the addresses of a load.
* Never two `tl.dot` into one accumulator in one turn of a loop: Triton 3.6 to 3.8 miscompiles it on Blackwell.
* No block pointers: Triton 3.9 has none.
* What can grow past 2³¹ (a token's, row's, head's or state's offset) is multiplied in 64 bits; places inside a tile are
  32 bits.
* Decays by token come as sums: log2 of the product of the γ from the begin of a token's chunk up to it, in two fp32 numbers
  each, for a large sum would round what is between two tokens (`launch.log2_sums`). Weights are exp2 of differences.
* An argument that makes no sense and cannot be checked without waiting for the GPU (γ > 1, a slot that is not there)
  gives NaN, never a plausible number.
"""

import triton
import triton.language as tl

# Whether the kernels below run in Triton's interpreter, on tensors of the CPU; decided once, where they are decorated.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def log2_decay(log_decay, head):
    """log2 γ of a head from its natural logarithm, in fp64 until the last moment; NaN for γ > 1."""
    natural = tl.load(log_decay + head).to(tl.float64)
    log2 = (natural * tl.full([], 1.4426950408889634, tl.float64)).to(tl.float32)
    return tl.where(log2 <= 0, log2, float("nan"))


@triton.jit
def _sums(sums, place, mask):
    """The sum that lies at a place, as two numbers; 0 where masked."""
    return tl.load(sums + 2 * place, mask=mask, other=0.0), tl.load(
        sums + 2 * place + 1, mask=mask, other=0.0
    )


@triton.jit
def _within(i, size: tl.constexpr, block: tl.constexpr):
    """i < size, known to hold where blocks divide the size, so that no mask is left to carry."""
    if size % block == 0:
        return tl.full(i.shape, 1, tl.int1)
    else:
        return i < size


@triton.jit(do_not_specialize=["T", "chunks"])
def retention_chunkwise_state_triton(
    a,  # [rows,T,H,A]: k, or q when reversed
    z,  # [rows,T,H,Z]: v, or the gradient of the output when reversed
    snapshots,  # [all chunks,H,A,Z], written: the state before each chunk, or after it when reversed
    initial,  # [rows,H,A,Z] fp32: the state to start from
    final,  # [rows,H,A,Z] fp32, written
    log_decay,  # [H]; by token, sums [rows,T,H,2] fp32
    bounds,  # [rows+1] int32: where each packed document begins
    first_chunk,  # [rows] int32: number of its first chunk
    scale,
    T,
    chunks,  # of each row; unused when packed
    C,
    H,
    a_row,
    a_token,
    a_head,
    z_row,
    z_token,
    z_head,
    A: tl.constexpr,
    Z: tl.constexpr,
    BT: tl.constexpr,
    BA: tl.constexpr,
    BZ: tl.constexpr,
    REVERSED: tl.constexpr,
    FROM_ZERO: tl.constexpr,
    PACKED: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [BA,BZ] of the state of one head of one sequence, carried through all its tokens, BT at a time.

    Forward: s ← γⁿ s + Σ_j γ^(n−1−j) a_jᵀ z_j over a block of n tokens. Reversed: from the end, with weights
    scale · γ^(j+1), which gives the gradient of the state before a block from that of the state after it.
    """
    tiles_z: tl.constexpr = tl.cdiv(Z, BZ)
    tiles: tl.constexpr = tl.cdiv(A, BA) * tiles_z
    pid = tl.program_id(0)
    tile = pid % tiles
    row = pid // tiles // H
    head = (pid // tiles % H).to(tl.int64)
    if not GATED:
        log2 = log2_decay(log_decay, head)
    i = tile // tiles_z * BA + tl.arange(0, BA)
    j = tile % tiles_z * BZ + tl.arange(0, BZ)
    t = tl.arange(0, BT)
    real_a = _within(i, A, BA)
    real_z = _within(j, Z, BZ)
    inside = real_a[:, None] & real_z[None, :]
    place = i[:, None] * Z + j[None, :]

    if PACKED:
        begin = tl.load(bounds + row).to(tl.int64)
        length = (tl.load(bounds + row + 1) - begin).to(tl.int32)
        chunk = tl.load(first_chunk + row).to(tl.int64)
        a += begin * a_token + head * a_head
        z += begin * z_token + head * z_head
        place_sums = begin * H + head
    else:
        length = T
        chunk = row.to(tl.int64) * chunks
        a += row.to(tl.int64) * a_row + head * a_head
        z += row.to(tl.int64) * z_row + head * z_head
        place_sums = row.to(tl.int64) * T * H + head

    whole = (row.to(tl.int64) * H + head) * A * Z  # where this head's state lies
    if FROM_ZERO:
        s = tl.zeros([BA, BZ], dtype=tl.float32)
    else:
        s = tl.load(initial + whole + place, mask=inside, other=0.0)

    blocks = tl.cdiv(length, BT)
    per_chunk = C // BT
    for n in range(blocks):
        if REVERSED:
            block = blocks - 1 - n
            at_boundary = (n == 0) | (block % per_chunk == per_chunk - 1)
        else:
            block = n
            at_boundary = block % per_chunk == 0
        if at_boundary:
            boundary = ((chunk + block // per_chunk) * H + head) * A * Z
            tl.store(snapshots + boundary + place, s.to(snapshots.dtype.element_ty), mask=inside)
        first = (block * BT).to(tl.int64)
        real = tl.minimum(BT, length - block * BT)
        a_tile = tl.load(
            a + first * a_token + i[:, None] + t[None, :] * a_token,
            mask=real_a[:, None] & (t < real)[None, :],
            other=0.0,
        )
        z_tile = tl.load(
            z + first * z_token + t[:, None] * z_token + j[None, :],
            mask=(t < real)[:, None] & real_z[None, :],
            other=0.0,
        )
        if GATED:
            own, own_low = _sums(log_decay, place_sums + (first + t) * H, t < real)
            last, last_low = _sums(log_decay, place_sums + (first + real - 1) * H, real > 0)
            before, before_low = _sums(log_decay, place_sums + (first - 1) * H, block % per_chunk > 0)
            kept = tl.exp2((last - before) + (last_low - before_low))
            if REVERSED:
                between = (own - before) + (own_low - before_low)
            else:
                between = (last - own) + (last_low - own_low)
            weight = tl.exp2(tl.where(t < real, between, 0.0))
            if REVERSED:
                weight *= scale
        else:
            kept = tl.exp2(log2 * real)
            if REVERSED:
                weight = tl.exp2(log2 * (t + 1)) * scale
            else:
                weight = tl.exp2(log2 * tl.maximum(real - 1 - t, 0))
        a_tile = (a_tile.to(tl.float32) * weight[None, :]).to(a_tile.dtype)
        s = tl.dot(a_tile, z_tile, s * kept, input_precision=PRECISION)
    tl.store(final + whole + place, s, mask=inside)


@triton.jit(do_not_specialize=["T", "chunks", "tiles"])
def retention_chunkwise_out_triton(
    x,  # [rows,T,H,X]: what a row of scores belongs to
    y,  # [rows,T,H,X]: what a column of scores belongs to
    z,  # [rows,T,H,Z]: what the scores weigh
    snapshots,  # [all chunks,H,X,Z], or [all chunks,H,Z,X] when transposed
    out,  # [rows,T,H,Z], written
    log_decay,  # [H]; by token, sums [rows,T,H,2] fp32
    table,  # [all chunks,2] int32: begin and end of each chunk of packed documents
    scale,
    T,
    chunks,  # of each row; unused when packed
    tiles,  # of BM tokens in a chunk
    C,
    H,
    x_row,
    x_token,
    x_head,
    y_row,
    y_token,
    y_head,
    z_row,
    z_token,
    z_head,
    out_row,
    out_token,
    out_head,
    X: tl.constexpr,
    Z: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BX: tl.constexpr,
    BS: tl.constexpr,
    BZ: tl.constexpr,
    REVERSED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PACKED: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    STATE_PRECISION: tl.constexpr,
):
    """One tile [BM,BZ] of outputs: BM tokens of one chunk, BN columns of scores at a time.

    Token i of a chunk of n: o_i = scale · (Σ_{j≤i} γ^(i−j) (x_i · y_j) z_j + γ^(i+1) x_i S), S the state before the chunk.
    Reversed: o_i = scale · Σ_{j≥i} γ^(j−i) (x_i · y_j) z_j + γ^(n−1−i) x_i S, S the gradient after it, already scaled.
    """
    tiles_z: tl.constexpr = tl.cdiv(Z, BZ)
    pid = tl.program_id(0)
    column = pid % tiles_z
    tile = pid // tiles_z % tiles
    rest = pid // tiles_z // tiles
    head = (rest % H).to(tl.int64)
    chunk = rest // H
    if PACKED:
        row = 0
        begin = tl.load(table + 2 * chunk)
        length = tl.load(table + 2 * chunk + 1) - begin
    else:
        row = chunk // chunks
        begin = chunk % chunks * C
        length = tl.minimum(C, T - begin)
    i0 = tile * BM
    if i0 >= length:  # packed: a short document, or a chunk that is not there
        return

    i = tl.arange(0, BM)
    j = tl.arange(0, BN)
    p = tl.arange(0, BX)
    m = column * BZ + tl.arange(0, BZ)
    real_m = _within(m, Z, BZ)
    wide_row = tl.cast(row, tl.int64)
    first = tl.cast(begin, tl.int64)
    x += wide_row * x_row + (first + i0) * x_token + head * x_head
    y += wide_row * y_row + first * y_token + head * y_head
    z += wide_row * z_row + first * z_token + head * z_head
    out += wide_row * out_row + (first + i0) * out_token + head * out_head
    snapshots += (tl.cast(chunk, tl.int64) * H + head) * X * Z
    real_i = (i < length - i0)[:, None]
    if GATED:
        place_sums = (wide_row * T + first) * H + head
        own, own_low = _sums(log_decay, place_sums + (i0 + i).to(tl.int64) * H, i < length - i0)
    else:
        log2 = log2_decay(log_decay, head)

    acc = tl.zeros([BM, BZ], dtype=tl.float32)
    r = tl.arange(0, BS)
    for at in range(0, X, BS):  # what came before the chunk
        x_tile = tl.load(
            x + i[:, None] * x_token + (at + r)[None, :],
            mask=real_i & _within(at + r, X, BS)[None, :],
            other=0.0,
        )
        if TRANSPOSED:
            place = (at + r)[:, None] + m[None, :] * X
        else:
            place = (at + r)[:, None] * Z + m[None, :]
        s = tl.load(snapshots + place, mask=_within(at + r, X, BS)[:, None] & real_m[None, :], other=0.0)
        acc = tl.dot(x_tile.to(s.dtype), s, acc, input_precision=STATE_PRECISION)
    if REVERSED:
        if GATED:
            last, last_low = _sums(log_decay, place_sums + tl.cast(length - 1, tl.int64) * H, length > 0)
            after = (last - own) + (last_low - own_low)
            acc *= tl.exp2(tl.where(i < length - i0, after, 0.0))[:, None]
        else:
            acc *= tl.exp2(log2 * tl.maximum(length - 1 - i0 - i, 0))[:, None]
        low = i0 // BN * BN
        high = length
    else:
        if GATED:
            acc *= (tl.exp2(own + own_low) * scale)[:, None]
        else:
            acc *= (tl.exp2(log2 * (i0 + i + 1)) * scale)[:, None]
        low = 0
        high = tl.minimum(i0 + BM, length)

    if X <= BX:  # the rows' side of the scores stays on chip
        x_rows = tl.load(
            x + i[:, None] * x_token + p[None, :], mask=real_i & _within(p, X, BX)[None, :], other=0.0
        )
    for j0 in range(low, high, BN):
        real_j = j < length - j0
        y_block = y + tl.cast(j0, tl.int64) * y_token
        scores = tl.zeros([BM, BN], dtype=tl.float32)
        if X <= BX:
            y_tile = tl.load(
                y_block + p[:, None] + j[None, :] * y_token,
                mask=_within(p, X, BX)[:, None] & real_j[None, :],
                other=0.0,
            )
            scores = tl.dot(x_rows, y_tile, scores, input_precision=PRECISION)
        else:
            for at in range(0, X, BX):
                x_part = tl.load(
                    x + i[:, None] * x_token + (at + p)[None, :],
                    mask=real_i & _within(at + p, X, BX)[None, :],
                    other=0.0,
                )
                y_part = tl.load(
                    y_block + (at + p)[:, None] + j[None, :] * y_token,
                    mask=_within(at + p, X, BX)[:, None] & real_j[None, :],
                    other=0.0,
                )
                scores = tl.dot(x_part, y_part, scores, input_precision=PRECISION)
        distance = (i0 + i)[:, None] - (j0 + j)[None, :]
        if REVERSED:
            distance = -distance
        if GATED:
            theirs, theirs_low = _sums(log_decay, place_sums + (j0 + j).to(tl.int64) * H, real_j)
            between = (own[:, None] - theirs[None, :]) + (own_low[:, None] - theirs_low[None, :])
            if REVERSED:
                between = -between
            exponent = tl.where((distance >= 0) & real_i & real_j[None, :], between, 0.0)
        else:
            exponent = log2 * tl.maximum(distance, 0)
        weight = tl.exp2(exponent) * scale
        scores = tl.where(distance >= 0, scores * weight, 0.0)
        z_tile = tl.load(
            z + tl.cast(j0, tl.int64) * z_token + j[:, None] * z_token + m[None, :],
            mask=real_j[:, None] & real_m[None, :],
            other=0.0,
        )
        acc = tl.dot(scores.to(z_tile.dtype), z_tile, acc, input_precision=PRECISION)
    tl.store(
        out + i[:, None] * out_token + m[None, :],
        acc.to(out.dtype.element_ty),
        mask=real_i & real_m[None, :],
    )
