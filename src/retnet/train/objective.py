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

POSITIONS = tuple(16 * 4**i for i in range(8))  # where stretches of a document begin, after the first


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

    @classmethod
    def of(cls, nats: float, tokens: int, bytes_per_token: float) -> Quality:
        """That of so many tokens, for which a model pays so many nats in all."""
        loss = nats / tokens
        return cls(loss, loss / math.log(2) / bytes_per_token, tokens)


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
    (nats,), tokens = summed(
        objective,
        batches,
        device=device,
        autocast=autocast,
        max_tokens=max_tokens,
        ranks=ranks,
        on_batch=on_batch,
    )
    return Quality.of(nats, tokens, bytes_per_token)


def summed(
    objective: nn.Module,
    batches: Batches,
    *,
    device: torch.device,
    autocast: torch.autocast,
    max_tokens: int | None = None,
    ranks: Ranks = ALONE,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[list[float], int]:
    """What a module of `Objective`'s arguments gives, a scalar or vector, summed over batches; and how many targets counted.

    Arguments are those of `evaluate`.
    """
    training = objective.training
    objective.eval()
    total, tokens, turns = torch.zeros(1, dtype=torch.float64), 0, 0
    readers = ranks.axes.readers

    def measured(batch: Batch) -> Tensor:
        found: Tensor = objective(*(x.to(device) for x in ranks.part(batch)))
        return found.flatten().to("cpu", torch.float64)

    with torch.no_grad(), autocast:
        for batch in batches.in_order():
            if turns % readers == ranks.reader:
                total = total + measured(batch)
            turns += 1
            on_batch()
            tokens += count(batch.targets)
            if max_tokens is not None and tokens >= max_tokens:
                break
        if 0 < turns % readers <= ranks.reader:  # the last turn of others: all put shared weights together
            total = total + torch.zeros_like(measured(batch))
    sums = ranks.sum((total if ranks.counts else torch.zeros_like(total)).tolist(), device)
    objective.train(training)
    return sums, tokens


class ByPosition(Objective):
    """Cross entropy by the place of tokens in their documents: nats of each stretch of `POSITIONS`, then targets of each."""

    def forward(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
        """As `Objective.forward`; a vector of two numbers a stretch."""
        logits = self.model(tokens.reshape(1, -1), cu_seqlens=cu_seqlens).squeeze(0)
        nats = F.cross_entropy(logits.to(widened(logits)), targets.flatten(), reduction="none")
        places = torch.arange(len(nats), device=nats.device)
        begins = cu_seqlens.long()[torch.searchsorted(cu_seqlens.long(), places, right=True) - 1]
        stretch = torch.bucketize(places - begins, torch.tensor(POSITIONS, device=nats.device), right=True)
        counts = (targets.flatten() != IGNORED).to(nats.dtype)
        zeros = nats.new_zeros(len(POSITIONS) + 1)
        return torch.cat([zeros.index_add(0, stretch, nats * counts), zeros.index_add(0, stretch, counts)])


class Repetition(Objective):
    """Recall in context: the first half of each row, twice; how many tokens of the second are predicted, and of how many."""

    def forward(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
        """As `Objective.forward`; two numbers."""
        half = tokens[:, : tokens.shape[1] // 2]
        rows, length = half.shape
        bounds = torch.arange(rows + 1, device=half.device, dtype=torch.int32) * 2 * length
        logits = self.model(half.repeat(1, 2).view(1, -1), cu_seqlens=bounds).view(rows, 2 * length, -1)
        right = (logits[:, length - 1 : -1].argmax(-1) == half).sum()
        return torch.stack([right, torch.full_like(right, half.numel())]).float()
