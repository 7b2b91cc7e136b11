"""Tensor parallelism: what ranks that hold parts of the same weights exchange, and cross entropy over a cut vocabulary.

A pair of products is cut once (Shoeybi et al. 2019, "Megatron-LM", §3): the first one by its outputs (column-parallel: heads
of a mixer, the width of an FFN), the second one by its inputs (row-parallel), so that all between them, decay, head norm and
gate, stays where its head is. Each rank reads the whole input and makes a summand of the output: two all-reduces a block
forwards, and two backwards. Of the vocabulary each rank has a stretch; of logits only three numbers a token travel.
"""

# ruff: noqa: ANN401 (torch's contexts of derivatives take any attribute)

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class TensorParallel:
    """The ranks that compute the same tokens with a part of the weights each.

    Args:
        group: these ranks; the parts are in their order.

    Attributes:
        group: as given.
        rank: of this one, in the group.
        size: how many there are.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def part(self, size: int) -> tuple[int, int]:
        """Begin and end of this rank's part of an axis, as `torch.chunk` cuts it: the last may be shorter."""
        return part_of(size, self.rank, self.size)

    def replicated(self, x: Tensor) -> Tensor:
        """x, which all ranks have alike and go on from with their own weights: gradients are summed over them."""
        y: Tensor = _Replicated.apply(x, self.group)  # type: ignore[no-untyped-call]  # torch has no types here
        return y

    def summed(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, on all of them, each of which goes on in the same way: gradients stay as they are."""
        y: Tensor = _Summed.apply(x, self.group)  # type: ignore[no-untyped-call]  # torch has no types here
        return y

    def scores(self, logits: Tensor, targets: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """What cross entropy is made of, ln Σ_v exp(logits_v) and the logit of the target, over a cut vocabulary.

        Args:
            logits: [N,V'] of this rank's `part` of the vocabulary; fp32 or fp64.
            targets: int64 [N], of the whole vocabulary; one that is outside it has the logit 0.
            vocabulary: V.

        Returns:
            Two tensors [N], the same on all ranks.
        """
        begin, _ = self.part(vocabulary)
        found: tuple[Tensor, Tensor] = _VocabularyScores.apply(logits, targets - begin, self.group)  # type: ignore[no-untyped-call]  # torch has no types here
        return found


def part_of(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """See `TensorParallel.part`."""
    longest = -(-size // ranks)
    return min(rank * longest, size), min((rank + 1) * longest, size)


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Replicated(torch.autograd.Function):
    """Identity forwards, all-reduce backwards: f of Megatron-LM."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.group), None


class _Summed(torch.autograd.Function):
    """All-reduce forwards, identity backwards: g of Megatron-LM."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _VocabularyScores(torch.autograd.Function):
    """Vocabulary-parallel log-sum-exp and target's logit; kept for the backward pass are the logits alone."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, own: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        here = (own >= 0) & (own < logits.shape[1])
        own = own.masked_fill(~here, 0)[:, None]
        largest = logits.amax(1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        total = (logits - largest[:, None]).exp_().sum(1)
        score = logits.gather(1, own).squeeze(1).masked_fill(~here, 0)
        both = torch.stack([total, score])
        dist.all_reduce(both, group=group)
        log_normaliser, score = both[0].log() + largest, both[1].clone()
        ctx.save_for_backward(logits, own, here, log_normaliser)
        return log_normaliser, score

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_normaliser: Tensor, d_score: Tensor) -> tuple[Tensor, None, None]:
        logits, own, here, log_normaliser = ctx.saved_tensors
        grad = (logits - log_normaliser[:, None]).exp_().mul_(d_normaliser[:, None])
        grad.scatter_add_(1, own, d_score.masked_fill(~here, 0)[:, None])
        return grad, None, None
