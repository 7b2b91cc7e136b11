"""Exponential moving average (EMA) of weights: kept beside them, evaluated, and saved as the model of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from retnet.model import LanguageModel
from retnet.ops.torch_private import foreach_copy
from retnet.train.distributed import ALONE, Ranks, own_part


class AveragedWeights:
    """Moving average of a model's weights: after step n, average ← d · average + (1 − d) · weights.

    There d is min(decay, n / (n + 9)): it rises to its value (as in TensorFlow's `ExponentialMovingAverage`), so that the
    first weights, which are random, weigh nothing soon. Each rank averages its own part of the weights, in their type.

    Args:
        model: whose parameters are averaged; the average begins as they are.
        decay: in [0, 1).
        ranks: that share the parameters.
    """

    def __init__(self, model: LanguageModel, decay: float, ranks: Ranks = ALONE) -> None:
        self._decay, self._ranks = decay, ranks
        self._weights = dict(model.named_parameters())
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._weights.items()}

    def update(self, step: int) -> None:
        """Takes in the weights after a step, counted from 1."""
        decay = min(self._decay, step / (step + 9))
        get_ema_multi_avg_fn(decay)(self._own(self.tensors), self._own(self._weights), None)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average as its weights inside the block, and its own again after it."""
        weights, averages = self._own(self._weights), self._own(self.tensors)
        held = [weight.clone() for weight in weights]
        with torch.no_grad():
            foreach_copy(weights, averages)
        try:
            yield
        finally:
            with torch.no_grad():
                foreach_copy(weights, held)

    def _own(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [own_part(x.detach(), self._ranks) for x in tensors.values()]
