"""The Triton kernels as operators of torch: known to autograd, autocast, `torch.compile` and `torch.export`.

Defining them needs torch alone; Triton is imported when one of them first runs. They are defined here instead of through
`triton_op`, so that tracing sees one opaque operator with a fake implementation, also on a machine without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retnet.ops.triton import tile_table


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B,T,H,V] in v's type, final state fp32, and the states at chunk boundaries (none unless `keep_states`)."""
    from retnet.ops.triton import launch

    chunks = launch.cut(q, cu_seqlens, chunk)
    snapshots, final = launch.state_pass(k, v, state, log_decay, chunks, reverse=False)
    out = launch.out_pass(q, k, v, snapshots, log_decay, scale, chunks, reverse=False, transposed=False)
    return out, final, snapshots if keep_states else snapshots.new_empty(0)


def backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    snapshots: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial state; `snapshots` of the forward pass are used, or computed again."""
    from retnet.ops.triton import launch

    chunks = launch.cut(q, cu_seqlens, chunk)
    if snapshots is None:
        snapshots = launch.state_pass(k, v, state, log_decay, chunks, reverse=False)[0]
    dq = launch.out_pass(d_out, v, k, snapshots, log_decay, scale, chunks, reverse=False, transposed=True)
    d_snapshots, d_state = launch.state_pass(q, d_out, d_final, log_decay, chunks, reverse=True, scale=scale)
    dk = launch.out_pass(v, d_out, q, d_snapshots, log_decay, scale, chunks, reverse=True, transposed=True)
    dv = launch.out_pass(k, q, d_out, d_snapshots, log_decay, scale, chunks, reverse=True, transposed=False)
    return dq, dk, dv, d_state


def decode(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    """One token [B,H,·] or a few [B,T,H,·] for each of B rows of `state` [N,H,K,V], which change in place."""
    from retnet.ops.triton import launch

    return launch.step_pass(q, k, v, log_decay, state, slots, scale)


def _rows(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _fresh_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return q.new_empty(_rows(q, cu_seqlens), q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    final = _fresh_state(q, v, cu_seqlens)
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    total = tile_table.count_chunks(q.shape[0], q.shape[1], documents, chunk)
    kept = (total, *final.shape[1:]) if keep_states else (0,)
    return v.new_empty(v.shape), final, q.new_empty(kept, dtype=tile_table.snapshot_dtype(q.dtype))


def _fake_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    snapshots: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, _fresh_state(q, v, cu_seqlens)


def _fake_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    return v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    *tensors, ctx.scale, ctx.chunk, ctx.keep_states = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2] if ctx.keep_states else None)


def _gradients(
    ctx: Any,  # noqa: ANN401
    d_out: Tensor | None,
    d_final: Tensor | None,
    _: Tensor | None,
) -> tuple[Tensor | None, ...]:
    *inputs, snapshots = ctx.saved_tensors
    v, state = inputs[2], inputs[4]
    if d_out is None:
        d_out = v.new_zeros(v.shape)
    dq, dk, dv, d_state = torch.ops.retnet.triton_backward(
        d_out, d_final, *inputs, snapshots, ctx.scale, ctx.chunk
    )
    return dq, dk, dv, None, None if state is None else d_state, None, None, None, None


def _cast(device: str) -> Any:  # noqa: ANN401
    """Under autocast q, k and v take its type. γ and the state keep theirs, which `register_autocast` would not let them."""
    key = getattr(torch._C.DispatchKey, "Autocast" + torch._C._dispatch_key_for_device(device))

    def narrowed(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return torch.ops.retnet.triton_forward(q.to(dtype), k.to(dtype), v.to(dtype), *rest)

    return narrowed


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? state, Tensor? cu_seqlens"
torch.library.define(
    "retnet::triton_forward",
    f"({_TENSORS}, float scale, SymInt chunk, bool keep_states) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "retnet::triton_backward",
    f"(Tensor d_out, Tensor? d_final, {_TENSORS}, Tensor? snapshots, float scale, SymInt chunk)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "retnet::triton_step",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor(a!) state, Tensor? slots, float scale) -> Tensor",
)
for _device in ("cuda", "cpu"):  # on the CPU in Triton's interpreter
    torch.library.impl("retnet::triton_forward", _device, forward)
    torch.library.impl("retnet::triton_backward", _device, backward)
    torch.library.impl("retnet::triton_step", _device, decode)
    torch.library.impl("retnet::triton_forward", f"Autocast{_device.upper()}", _cast(_device))
torch.library.register_fake("retnet::triton_forward", _fake_forward)
torch.library.register_fake("retnet::triton_backward", _fake_backward)
torch.library.register_fake("retnet::triton_step", _fake_step)
torch.library.register_autograd("retnet::triton_forward", _gradients, setup_context=_save)

# The operators, as everything outside calls them.
chunked = torch.ops.retnet.triton_forward
step = torch.ops.retnet.triton_step
