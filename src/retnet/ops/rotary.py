"""Rotary position embedding of queries and keys: Q ⊙ Θ, K ⊙ Θ̄ with Θ_n = e^{inθ} (paper §2), in all usual layouts.

Angles are formed in fp64 and reduced to one turn before they become fp32, so a token at position 10⁷ is rotated as
exactly as one at position 10.
"""

# ruff: noqa: ANN401 (torch's contexts of derivatives take any attribute)

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retnet.ops import library
from retnet.ops.dispatch import Implementation, Op
from retnet.ops.torch_private import is_differentiated, keep, plain
from retnet.ops.triton import capability, rotary_norm_operators

LAYOUTS = ("interleaved", "halves")
SPACINGS = ("inclusive", "geometric")
UNKNOWN_LAYOUT = f"unknown rotary layout {{!r}}; allowed: {', '.join(map(repr, LAYOUTS))}"


def frequencies(key_dim: int, spacing: str = "inclusive", base: float = 10000.0) -> Tensor:
    """θ of each pair, [K/2] fp64 on the CPU, radians per token.

    Args:
        key_dim: K, even.
        spacing: ``"inclusive"``: base^−linspace(0, 1, K/2), end point included (torchscale);
            ``"geometric"``: base^(−2i/K) (the usual rotary embedding, flash-linear-attention).
        base: the slowest pair turns once in about 2π·base tokens.

    Raises:
        ValueError: odd or non-positive `key_dim`, unknown `spacing`, non-positive `base`.
    """
    if key_dim < 2 or key_dim % 2:
        raise ValueError(f"rotation turns pairs: key_dim must be even and at least 2, got {key_dim}")
    if base <= 0:
        raise ValueError(f"the base of the rotation must be positive, got {base}")
    if spacing == "inclusive":
        exponents = torch.linspace(0, 1, key_dim // 2, dtype=torch.float64, device="cpu")
    elif spacing == "geometric":
        exponents = torch.arange(0, key_dim, 2, dtype=torch.float64, device="cpu") / key_dim
    else:
        raise ValueError(f"unknown rotary spacing {spacing!r}; allowed: {', '.join(map(repr, SPACINGS))}")
    return base**-exponents


def positions(
    length: int,
    cu_seqlens: Tensor | None = None,
    *,
    start: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Position of each token in its sequence, int64 [B,T], counted from `start`; in packed rows from each document's begin.

    Args:
        length: T.
        cu_seqlens: [N+1] bounds of packed documents; then the result is [1,T].
        start: int64 position of the first token, [B], or [N] with `cu_seqlens`; default zeros, B = 1.
        device: of the result where neither of these is given.
    """
    if cu_seqlens is None:
        n = torch.arange(length, device=device if start is None else start.device)[None]
        return n if start is None else start[:, None] + n
    bounds = cu_seqlens.long()
    shift = -bounds[:-1] if start is None else start - bounds[:-1]
    n = torch.arange(length, device=bounds.device)
    return (n + shift.repeat_interleave(bounds.diff(), output_size=length))[None]


def rotation(position: Tensor, theta: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin of position · θ, each [..., K/2] in `dtype`, for `position` [...] and `theta` [K/2] fp64."""
    turns = (
        position[..., None] * (theta / (2 * math.pi))
    ).frac()  # fp64; only what is left after whole turns is narrowed
    angle = (turns * (2 * math.pi)).to(dtype)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str = "interleaved") -> Tensor:
    """Turns the pairs of x [..., H, K] by the angles of `rotation` [..., K/2], the same for all heads.

    Args:
        x: queries or keys; the result has its type, the arithmetic is at least fp32.
        cos: cosine of the angles, [..., K/2].
        sin: sine of the angles, [..., K/2].
        layout: a pair is (x_2i, x_2i+1) when ``"interleaved"``, (x_i, x_{i+K/2}) when ``"halves"``.

    Raises:
        ValueError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(UNKNOWN_LAYOUT.format(layout))
    return _turner(cos, sin, x.requires_grad)(x, cos, sin, layout == "interleaved")


def _turner(cos: Tensor, sin: Tensor, learning: bool) -> Callable[..., Tensor]:
    """What turns heads by these angles: the operator, but for angles that are learned, and where nobody learns."""
    if is_differentiated(cos, sin):
        return _rotate_by_autograd
    if plain() and not (learning and torch.is_grad_enabled()):
        return _rotate  # the operator's dispatch would cost more than its work
    operator: Callable[..., Tensor] = _OPERATOR
    return operator


def apply_rotary(
    q: Tensor,
    k: Tensor,
    position: Tensor,
    theta: Tensor,
    layout: str = "interleaved",
    backend: str = "auto",
    angles: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Q ⊙ Θ and K ⊙ Θ̄ (paper §2): `rotate` of q and k by `rotation` of their positions, on a GPU in one kernel.

    Args:
        q: queries [...,H,K], any floating type; angles, cos and sin are at least fp32 whatever it is.
        k: keys [...,H,K].
        position: int64 [...], as `positions` makes them, or [1,...] where all rows of a batch share them.
        theta: radians a token, [K/2] fp64, as `frequencies` makes them.
        layout: as in `rotate`.
        backend: as in `retention`; all but ``"triton"`` are torch's operators.
        angles: cos and sin [...,K/2], as `rotation` makes them of these positions, for torch's operators, so that the layers
            of a model share them; default: made here. The kernel computes its own (see `computes_angles`).

    Returns:
        Both in their own types. Positions and θ have no gradient.

    Raises:
        ValueError: shapes that do not fit, an unknown layout, or a backend that cannot run.
    """
    _check(q, k, position, theta, layout)
    arguments = (q, k, position, theta, layout, angles)
    turned: tuple[Tensor, Tensor] = _ROTARY.choose(backend, *arguments)(*arguments)
    return turned


def computes_angles(backend: str, *heads: Tensor) -> bool:
    """Whether `apply_rotary` of such heads [...,K] runs as a kernel that needs no cos and sin, but makes them itself.

    Raises:
        ValueError: a backend that is unknown or cannot run.
    """
    return _ROTARY.choose(backend, heads[0], heads[-1]) is _by_triton


# The row of the dispatch table; arguments: q, k, position, theta, layout, angles.


def _by_torch(
    q: Tensor,
    k: Tensor,
    position: Tensor,
    theta: Tensor,
    layout: str,
    angles: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    cos, sin = angles or rotation(position, theta, torch.promote_types(q.dtype, torch.float32))
    turn, interleaved = _turner(cos, sin, q.requires_grad or k.requires_grad), layout == "interleaved"
    return turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved)


def _by_triton(
    q: Tensor, k: Tensor, position: Tensor, theta: Tensor, layout: str, _: object
) -> tuple[Tensor, Tensor]:
    turned: tuple[Tensor, Tensor] = rotary_norm_operators.rotary(
        q, k, position, theta, layout == "interleaved", False
    )
    return turned


def _no_triton(
    q: Tensor, k: Tensor, position: Tensor | None = None, theta: Tensor | None = None, *_: object
) -> str | None:
    if theta is not None and is_differentiated(theta):
        return "theta requires a gradient, which the kernel does not compute"
    return capability.unfit_heads(q.shape[-1], q, k) or capability.missing(str(q.device))


_ROTARY = Op(
    "rotary",
    triton=Implementation(_by_triton, _no_triton, auto_on="cuda"),
    torch=Implementation(_by_torch),
    numba=Implementation(_by_torch),
    reference=Implementation(_by_torch),
)


def _check(q: Tensor, k: Tensor, position: Tensor, theta: Tensor, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(UNKNOWN_LAYOUT.format(layout))
    if q.dim() < 3 or q.shape[-1] % 2:
        raise ValueError(f"q has shape {tuple(q.shape)}; allowed: [...,H,K], K even")
    if k.shape != q.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}; allowed: that of q, {tuple(q.shape)}")
    if (
        position.dim() != q.dim() - 2
        or position.shape[1:] != q.shape[1:-2]
        or position.shape[0] not in (1, q.shape[0])
    ):
        raise ValueError(
            f"position has shape {tuple(position.shape)}; allowed: {tuple(q.shape[:-2])} as in q, or 1 for its first"
        )
    if theta.shape != (q.shape[-1] // 2,):
        raise ValueError(f"theta has shape {tuple(theta.shape)}; allowed: ({q.shape[-1] // 2},), half of K")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, cos.dtype)).contiguous()
    cos, sin = (
        cos.unsqueeze(-2).to(wide.dtype),
        sin.unsqueeze(-2).to(wide.dtype),
    )  # [..., 1, K/2], for all heads
    if interleaved:  # a pair is one complex number: a single pass over memory
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    out = torch.empty_like(wide)
    (a, b), (turned_a, turned_b) = wide.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=turned_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=turned_b).addcmul_(a, sin)
    return out.to(x.dtype)


