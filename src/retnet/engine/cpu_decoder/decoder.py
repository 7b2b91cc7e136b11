"""CPU decoder of RetNets, Transformers and hybrids of them: decoding steps of any number of rows by one compiled call.

Prefill is done by the model's own parts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from retnet.engine.cpu_decoder.kernel import CallTable, StateTable, compile_model_step, memory_of
from retnet.engine.cpu_decoder.model_weights import read_model
from retnet.engine.cpu_decoder.table import ModelTable, NotCompiledError, WeightTable
from retnet.engine.decoder import ComposedDecoder
from retnet.engine.slots import SlotPool
from retnet.mixers.softmax import SoftmaxState
from retnet.model import LanguageModel
from retnet.ops.cpu.activations import compile_activations
from retnet.ops.cpu.jit import Compiler, hindrance, optional
from retnet.ops.cpu.openmp import launch, table, zeros_in_large_pages
from retnet.ops.cpu.skinny_gemm import MAX_ROWS, compile_skinny_gemm
from retnet.ops.cpu.state_update import compile_update
from retnet.ops.torch_private import plain


class CpuDecoder(ComposedDecoder):
    """Steps layers of retention and of softmax through one compiled call, which reads states where they lie in their slots.

    A row's logits and state are the same bits whatever other rows are there and wherever it sits. More than 64 rows go
    through in parts of 64.

    Args:
        model: in evaluation mode, in CPU memory.
        slots: how many sequences, at least one.

    Raises:
        NotCompiledError: a model that the kernel cannot run.
        ValueError: no slots.
    """

    rows_are_exact = True

    def __init__(self, model: LanguageModel, slots: int) -> None:
        weights = read_model(model)
        if (kernel := _kernel(weights.number)) is None:
            raise NotCompiledError(hindrance() or "its kernel could not be compiled")
        super().__init__(model, slots)
        zeros_in_large_pages(pool.state.kv for pool in self.pools if not pool.grows)
        self._steps = CompiledSteps(weights, self.pools, kernel)

    def _step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        if not plain() or torch.is_autocast_enabled("cpu"):
            return super()._step(tokens, slots)
        parts = zip(tokens.split(MAX_ROWS), slots.split(MAX_ROWS), strict=True)
        logits = [self._steps(*part) for part in parts]
        return logits[0] if len(logits) == 1 else torch.cat(logits)


class CompiledSteps:
    """Steps of a model from states in slots, which all have been checked.

    Weights are read where they were when this was made, and states where their pools have them; both may change in place.
    """

    def __init__(self, weights: WeightTable, pools: list[SlotPool], kernel: Any) -> None:  # noqa: ANN401
        self._weights, self._pools, self._kernel = weights, pools, kernel
        self._logits = weights.numbers[ModelTable.LOGITS]
        self._table = table([0] * (CallTable.LAYERS + len(StateTable) * len(pools)))
        self._table[CallTable.MODEL], self._table[CallTable.POOL] = weights.address, pools[0].slots
        for number, pool in enumerate(pools):
            at, (state, values) = CallTable.LAYERS + len(StateTable) * number, pool.addresses[:2]
            softmax = isinstance(pool.state, SoftmaxState)
            self._table[at + StateTable.STATE] = (state if softmax else pool.state.kv).data_ptr()
            self._table[at + StateTable.VALUES] = values.data_ptr()
            position = pool.state.length if softmax else pool.state.position
            self._table[at + StateTable.POSITION] = position.data_ptr()
        self._memory = torch.empty(0)

    def __call__(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """Tokens in the vocabulary and their slots, int64 [B], B at most `MAX_ROWS` → logits [B,vocabulary]."""
        B, threads = len(tokens), torch.get_num_threads()
        if (need := memory_of(B, self._weights.sizes, threads)) > len(self._memory):
            self._memory = torch.empty(need)
        for pool in self._pools:
            if pool.grows:
                pool.reserve(slots, [1] * B)
        tokens, slots, logits = tokens.contiguous(), slots.contiguous(), torch.empty(B, self._logits)
        entries = {
            CallTable.ROWS: B,
            CallTable.TOKENS: tokens.data_ptr(),
            CallTable.SLOTS: slots.data_ptr(),
            CallTable.LOGITS: logits.data_ptr(),
            CallTable.MEMORY: self._memory.data_ptr(),
        }
        for entry, number in entries.items():
            self._table[entry] = number
        launch(self._kernel, self._table, threads)
        return logits


_NUMBERS = {torch.float32: np.float32, torch.int8: np.int8}


@optional
def _kernel(made: Compiler, number: torch.dtype) -> Any:  # noqa: ANN401
    """For weights of this type. Compiled on first use, some 20 seconds, and kept on disk."""
    gemm = compile_skinny_gemm(made, _NUMBERS[number])
    return compile_model_step(made, gemm, compile_update(made), compile_activations(made))
