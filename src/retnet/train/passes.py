"""The passes of a training step: forwards and backwards, shared by the processes, until all gradients are there."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import nn

from retnet.data import Batch, Batches
from retnet.model import LanguageModel
from retnet.train.config import TrainConfig
from retnet.train.distributed import Ranks
from retnet.train.gradients import share_of_square
from retnet.train.notices import Notices
from retnet.train.objective import count


class StepGradient(NamedTuple):
    """What the passes of a step come to, on all ranks together."""

    loss: float  # nats per token
    norm: float  # of the gradient of that
    mean: float  # factor that makes it of the gradients there are: tokens ÷ targets that count
    batches: list[Batch]  # of this rank, that may have spoiled it
    waited: float  # seconds until all of them were there


class Passes:
    """This process's share in the passes of all steps.

    Args:
        model: that learns.
        objective: from tokens, targets and bounds of documents to the sum of the model's losses in nats.
        batches: to learn from.
        device: where the objective lies.
        autocast: context of the forward pass.
        notices: by which the processes agree.
        ranks: of these processes.
        at: is told the step, and where in it this process is; see `HangDetector.at`.
    """

    def __init__(
        self,
        model: LanguageModel,
        objective: nn.Module,
        batches: Batches,
        device: torch.device,
        autocast: torch.autocast,
        notices: Notices,
        ranks: Ranks,
        at: Callable[[int, str], None] = lambda step, place: None,
    ) -> None:
        self._at = at
        self._model, self._objective, self._batches = model, objective, batches
        self._device, self._autocast, self._notices, self._ranks = device, autocast, notices, ranks
        self._reader = ThreadPoolExecutor(1, "retnet-batches")
        self._ahead: tuple[range, Future[list[Batch]]] | None = None  # of the next step

    def gradients(self, step: int, c: TrainConfig) -> StepGradient:
        """Leaves in the model's parameters the gradient of a step's losses ÷ its tokens.

        Of the passes of a step, this process makes those whose number is its place among the readers modulo their number.
        The processes agree once, when all gradients are there, in one small reduction.
        """
        ranks, begin = self._ranks, time.perf_counter()
        self._objective.train()
        self._at(step + 1, "reads its batches")
        passes, places = c.passes(step), self._places(step, c)
        batches = self._read(places)
        waited = time.perf_counter() - begin
        if step + 1 < c.steps:
            after = self._places(step + 1, c)
            self._ahead = after, self._reader.submit(lambda: [self._batches.batch(place) for place in after])
        tokens = passes * c.batch_size * c.seq_len
        found, counted = [], 0
        for place, batch in zip(places, batches, strict=True):
            if not ranks.alone:  # dropout's masks: of the pass and stretch, whatever the number of processes
                stretch = f" {ranks.stretch}" if ranks.context else ""
                torch.manual_seed(random.Random(f"{c.seed} {place}{stretch}").getrandbits(63))
            part = ranks.part(batch)
            self._at(step + 1, "computes")
            with self._autocast:
                nats = self._objective(*(x.to(self._device, non_blocking=True) for x in part))
            (nats / tokens).backward()
            found.append(nats.detach())
            counted += count(part[1])
        losses = [float(nats) for nats in found]  # only now, for a number waits for the device
        square, once = share_of_square(self._model, ranks), int(ranks.counts)
        self._at(step + 1, "agrees with the others")
        total, targets, square_of_all = self._notices.sum(once * sum(losses), once * counted, square)
        if not math.isfinite(total):
            batches = [batch for batch, nats in zip(batches, losses, strict=True) if not math.isfinite(nats)]
        mean = tokens / targets  # over what counts, which no process knew before
        return StepGradient(total / targets, math.sqrt(square_of_all) * mean, mean, batches, waited)

    def _places(self, step: int, c: TrainConfig) -> range:
        """The positions of this process's batches of a step."""
        first = c.passes_before(step)
        return range(first + self._ranks.reader, first + c.passes(step), self._ranks.axes.readers)

    def _read(self, places: range) -> list[Batch]:
        """Batches, which a thread has read while the step before was computed, unless it was another one."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == places:
            return ahead[1].result()
        return [self._batches.batch(place) for place in places]
