"""Many steps of one model from one state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from retnet.ops import Steps

ModelState = tuple[Any, ...]  # one mixer state a layer


class Stepper:
    """A model and a state, which every step moves on by one token a row; what `retnet.model.LanguageModel.stepper` gives.

    `LanguageModel.step` asks at every token whether the model is still the one it was, which on a CPU takes as long as
    reading a tenth of the weights of a small model. Here that is asked when the first token comes. Later ones see weights
    that have changed in place, but not other modules, hooks or memory (`.to`, loading by assignment, `train()`): make
    another stepper after those.

    Attributes:
        state: after the last step; the next one may change it in place.
    """

    def __init__(
        self,
        state: Sequence[Any],
        bind: Callable[[Sequence[Any]], Steps | None],
        composed: Callable[[Tensor, Sequence[Any]], tuple[Tensor, ModelState]],
    ) -> None:
        self.state: ModelState = tuple(state)
        self._bind, self._composed = bind, composed
        self._steps: Steps | None = None

    def step(self, tokens: Tensor) -> Tensor:
        """One token a row, int64 [B] → logits [B,vocab_size]."""
        steps = self._steps or self._bind(self.state)
        if steps is not None and (logits := steps(tokens)) is not None:
            self._steps = steps
            return logits
        self._steps = None
        logits, self.state = self._composed(tokens, self.state)
        return logits
