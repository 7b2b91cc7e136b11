"""Head norm: GroupNorm or RMSNorm of every head by itself, then the swish gate (paper §3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.ops.dispatch import Implementation, Op
from retnet.ops.torch_private import differentiating_forwards, transforming
from retnet.ops.triton import capability, rotary_norm_operators

NORMS = ("group", "rms", "none")


def head_norm(
    o: Tensor,
    gate: Tensor | None = None,
    norm: str = "group",
    *,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    sums: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """swish(gate) ⊙ GroupNorm_h(o) (paper §3), on a GPU in one kernel forward and one backward.

    Args:
        o: outputs of the heads [...,H,V]; statistics are fp32 or better whatever its type.
        gate: before its swish, [...,H·V]; None: no gate.
        norm: ``"group"`` (mean and variance of a head), ``"rms"`` (no mean) or ``"none"``.
        eps: added to the variance.
        weight: factors [H·V]; None: ones.
        bias: summands [H·V]; None: zeros.
        sums: s² by which o is divided first, as o/s, [...,H] or [1,...,H]; under a norm that is ε·s² in place of ε.
        dtype: of the normalised heads, default that of o. Gated, they take the type of the gate.
        backend: as in `retention`; all but ``"triton"`` are torch's operators.

    Returns:
        [...,H·V].

    Raises:
        ValueError: an unknown `norm`, shapes that do not fit, or a backend that cannot run.
    """
    _check(o, gate, norm, weight, bias, sums)
    arguments = (o, gate, weight, bias, sums, norm, eps, dtype)
    y: Tensor = _HEAD_NORM.choose(backend, *arguments)(*arguments)
    return y


# The row of the dispatch table; arguments: o, gate, weight, bias, sums, norm, eps, dtype.


def _by_triton(o: Tensor, gate: Tensor | None, *rest: Any) -> Tensor:  # noqa: ANN401
    *given, dtype = rest
    # transforms of torch.func and forward-mode differentiation see the formula
    opaque = not transforming() and not differentiating_forwards()
    compute = rotary_norm_operators.head_norm if opaque else rotary_norm_operators.norm_by_torch
    y: Tensor = compute(o, gate, *given)[0]
    return y if gate is not None or dtype is None else y.to(dtype)


def _by_torch(
    o: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
    norm: str,
    eps: float,
    dtype: torch.dtype | None,
) -> Tensor:
    H, V = o.shape[-2:]
    y = o.to(torch.promote_types(o.dtype, torch.float32))
    if sums is not None:
        y = y * sums.rsqrt().to(y.dtype)[..., None]
    if norm == "rms":
        y = F.rms_norm(y, (V,), eps=eps)
    elif norm == "group":
        y = F.layer_norm(y, (V,), eps=eps)
    if weight is not None:
        y = y * weight.view(H, V)
    if bias is not None:
        y = y + bias.view(H, V)
    y = y.flatten(-2).to(o.dtype if dtype is None else dtype)
    return y if gate is None else (F.silu(gate) * y).to(gate.dtype)


def _no_triton(
    o: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
    *_: object,
) -> str | None:
    unfit = capability.unfit_heads(o.shape[-1], o, gate, weight, bias, constant=sums)
    return unfit or capability.missing(str(o.device))


_HEAD_NORM = Op(
    "head_norm",
    triton=Implementation(_by_triton, _no_triton, auto_on="cuda"),
    torch=Implementation(_by_torch),
    numba=Implementation(_by_torch),
    reference=Implementation(_by_torch),
)


def _check(
    o: Tensor,
    gate: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
) -> None:
    if o.dim() < 3:
        raise ValueError(f"o has shape {tuple(o.shape)}; allowed: [...,H,V], at least [1,H,V]")
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; allowed: {', '.join(map(repr, NORMS))}")
    *lead, H, V = o.shape
    if gate is not None and gate.shape != (*lead, H * V):
        raise ValueError(f"gate has shape {tuple(gate.shape)}; allowed: {(*lead, H * V)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.shape != (H * V,):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; allowed: {(H * V,)}")
    if sums is not None and (sums.shape[1:] != o.shape[1:-1] or sums.shape[0] not in (1, o.shape[0])):
        raise ValueError(
            f"sums has shape {tuple(sums.shape)}; allowed: {tuple(o.shape[:-1])} as in o, or 1 for its first"
        )
