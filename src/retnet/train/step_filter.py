"""Skipping of bad steps: those whose loss or gradient is not finite, or whose gradient's norm is a spike.

The optimiser never sees such a step: weights, its memory and the average of the weights stay as they are, to the bit; data
and schedule go on.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from retnet.train.config import TrainConfig

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
