"""All private interfaces of torch that are relied on, in one place; `tests/ops/test_private.py` says which one moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch._functorch import autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

F = TypeVar("F", bound=Callable[..., Any])

# What `torch.autograd.Function` is without its detour around torch.func, which an operator's autograd key must not take.
SingleLevelFunction: Any = _SingleLevelFunction
allow_single_level: Any = autograd_function.enable_single_level_autograd_function  # type: ignore[attr-defined]  # no name of its public module


def below_autograd() -> AbstractContextManager[Any]:
    """In which operators are called past their autograd keys, from the forward of a `SingleLevelFunction`.

    That turns derivatives off. Under `torch.func` what is called is the level below, which may want some of its own.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return torch._C._AutoDispatchBelowAutograd()
    return _at_the_level_below()


@contextmanager
def _at_the_level_below() -> Iterator[None]:
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def transforming() -> bool:
    """Whether this runs inside a transform of `torch.func`; not asked while tracing, which has its own ways with them."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """In which operators are called past the autocast key of a type of device."""
    key = getattr(torch._C.DispatchKey, autocast_key(device))
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))


def autocast_key(device: str) -> str:
    """The dispatch key under which autocast intercepts an operator on a type of device ("cpu", "cuda")."""
    return "Autocast" + str(torch._C._dispatch_key_for_device(device))


def plain() -> bool:
    """Whether operators run at once and as they are: nothing traces, transforms, differentiates forwards or intercepts."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def differentiating_forwards() -> bool:
    """Whether tensors may have tangents: inside `torch.func.jvp` or `torch.autograd.forward_ad.dual_level`."""
    return forward_ad._current_level >= 0


def is_readable(x: Tensor) -> bool:
    """Whether values of x can be looked at, and at once: it is on a CPU, not traced, and not many under `torch.vmap`."""
    if not x.is_cpu or torch.compiler.is_compiling():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return True


def is_batched(x: Tensor) -> bool:
    """Whether x is many tensors at once: a gradient under `torch.vmap`, or with torch's `is_grads_batched`."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.is_legacy_batchedtensor(x) or torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def is_differentiated(*tensors: Tensor) -> bool:
    """Whether somebody wants a derivative with respect to one: backwards, forwards, or at any level of `torch.func`."""
    forwards = forward_ad._current_level >= 0
    for x in tensors:
        if x.requires_grad or (forwards and forward_ad.unpack_dual(x).tangent is not None):
            return True
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return False
    level = torch._C._functorch
    return any(
        level.is_functorch_wrapped_tensor(x) and is_differentiated(level.get_unwrapped(x)) for x in tensors
    )


# Where a module keeps hooks: what has any must be called, and not only computed.
FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
HOOKS = (*FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")

# One call for many tensors, as torch's optimisers make it: norms of an order, products with a number, copies.
foreach_norm, foreach_multiply, foreach_copy = torch._foreach_norm, torch._foreach_mul_, torch._foreach_copy_

# assert_on_device(condition, words): fails where the condition is computed, which nobody waits for.
assert_on_device = torch._assert_async


def begin_of_part(x: DTensor) -> tuple[int, ...]:
    """Where in the whole tensor the part begins that this process holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, begin = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return tuple(begin)


# onednn_linear(x, weight): x Wᵀ by oneDNN, fp32 on a CPU, without a derivative; None where torch does not carry oneDNN.
onednn_linear: Callable[[Tensor, Tensor], Tensor] | None = None
if torch.backends.mkldnn.is_available():
    onednn_linear = partial(torch.ops.mkldnn._linear_pointwise, B=None, attr="none", scalars=[], algorithm="")


def constant_in_traces(function: F) -> F:
    """What `torch.compiler.assume_constant_result` does; that imports the whole compiler, seconds for everybody."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions may have any
    return function


def keep(ctx: Any, *tensors: Tensor | None) -> None:  # noqa: ANN401
    """Saves tensors for the backward rule, and for the forward-mode rule while somebody differentiates so."""
    ctx.set_materialize_grads(
        False
    )  # what is not there is None in both directions, and not a tensor of zeros
    ctx.save_for_backward(*tensors)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors)
