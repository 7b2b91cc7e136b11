"""One training step of a model: forward pass, cross entropy, backward pass, fused AdamW."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.measure.clock import median_seconds, wait
from retnet.train.config import TrainConfig
from retnet.train.optimizer import adamw


class Learner:
    """A model in training, its optimiser, and the steps they make.

    Args:
        model: whose parameters learn.
        logits: tokens [B,T] → logits [B,T,vocab_size], or both packed alike; the model itself where left out.
        optimizer: of another learner of the same model; the AdamW of `retnet train` where left out.
        bf16: whether the forward pass runs under bf16 autocast; weights stay what they are.
    """

    def __init__(
        self,
        model: nn.Module,
        logits: Callable[[Tensor], Tensor] | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        bf16: bool = False,
    ) -> None:
        self.model, self.logits = model.train(), logits or model
        self.optimizer = optimizer or adamw(model, TrainConfig())
        self.device = next(model.parameters()).device
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def step(self, tokens: Tensor, targets: Tensor) -> None:
        """Learns to predict targets from tokens, both int64 [B,T]."""
        with self.autocast:
            logits = self.logits(tokens)
        torch.autograd.backward(F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        wait(self.device)

    def seconds(self, tokens: Tensor, targets: Tensor) -> float:
        """Of one step."""
        return median_seconds(lambda: self.step(tokens, targets), 1, warmup=0)