def _rotate_by_autograd(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The same in operators that autograd knows, for angles that are learned."""
    wide = torch.promote_types(x.dtype, cos.dtype)
    pairs = x.to(wide).unflatten(-1, (-1, 2) if interleaved else (2, -1))
    a, b = pairs.unbind(-1 if interleaved else -2)
    cos, sin = cos.unsqueeze(-2).to(wide), sin.unsqueeze(-2).to(wide)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1 if interleaved else -2)
    return turned.flatten(-2).to(x.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    _, cos, sin, ctx.interleaved = inputs
    keep(ctx, cos, sin)


def _turn_back(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """The transpose of a rotation is the rotation by the opposite angle."""
    cos, sin = ctx.saved_tensors
    _refuse_angles(any(ctx.needs_input_grad[1:3]))
    if grad is None:
        return None, None, None, None
    return _OPERATOR(grad, cos, -sin, ctx.interleaved), None, None, None


def _turn_along(ctx: Any, x: Tensor | None, *angles: Tensor | None) -> Tensor:
    _refuse_angles(x is None or angles[0] is not None or angles[1] is not None)
    turned: Tensor = _OPERATOR(x, *ctx.saved_tensors, ctx.interleaved)
    return turned


def _refuse_angles(wanted: bool) -> None:
    if wanted:
        raise NotImplementedError(
            "a derivative of cos and sin is wanted from an operator without one; use `rotate`"
        )


def _rotate_many(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    """The rule of `torch.vmap`: one more dimension in front of all."""
    x, cos, sin, interleaved = inputs
    x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    for_each = []
    for angle, dim in zip((cos, sin), in_dims[1:3], strict=True):
        if dim is None:
            for_each.append(angle)  # it is broadcast
            continue
        angle = angle.movedim(dim, 0)
        for_each.append(angle.view(angle.shape[0], *[1] * (x.dim() - 1 - angle.dim()), *angle.shape[1:]))
    return _OPERATOR(x, *for_each, interleaved), 0


_OPERATOR = library.define(
    "rotary_torch",
    "(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    {"CompositeExplicitAutograd": _rotate},
    lambda x, cos, sin, interleaved: torch.empty_like(x).contiguous(),
    library.Derivatives(_save, _turn_back, _turn_along, _rotate_many),
)
