"""Time budget of a run: its remaining time, and the number of steps that fit into `train.minutes`."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from retnet.train.config import TrainConfig

RECENT = 20  # steps whose median, per pass, says how long the next one takes
SLOW = 2  # steps at the beginning that do not count: memory is mapped and kernels are compiled in them
MEASURED = 8  # steps that count before a run is planned, at least
PART = 0.06  # of the minutes that are measured before a run is planned, at least
LONG = 60.0  # seconds that are enough, however many minutes there are
FORWARD = (
    0.4  # seconds per token of a validation ÷ those of a step, until one was measured (a third of the flops)
)
SPARE = 0.04  # of what is left when a run is planned: steps take longer now and then
STEEPEST = 4  # the learning rate rises over a part of the steps, 1/4 at most


class Pace:
    """Measures steps, validations and checkpoints of one call of `train`."""

    def __init__(
        self, began: float, held_out_tokens: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Args: began: when the call began, by `clock`; held_out_tokens: of one validation."""
        self._began, self._tokens, self._clock = began, held_out_tokens, clock
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._steps = 0
        self._measured = 0.0
        self._validation: float | None = None
        self._save = self._writing = 0.0

    def step(self, seconds: float, passes: int = 1) -> None:
        """Notes a step of so many passes."""
        self._steps += 1
        if self._steps > SLOW:
            self._recent.append(seconds / passes)
            self._measured += seconds

    def validation(self, seconds: float) -> None:
        """Notes a validation."""
        self._validation = seconds

    def save(self, seconds: float) -> None:
        """Notes a checkpoint: how long training stood still until it could go on."""
        self._save = seconds

    def written(self, seconds: float) -> None:
        """Notes that a checkpoint was complete so long after training went on; the end of a run waits for its last."""
        self._writing = seconds

    def left(self, step: int, c: TrainConfig) -> float | None:
        """Seconds that are left after a step, as the last ones went; None before any counts."""
        return self._needed(step, c.steps, c) if self._recent else None

    def ready(self, c: TrainConfig) -> bool:
        """Whether enough steps were measured to plan a run of `c.minutes`."""
        enough = min(PART * 60 * (c.minutes or 0.0), LONG)
        return len(self._recent) >= MEASURED and self._measured >= enough

    def plan(self, step: int, c: TrainConfig) -> TrainConfig:
        """Fits steps and schedule into what is left of the minutes: at most `c.steps`, and at least one more step."""
        left = (1 - SPARE) * (60 * (c.minutes or 0.0) - (self._clock() - self._began))
        fewest, most = step + 1, c.steps
        while fewest < most:  # the most steps that take no longer
            middle = (fewest + most + 1) // 2
            fewest, most = (middle, most) if self._needed(step, middle, c) <= left else (fewest, middle - 1)
        return fitted(c, fewest, step)

    def _needed(self, step: int, steps: int, c: TrainConfig) -> float:
        """Seconds from after `step` to the end of a run of so many steps."""
        one = statistics.median(self._recent)  # pass
        validation = self._validation
        if validation is None:
            validation = FORWARD * one * self._tokens / (c.batch_size * c.seq_len)
        validations = 1 + (((steps - 1) // c.eval_every - step // c.eval_every) if c.eval_every else 0)
        saves = validations + (steps - 1) // c.checkpoint_every - step // c.checkpoint_every
        passes = c.passes_before(steps) - c.passes_before(step)
        return passes * one + validations * validation + saves * self._save + self._writing


def fitted(c: TrainConfig, steps: int, done: int) -> TrainConfig:
    """A configuration with fewer steps, of which `done` are made: the learning rate's rise shrinks with them."""
    return replace(c, steps=steps, warmup_steps=min(c.warmup_steps, max(done, steps // STEEPEST)))
