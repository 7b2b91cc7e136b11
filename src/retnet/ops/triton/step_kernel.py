# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"
# ruff: noqa: ANN001, ANN201 (Triton compiles it)
"""Decoding step of retention as a Triton kernel: the recurrent form on slots of state.

The rules of `chunkwise_kernels` hold here as well.
"""

import triton
import triton.language as tl

from retnet.ops.triton.chunkwise_kernels import log2_decay


@triton.jit(do_not_specialize=["rows", "T"])
def retention_step_triton(
    q,  # [B,T,H,K]
    k,  # [B,T,H,K]
    v,  # [B,T,H,V]
    out,  # [B,T,H,V], contiguous, written
    state,  # [rows,H,K,V] fp32, contiguous, updated in place
    slots,  # [B] int32 or int64: the row of the state of each row of the batch, −1 for none
    log_decay,  # [H]; by token [B,T,H], contiguous
    scale,
    rows,
    T,
    H,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    v_row,
    v_token,
    v_head,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SLOTS: tl.constexpr,
    GATED: tl.constexpr,
):
    """T tokens of one head of one row of the batch, BV columns of its state: read once, kept in registers, written once."""
    columns: tl.constexpr = tl.cdiv(V, BV)
    pid = tl.program_id(0)
    column = pid % columns
    head = (pid // columns % H).to(tl.int64)
    b = (pid // columns // H).to(tl.int64)
    slot = b
    if SLOTS:
        slot = tl.load(slots + b).to(tl.int64)
    i = tl.arange(0, BK)
    j = column * BV + tl.arange(0, BV)
    real = j < V
    out += (b * T * H + head) * V
    q += b * q_row + head * q_head
    k += b * k_row + head * k_head
    v += b * v_row + head * v_head
    if (slot < 0) | (slot >= rows):  # padding, or a slot that is not there
        nothing = tl.where(slot == -1, 0.0, float("nan")) + tl.zeros([BV], dtype=tl.float32)
        for t in range(T):
            tl.store(out + tl.cast(t, tl.int64) * H * V + j, nothing.to(out.dtype.element_ty), mask=real)
        return
    if not GATED:
        gamma = tl.exp2(log2_decay(log_decay, head))
    place = (slot * H + head) * K * V + i[:, None] * V + j[None, :]
    inside = (i < K)[:, None] & real[None, :]
    s = tl.load(state + place, mask=inside, other=0.0)
    for t in range(T):
        wide = tl.cast(t, tl.int64)
        q_t = tl.load(q + wide * q_token + i, mask=i < K, other=0.0).to(tl.float32)
        k_t = tl.load(k + wide * k_token + i, mask=i < K, other=0.0).to(tl.float32)
        v_t = tl.load(v + wide * v_token + j, mask=real, other=0.0).to(tl.float32)
        if GATED:
            gamma = tl.exp2(log2_decay(log_decay, (b * T + wide) * H + head))
        s = s * gamma + k_t[:, None] * v_t[None, :]
        o = tl.sum(s * (q_t * scale)[:, None], axis=0)
        tl.store(out + wide * H * V + j, o.to(out.dtype.element_ty), mask=real)
    tl.store(state + place, s, mask=inside)
