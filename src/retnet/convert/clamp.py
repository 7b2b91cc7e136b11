"""torchscale's score clamp, the one part of its function that has no recurrent form: how far it acts, and how to keep it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from retnet.convert.weights import Found
from retnet.mixers import RetentionConfig


def with_clamp(found: Found) -> Found:
    """The same weights with the clamp: torchscale's parallel form exactly, for whole sequences alone."""
    mixer = found.config.mixer
    assert isinstance(mixer, RetentionConfig)  # what torchscale is read as
    return replace(found, config=replace(found.config, mixer=replace(mixer, score_norm="torchscale")))


def clamp_effect(found: Found, tokens: Tensor) -> float:
    """‖logits without the clamp − logits with it‖ / ‖logits with it‖.

    Args:
        found: a model of torchscale.
        tokens: int64 [B,T], what to measure it on; time and memory grow with T².
    """
    wide = found if found.dtype in (torch.float32, torch.float64) else found.to(torch.float32)
    with torch.inference_mode():
        exact = with_clamp(wide).model()(tokens).double()
        return float((wide.model()(tokens).double() - exact).norm() / exact.norm())


def random_tokens(vocab_size: int) -> Tensor:
    """Token ids [2,128] to measure on where no text is at hand, the same at every call."""
    return torch.randint(vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
