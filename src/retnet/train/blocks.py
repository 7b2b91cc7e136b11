"""Blocks of a model changed from outside, for training: activation checkpointing, compilation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint

from retnet.model import LanguageModel

Forward = Callable[..., Any]


def recompute_blocks(model: LanguageModel) -> None:
    """Keeps only the inputs of blocks for the backward pass."""
    change_blocks(model, lambda forward: functools.partial(checkpoint, forward, use_reentrant=False))


def change_blocks(model: LanguageModel, change: Callable[[Forward], Forward]) -> None:
    """Wraps the forward pass of every block, from outside: names of weights and hooks of modules stay as they are."""
    for block in model.blocks:
        block.forward = change(block.forward)
