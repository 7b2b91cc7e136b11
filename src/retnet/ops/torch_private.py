"""All private interfaces of torch that the ops rely on, in one place; `tests/ops/test_private.py` says which one moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch import autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

F = TypeVar("F", bound=Callable[..., Any])

# What `torch.autograd.Function` is without its detour around torch.func, which an operator's autograd key must not take.
SingleLevelFunction: Any = _SingleLevelFunction
allow_single_level: Any = autograd_function.enable_single_level_autograd_function  # type: ignore[attr-defined]


@contextmanager
def below_autograd() -> Iterator[None]:
    """In which operators are called past their autograd keys, from the forward of a `SingleLevelFunction`.

    That turns derivatives off. Under `torch.func` what is called is the level below, which may want some of its own.
    """
    with torch._C._AutoDispatchBelowAutograd(), ExitStack() as stack:
        if transforming():
            stack.enter_context(torch.enable_grad())
            stack.enter_context(forward_ad._set_fwd_grad_enabled(True))
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
        or transforming()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def differentiating_forwards() -> bool:
    """Whether tensors may have tangents: inside `torch.func.jvp` or `torch.autograd.forward_ad.dual_level`."""
    return forward_ad._current_level >= 0


def is_batched(x: Tensor) -> bool:
    """Whether x stands for many tensors at once, under `torch.vmap`: its values cannot be looked at."""
    if not transforming():
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def is_differentiated(x: Tensor) -> bool:
    """Whether somebody wants a derivative with respect to x: backwards, forwards, or at any level of `torch.func`."""
    if x.requires_grad or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None):
        return True
    if not transforming():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return wrapped and is_differentiated(torch._C._functorch.get_unwrapped(x))


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ by oneDNN, fp32 on a CPU; no derivative."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def constant_in_traces(function: F) -> F:
    """What `torch.compiler.assume_constant_result` does; that imports the whole compiler, seconds for everybody."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
