# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# ruff: noqa: ANN001, ANN201, ANN202, SIM108 (Triton compiles it)
"""Rotary position embedding, and fused head norm with gate, as Triton kernels.

Both are bounded by memory: every number is read once and written once, and what lies between stays in registers. A program
takes a few tokens; tokens of all rows are numbered through. The rules of `chunkwise_kernels` hold here as well.
"""

import triton
import triton.language as tl


@triton.jit
def _cos_sin(turns):
    """cos and sin of 2π·turns, fp64 → fp32, to a unit in the last place of 1: whole quarters are taken off exactly.

    The library's functions would carry their reduction of huge arguments along, which needs a stack.
    """
    quarters = tl.floor(turns * 4 + 0.5)
    x = (turns * 4 - quarters).to(tl.float32) * 1.5707963267948966  # in ±π/4
    xx = x * x
    s = x + x * xx * (
        -1.6666654611e-1 + xx * (8.3321608736e-3 - xx * 1.9515295891e-4)
    )  # minimax (Cephes, sinf)
    c = (
        1
        - 0.5 * xx
        + xx * xx * (4.166664568298827e-2 + xx * (2.443315711809948e-5 * xx - 1.388731625493765e-3))
    )
    quarter = quarters.to(tl.int64)
    odd = (quarter & 1) == 1
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    return tl.where(((quarter + 1) & 2) == 0, cos, -cos), tl.where((quarter & 2) == 0, sin, -sin)


