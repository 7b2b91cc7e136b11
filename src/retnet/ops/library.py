"""Custom operators of torch (`torch.library`): schema, kernels, fake kernel, derivatives, vmap and autocast from one call.

Derivatives go to the operator's autograd key as one function with a backward, a forward-mode and a batching rule. What
`torch.library.register_autograd` makes has a backward alone: under forward-mode differentiation its results silently have no
tangent, and `torch.func.grad` refuses it.
"""

# ruff: noqa: ANN401 (torch's contexts of derivatives take any attribute, and its operators any argument)

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retnet.ops import torch_private

_LIBRARY = torch.library.Library("retnet", "FRAGMENT")
Outputs = Tensor | tuple[Tensor, ...]


class Derivatives(NamedTuple):
    """The rules of an operator; `ctx` is that of a `torch.autograd.Function`.

    Attributes:
        save: save(ctx, inputs, output), which keeps what the others need, tensors by `keep`.
        backward: backward(ctx, *d_outputs): the gradient of every input; a d_output is None where nothing depends on it.
        jvp: jvp(ctx, *tangents): the tangent of every output, from those of the inputs, None where they have none.
        vmap: vmap(info, in_dims, *inputs): outputs and their batch dimensions, as `torch.library.register_vmap` has it.
    """

    save: Callable[..., None]
    backward: Callable[..., Any]
    jvp: Callable[..., Any]
    vmap: Callable[..., Any]


def define(
    name: str,
    schema: str,
    kernels: Mapping[str, Callable[..., Any]],
    fake: Callable[..., Any],
    derivatives: Derivatives | None = None,
    instead: str = "backend 'reference'",
    casts: int = 0,
) -> Any:
    """Defines ``retnet::name``.

    Args:
        name: op, form and backend, as in ``retention_chunkwise_torch``.
        schema: arguments and results in torch's words, ``"(Tensor x, …) -> Tensor"``.
        kernels: the functions that compute it, by type of device, or ``"CompositeExplicitAutograd"`` for every device.
        fake: shapes and types of the results alone.
        derivatives: its rules; None: whoever asks for a derivative, or for `torch.vmap`, is refused by name.
        instead: what has them, for those who are refused.
        casts: under autocast so many first arguments take its type; the others keep theirs.

    Returns:
        The operator, to be called.
    """
    _LIBRARY.define(name + schema)
    full = f"retnet::{name}"
    for key, kernel in kernels.items():
        torch.library.impl(full, key, kernel, lib=_LIBRARY)
    torch.library.register_fake(full, fake, lib=_LIBRARY)
    op = getattr(torch.ops.retnet, name).default
    rules = derivatives or refusals(name, instead)
    _LIBRARY.impl(name, _differentiable(op, name, rules), "Autograd")
    torch.library.register_vmap(full, rules.vmap, lib=_LIBRARY)
    if casts:
        for device in ("cpu", "cuda"):
            _LIBRARY.impl(name, _narrowing(op, device, casts), torch_private.autocast_key(device))
    return op


def _differentiable(op: Any, name: str, rules: Derivatives) -> Callable[..., Any]:
    """The operator's kernel at its autograd key: notes the rules, and runs the operator below."""

    def forward(*inputs: object) -> Outputs:
        with torch_private.below_autograd():
            result: Outputs = op(*inputs)
            return result

    members: dict[str, Any] = {
        "forward": forward,
        "setup_context": rules.save,
        "backward": rules.backward,
        "jvp": rules.jvp,
    }
    node: Any = type(
        name, (torch_private.SingleLevelFunction,), {key: staticmethod(rule) for key, rule in members.items()}
    )

    def kernel(*inputs: object) -> Outputs:
        with torch_private.allow_single_level():
            result: Outputs = node.apply(*inputs)
            return result

    return kernel


def refusals(name: str, instead: str) -> Derivatives:
    """The rules of an operator that has no derivative, but `instead` has."""

    def save(ctx: Any, inputs: object, output: object) -> None:
        pass

    def refuse(kind: str) -> Callable[..., Any]:
        def rule(*_: object) -> Any:
            raise NotImplementedError(f"retnet::{name} has no {kind}; use {instead}")

        return rule

    return Derivatives(
        save, refuse("gradient"), refuse("forward-mode derivative"), refuse("batching rule (torch.vmap)")
    )


def _narrowing(op: Any, device: str, count: int) -> Callable[..., Any]:
    """The operator's kernel at its autocast key. `torch.library.register_autocast` would narrow every tensor."""

    def kernel(*inputs: Any) -> Outputs:
        dtype = torch.get_autocast_dtype(device)
        with torch_private.without_autocast(device):
            result: Outputs = op(*(x.to(dtype) for x in inputs[:count]), *inputs[count:])
            return result

    return kernel
