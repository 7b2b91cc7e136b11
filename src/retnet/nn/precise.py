"""Numerical precision under autocast and `.to(bfloat16)`: computing in fp32 or better, parameters that are not rounded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def widened(x: Tensor) -> torch.dtype:
    """The type to compute in: that of x, at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def exactly(x: Tensor) -> AbstractContextManager[object]:
    """A context in which products stay in the type of x, whatever surrounds it."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class Precise(nn.Module):
    """A module whose parameters stay fp32 or better: `.to(bfloat16)` does not round decays and filters."""

    def _apply(self: M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> M:
        def keep(x: Tensor) -> Tensor:
            y = fn(x)
            narrowed = y.is_floating_point() and y.dtype.itemsize < min(x.dtype.itemsize, 4)
            return x.to(y.device) if narrowed else y

        return super()._apply(keep, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