@triton.jit
def _load_pairs(
    x, place, real, K: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Both numbers of the pairs of BN rows that begin at x + place, each [BN,BP] fp32."""
    if INTERLEAVED:
        i = tl.arange(0, 2 * BP)
        both = tl.load(x + place[:, None] + i[None, :], mask=real[:, None] & (i < K)[None, :], other=0.0)
        a, b = tl.split(tl.reshape(both, [BN, BP, 2]))
    else:
        i = tl.arange(0, BP)
        inside = real[:, None] & (i < K // 2)[None, :]
        a = tl.load(x + place[:, None] + i[None, :], mask=inside, other=0.0)
        b = tl.load(x + place[:, None] + (i + K // 2)[None, :], mask=inside, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_pairs(
    x, place, real, a, b, K: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """The way back."""
    a = a.to(x.dtype.element_ty)
    b = b.to(x.dtype.element_ty)
    if INTERLEAVED:
        i = tl.arange(0, 2 * BP)
        both = tl.reshape(tl.join(a, b), [BN, 2 * BP])
        tl.store(x + place[:, None] + i[None, :], both, mask=real[:, None] & (i < K)[None, :])
    else:
        i = tl.arange(0, BP)
        inside = real[:, None] & (i < K // 2)[None, :]
        tl.store(x + place[:, None] + i[None, :], a, mask=inside)
        tl.store(x + place[:, None] + (i + K // 2)[None, :], b, mask=inside)


@triton.jit(do_not_specialize=["tokens", "period", "heads"])
def rotary_triton(
    q,  # [tokens,H,K]
    k,  # [tokens,H,K]
    q_out,  # [tokens,H,K], contiguous, written
    k_out,  # [tokens,H,K], contiguous, written
    position,  # [period] int32 or int64: token n is at n mod period, which lets rows share their positions
    theta,  # [K/2] fp64, radians a token
    sign,  # 1.0, or −1.0 to turn back
    tokens,
    period,
    heads,  # of a program
    H,
    q_token,
    q_head,
    k_token,
    k_head,
    K: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """BN tokens of a few heads: their angles once, then every pair of q and k."""
    groups = tl.cdiv(H, heads)
    pid = tl.program_id(0)
    first = pid % groups * heads
    n = (pid // groups).to(tl.int64) * BN + tl.arange(0, BN)
    real = n < tokens
    i = tl.arange(0, BP)
    at = tl.load(position + n % period, mask=real, other=0).to(tl.float64)
    turn = tl.load(theta + i, mask=i < K // 2, other=0.0) * tl.full(
        [], 0.15915494309189535, tl.float64
    )  # 1/2π
    cos, sin = _cos_sin(at[:, None] * turn[None, :])
    sin *= sign
    for h in range(first, tl.minimum(first + heads, H)):
        head = tl.cast(h, tl.int64)
        q_place = n * q_token + head * q_head
        k_place = n * k_token + head * k_head
        place = (n * H + head) * K
        q_a, q_b = _load_pairs(q, q_place, real, K, BN, BP, INTERLEAVED)
        k_a, k_b = _load_pairs(k, k_place, real, K, BN, BP, INTERLEAVED)
        _store_pairs(q_out, place, real, q_a * cos - q_b * sin, q_b * cos + q_a * sin, K, BN, BP, INTERLEAVED)
        _store_pairs(k_out, place, real, k_a * cos - k_b * sin, k_b * cos + k_a * sin, K, BN, BP, INTERLEAVED)


@triton.jit(do_not_specialize=["tokens", "period"])
def head_norm_triton(
    o,  # [tokens,H,V]
    gate,  # [tokens,H,V]
    weight,  # [H,V]
    bias,  # [H,V]
    sums,  # [period,H] fp32 or fp64: what ε is multiplied by, of token n mod period
    out,  # [tokens,H,V], contiguous, written
    mean,  # [tokens,H] fp32, written if the norm centres
    rstd,  # [tokens,H] fp32, written
    eps,
    tokens,
    period,
    H,
    o_token,
    o_head,
    gate_token,
    gate_head,
    V: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    NORM: tl.constexpr,  # "group", "rms" or "none"
    GATED: tl.constexpr,
    WEIGHED: tl.constexpr,
    SHIFTED: tl.constexpr,
    SUMS: tl.constexpr,
):
    """One head of BN tokens: n = (o − mean) · rstd, rstd = (variance + ε · sum)^(−1/2), out = swish(gate) · (n w + b)."""
    pid = tl.program_id(0)
    head = (pid % H).to(tl.int64)
    n = (pid // H).to(tl.int64) * BN + tl.arange(0, BN)
    j = tl.arange(0, BV)
    real = n < tokens
    inside = real[:, None] & (j < V)[None, :]
    x = tl.load(o + (n * o_token + head * o_head)[:, None] + j[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    spread = tl.full([BN], 1.0, tl.float32)
    if SUMS:
        spread = tl.load(sums + n % period * H + head, mask=real, other=1.0).to(tl.float32)
    if NORM == "group":
        m = tl.sum(x, axis=1) / V
        x = tl.where(inside, x - m[:, None], 0.0)
        tl.store(mean + n * H + head, m, mask=real)
    if NORM == "none":
        r = tl.rsqrt(spread)
    else:
        r = tl.rsqrt(tl.sum(x * x, axis=1) / V + eps * spread)
    tl.store(rstd + n * H + head, r, mask=real)
    y = x * r[:, None]
    if WEIGHED:
        y *= tl.load(weight + head * V + j, mask=j < V, other=0.0).to(tl.float32)[None, :]
    if SHIFTED:
        y += tl.load(bias + head * V + j, mask=j < V, other=0.0).to(tl.float32)[None, :]
    if GATED:
        g_place = (n * gate_token + head * gate_head)[:, None] + j[None, :]
        g = tl.load(gate + g_place, mask=inside, other=0.0).to(tl.float32)
        y *= g * tl.sigmoid(g)
    tl.store(out + ((n * H + head) * V)[:, None] + j[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "parts"])
def head_norm_backward_triton(
    d_out,  # [tokens,H,V]
    o,  # [tokens,H,V]
    gate,  # [tokens,H,V]
    weight,  # [H,V]
    bias,  # [H,V]
    mean,  # [tokens,H] fp32
    rstd,  # [tokens,H] fp32
    d_o,  # [tokens,H,V], contiguous, written
    d_gate,  # [tokens,H,V], contiguous, written
    d_weight,  # [parts,H,V] fp32, written: the sums of each part, to be added in their order
    d_bias,  # [parts,H,V] fp32, written
    tokens,
    parts,
    H,
    d_out_token,
    d_out_head,
    o_token,
    o_head,
    gate_token,
    gate_head,
    V: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHED: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """One head of every `parts`-th block of BN tokens.

    With dn the gradient of the normalised head: do = rstd · (dn − mean(dn) − n · mean(dn · n)), the first mean only if the
    norm centres; without a norm do = rstd · dn.
    """
    pid = tl.program_id(0)
    head = (pid % H).to(tl.int64)
    part = (pid // H).to(tl.int64)
    j = tl.arange(0, BV)
    columns = head * V + j
    if WEIGHED:
        w = tl.load(weight + columns, mask=j < V, other=0.0).to(tl.float32)[None, :]
        dw = tl.zeros([BN, BV], dtype=tl.float32)
    if SHIFTED:
        b = tl.load(bias + columns, mask=j < V, other=0.0).to(tl.float32)[None, :]
        db = tl.zeros([BN, BV], dtype=tl.float32)
    for block in range(pid // H, tl.cdiv(tokens, BN), parts):
        n = tl.cast(block, tl.int64) * BN + tl.arange(0, BN)
        real = n < tokens
        inside = real[:, None] & (j < V)[None, :]
        o_place = (n * o_token + head * o_head)[:, None] + j[None, :]
        d_place = (n * d_out_token + head * d_out_head)[:, None] + j[None, :]
        place = ((n * H + head) * V)[:, None] + j[None, :]
        x = tl.load(o + o_place, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(d_out + d_place, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + n * H + head, mask=real, other=0.0)[:, None]
        if NORM == "group":
            x -= tl.load(mean + n * H + head, mask=real, other=0.0)[:, None]
        x *= r  # n
        if GATED:
            g_place = (n * gate_token + head * gate_head)[:, None] + j[None, :]
            g = tl.load(gate + g_place, mask=inside, other=0.0).to(tl.float32)
            s = tl.sigmoid(g)
            y = x
            if WEIGHED:
                y *= w
            if SHIFTED:
                y += b
            dg = dy * y * s * (1 + g * (1 - s))
            tl.store(d_gate + place, dg.to(d_gate.dtype.element_ty), mask=inside)
            dy *= g * s
        if WEIGHED:
            dw += dy * x
        if SHIFTED:
            db += dy
        if WEIGHED:
            dy *= w
        if NORM != "none":
            along = tl.sum(dy * x, axis=1) / V
            if NORM == "group":
                dy -= (tl.sum(dy, axis=1) / V)[:, None]
            dy -= x * along[:, None]
        tl.store(d_o + place, (dy * r).to(d_o.dtype.element_ty), mask=inside)
    if WEIGHED:
        tl.store(d_weight + part * H * V + columns, tl.sum(dw, axis=0), mask=j < V)
    if SHIFTED:
        tl.store(d_bias + part * H * V + columns, tl.sum(db, axis=0), mask=j < V)
