"""Steps of one model from one state through the compiled decoder, or composed of the model's parts where it cannot run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retnet.engine.cpu_decoder.kernel import compile_walk
from retnet.engine.cpu_decoder.reading import read_model
from retnet.engine.cpu_decoder.table import Plan
from retnet.model import LanguageModel, ModelState
from retnet.ops.cpu.decode import MAX_ROWS
from retnet.ops.cpu.gemv import compile_matvec
from retnet.ops.cpu.jit import compiler
from retnet.ops.cpu.openmp import launch, plain, table
from retnet.ops.cpu.state_update import compile_advance


class Stepper:
    """A model and a state, which every step moves on by one token a row.

    The model is read when the first token comes. Later steps see weights that have changed in place, but not other modules,
    hooks or memory (`.to`, loading by assignment, `train()`): make another stepper after those.

    Attributes:
        state: after the last step; the next one may change it in place.
    """

    def __init__(self, model: LanguageModel, state: Sequence[Any]) -> None:
        self.state: ModelState = tuple(state)
        self._model = model
        self._steps: Steps | None = None

    def step(self, tokens: Tensor) -> Tensor:
        """One token a row, int64 [B] → logits [B,vocab_size]."""
        steps = self._steps or bind(self._model, self.state)
        if steps is not None and (logits := steps(tokens)) is not None:
            self._steps = steps
            return logits
        self._steps = None
        logits, self.state = self._model.step(tokens, self.state)
        return logits


class Steps:
    """Steps through a model from states, which all have been checked: what is left to do at a step is the token itself.

    Weights and states are read where they were when this was made. They may change in place; whoever gives them other
    memory, or other layers to the model, makes new steps.
    """

    def __init__(
        self,
        plan: Plan,
        states: Sequence[tuple[Tensor, Tensor]],
        batch: int,
        kernel: Any,  # noqa: ANN401
    ) -> None:
        D, H, K, V, N = plan.sizes
        self._plan, self._states, self._batch, self._kernel = plan, states, batch, kernel
        self._memory = torch.empty(batch * (2 * H * (K + V) + H * V + D + 2 * N))
        pointers = (x.data_ptr() for state in states for x in state)
        self._table = table((plan.address, batch, 0, 0, self._memory.data_ptr(), *pointers))

    def __call__(self, tokens: Tensor) -> Tensor | None:
        """One step of all rows, their states updated in place.

        Args:
            tokens: int64 [B].

        Returns:
            Logits [B,vocabulary]; or None, and nothing done, where the kernel cannot run: another type, device or size, a
            gradient, a token that is not in the vocabulary.
        """
        plan, B = self._plan, self._batch
        if not (
            tokens.dtype is torch.int64
            and tokens.is_cpu
            and tokens.shape == (B,)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and plain()
            and all(0 <= token < plan.tokens for token in tokens.tolist())
        ):
            return None
        tokens, out = tokens.contiguous(), torch.empty(B, plan.width)
        self._table[2], self._table[3] = tokens.data_ptr(), out.data_ptr()
        launch(self._kernel, self._table)
        return out


def bind(model: LanguageModel, state: Sequence[Any]) -> Steps | None:
    """Steps of a model as it is now, from a state of RetNet layers; None where the kernel cannot run."""
    if torch.is_grad_enabled() or not plain() or (plan := read_model(model)) is None:
        return None
    _, H, K, V, _ = plan.sizes
    if len(state) != plan.blocks or not state[0].position.dim():
        return None
    states = [(s.kv, s.position) for s in state]
    B = len(states[0][1])
    for kv, position in states:
        if not (
            kv.dtype is torch.float32
            and position.dtype is torch.int64
            and kv.shape == (B, H, K, V)
            and position.shape == (B,)
            and kv.is_cpu
            and position.is_cpu
            and kv.is_contiguous()
            and position.is_contiguous()
        ):
            return None
    if B > MAX_ROWS or (kernel := _kernel(plan.number)) is None:
        return None
    return Steps(plan, states, B, kernel)


_NUMBERS = {torch.float32: np.float32, torch.int8: np.int8}


@cache
def _kernel(number: torch.dtype) -> Any:  # noqa: ANN401
    """For weights of this type. Compiled on first use, a few seconds, and kept on disk."""
    if (made := compiler()) is None:
        return None
    return compile_walk(made, compile_matvec(made, _NUMBERS[number]), compile_advance(made))
