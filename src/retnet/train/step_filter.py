"""Skipping of bad steps: those whose loss or gradient is not finite, or whose gradient's norm is a spike.

The optimiser never sees such a step: weights, its memory and the average of the weights stay as they are, to the bit; data
and schedule go on.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from retnet.data import Batch
from retnet.errors import UserError
from retnet.model import LanguageModel
from retnet.model.checkpoint import weights
from retnet.train.checkpoints import spoiled
from retnet.train.config import TrainConfig
from retnet.train.distributed import Ranks
from retnet.train.run_dir import RunDirectory

NAMED = 8  # documents of a skipped step, in its message
RECENT = 100  # norms whose median a spike is measured by
ENOUGH = 20  # of them, before there are spikes
LARGEST = 1e19  # norm of a gradient whose square, which AdamW keeps, still is a number in fp32


class StepFilter:
    """Decides whether the optimiser takes a step, and counts those that it does not.

    Args:
        c: `spike` and `skip_limit`.
        norms: of the gradients of the last steps that were taken, as a checkpoint has them.
        skipped: steps so far.
        in_a_row: of them, the last ones.
    """

    def __init__(
        self, c: TrainConfig, norms: Sequence[float] = (), skipped: int = 0, in_a_row: int = 0
    ) -> None:
        self._spike, self._limit = c.spike, c.skip_limit
        self._norms: deque[float] = deque(norms, maxlen=RECENT)
        self.skipped = skipped  # in the whole run
        self.in_a_row = in_a_row
        self._last = ""  # that was skipped, in words

    @property
    def norms(self) -> tuple[float, ...]:
        """Of the last steps that were taken, if a spike is measured by them."""
        return tuple(self._norms)

    @property
    def ended(self) -> bool:
        """Whether as many steps were skipped in a row as may be."""
        return self.in_a_row >= self._limit

    def problem(self, loss: float, norm: float) -> str:
        """What is wrong with a step, such as ``"the loss became nan"``; empty if it is to be taken. Counts it.

        Args:
            loss: of the step.
            norm: of its gradient, before clipping.
        """
        found = self._problem(loss, norm)
        if found:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            return found
        self.in_a_row = 0
        if self._spike:
            self._norms.append(norm)
        return ""

    def _problem(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return f"the loss became {loss}"
        if not norm < LARGEST:
            return f"the gradient became {norm}"
        if self._spike and len(self._norms) >= ENOUGH:
            usual = statistics.median(self._norms)
            if norm > self._spike * usual:
                return f"the gradient's norm became {norm:.3g}, and the median of the steps before is {usual:.3g}"
        return ""

    def said(
        self,
        problem: str,
        step: int,
        model: LanguageModel,
        batches: Sequence[Batch],
        ranks: Ranks,
        run: RunDirectory,
    ) -> str:
        """A skipped step in words: why, and where it began, in which tensor, with which documents of all ranks.

        Raises:
            UserError: a weight is not finite, so that there will never be a step to take.
        """
        if (bad := spoiled(weights(model), ranks)) is not None:  # not the documents' doing
            raise UserError(
                f"{problem} at step {step}, since {bad} is not finite after step {step - 1}; "
                f"{run.whole}. Try a lower train.learning_rate or more train.warmup_steps"
            )
        # backwards: a gradient that is not finite spoils those of all layers below
        named = reversed(list(model.named_parameters()))
        first = spoiled({name: p.grad for name, p in named if p.grad is not None}, ranks)
        where = f"; its gradient is not finite from {first} on down" if first else ""
        mine = [d for batch in batches for d in batch.documents if d >= 0]
        documents = sorted({d for found in ranks.gather(mine) for d in found})
        more = f" and {len(documents) - NAMED:,} more" if len(documents) > NAMED else ""
        self._last = f"{problem} at step {step}, in documents {documents[:NAMED]}{more}{where}"
        return self._last

    def ending(self, step: int, c: TrainConfig) -> str:
        """Why a run ends whose last steps, up to this one, were all skipped; its checkpoint is written."""
        on = (
            f"step {step} was the last, and the run is complete without them. If that is not enough"
            if step == c.steps
            else f"saved at step {step}, and --resume goes on with the documents after it. If that happens again"
        )
        return (
            f"{self.in_a_row} steps in a row were skipped, the last since {self._last}. Their steps changed no "
            f"weight; {on}, begin a run with a lower train.learning_rate, more train.warmup_steps, a smaller train.clip "
            f"(now {c.clip}), another train.spike or train.precision = 'fp32', or look at those documents"
        )
