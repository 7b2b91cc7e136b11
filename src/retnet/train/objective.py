"""Training objective (summed cross entropy of the next token) and evaluation on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.data import IGNORED, Batch, Batches
from retnet.model import LanguageModel
from retnet.nn import widened
from retnet.ops.tensor_parallel import TensorParallel
from retnet.train.distributed import ALONE, Ranks


class Objective(nn.Module):
    """Summed cross entropy of the next token, in nats: one module with one forward pass, to be compiled or wrapped.

    Args:
        model: that predicts.
        z_loss: weight of the z-loss, (log Z)² summed over the targets that count, with Z = Σ exp(logits) (PaLM, §5: 1e-4).
            It draws log Z to 0, so that logits do not drift. It is learned from and not shown: the gradient has it, the
            value is the cross entropy alone.
        tp: the ranks that have a part of the vocabulary each; None: the model has all of it.
    """

    def __init__(self, model: LanguageModel, z_loss: float = 0.0, tp: TensorParallel | None = None) -> None:
        super().__init__()
        self.model, self.z_loss, self.tp = model, z_loss, tp

    def forward(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Tokens and targets int64 [B,T], documents bounded by `cu_seqlens` in the rows laid end to end; a scalar.

        In fp32, or fp64 where the weights are.
        """
        logits = self.model(tokens.reshape(1, -1), cu_seqlens=cu_seqlens).squeeze(0)
        logits, targets = logits.to(widened(logits)), targets.flatten()
        with_z = self.z_loss and self.training
        if self.tp is None:
            nats: Tensor = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
            log_normaliser = logits.logsumexp(-1) if with_z else None
        else:
            vocabulary = self.model.config.vocab_size
            assert vocabulary is not None
            log_normaliser, score = self.tp.scores(logits, targets, vocabulary)
            nats = (log_normaliser - score).masked_fill(targets == IGNORED, 0).sum()
        if not with_z or log_normaliser is None:
            return nats
        z: Tensor = self.z_loss * ((targets != IGNORED) * log_normaliser.square()).sum()
        return nats + (z - z.detach())


def count(targets: Tensor) -> int:
    """Targets that count."""
    return int((targets != IGNORED).sum())


class Quality(NamedTuple):
    """How well a model predicts held-out text."""

    loss: float  # nats per token
    bits_per_byte: float  # of the text's UTF-8 bytes, document starts paid for
    tokens: int


def evaluate(
    objective: nn.Module,
    batches: Batches,
    *,
    bytes_per_token: float,
    device: torch.device,
    autocast: torch.autocast,
    max_tokens: int | None = None,
    ranks: Ranks = ALONE,
    on_batch: Callable[[], None] = lambda: None,
) -> Quality:
    """Loss over the batches in the order of the text, or over the first `max_tokens` of it.

    Args:
        objective: an `Objective`; its mode is restored.
        batches: the held-out text.
        bytes_per_token: UTF-8 bytes of the text per token, to turn nats per token into bits per byte.
        device: where the objective lies.
        autocast: context of the forward pass.
        max_tokens: None for all.
        ranks: the processes that share the objective's weights; they take turns with the batches, or share them.
        on_batch: called after each.
    """
    training = objective.training
    objective.eval()
    total, tokens, turns = 0.0, 0, 0
    readers = ranks.axes.readers

    def nats(batch: Batch) -> float:
        return float(objective(*(x.to(device) for x in ranks.part(batch))))

    with torch.no_grad(), autocast:
        for batch in batches.in_order():
            if turns % readers == ranks.reader:
                total += nats(batch)
            turns += 1
            on_batch()
            tokens += count(batch.targets)
            if max_tokens is not None and tokens >= max_tokens:
                break
        if 0 < turns % readers <= ranks.reader:  # the last turn of others: all put shared weights together
            nats(batch)
    (total,) = ranks.sum([total if ranks.counts else 0.0], device)
    objective.train(training)
    loss = total / tokens
    return Quality(loss, loss / math.log(2) / bytes_per_token, tokens)
