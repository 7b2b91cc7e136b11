"""Parts of weights: a module that keeps a stretch of an axis of a parameter, as tensor parallelism cuts them."""

from __future__ import annotations

from torch import nn


def narrow_parameter(module: nn.Module, name: str, axis: int, begin: int, end: int, of: int) -> None:
    """Leaves a parameter a stretch of one of its axes; a linear layer counts its features anew.

    Args:
        module: in which the parameter is.
        name: such as ``"q_proj.weight"``; without effect where the module has None for it, or none.
        axis: that is cut.
        begin: of what stays, in pieces.
        end: of what stays, in pieces.
        of: number of pieces, all equal, that the axis has: heads, or its entries. Where some share a piece of it, the
            stretch must begin and end with a whole one.
    """
    path, _, last = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:  # an optional part that is None
        return
    whole = getattr(owner, last, None)
    if whole is None:
        return
    start, stop = (place * whole.shape[axis] // of for place in (begin, end))
    kept = whole.detach().narrow(axis, start, stop - start).clone()
    setattr(owner, last, nn.Parameter(kept, requires_grad=whole.requires_grad))
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = kept.shape
