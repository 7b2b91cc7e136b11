"""Kernels of torch that have a first derivative alone: a second one is refused with what has it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from retnet.ops.torch_private import differentiating_forwards, transforming


def needs_formula() -> bool:
    """Whether derivatives forwards, many at once or of any order may be wanted, which such kernels lack."""
    return transforming() or differentiating_forwards()


def once_differentiable(y: Tensor, message: str) -> Tensor:
    """y, made by such a kernel: a backward pass that is to be differentiated itself (`create_graph`) is refused.

    Args:
        y: what the kernel made.
        message: what is refused, and what has second derivatives.
    """
    if y.requires_grad and not torch.compiler.is_compiling():
        y.register_hook(partial(_refuse_second, message))
    return y


def _refuse_second(message: str, grad: Tensor) -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError(message)
