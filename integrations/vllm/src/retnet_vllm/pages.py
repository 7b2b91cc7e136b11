"""States in vLLM's pages: one page a sequence, which holds what a mixer remembers, flattened, in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from retnet.mixers import MIXERS, Mixer, MultiScaleRetention, RetentionState
from retnet.model.config import ModelConfig
from retnet.nn import Positions
from retnet_vllm import BACKEND
from retnet_vllm.backend import StepBatch

POSITION = "position"  # a part of states that vLLM knows of every sequence, and no page holds


class StatePages(MambaBase):
    """The states of one layer, and the mixer run on them.

    Args:
        mixer: of the layer; its states have a constant size.
        name: of the layer, by which vLLM finds it.
        config: where vLLM looks for it.
    """

    def __init__(self, mixer: Mixer, name: str, config: VllmConfig) -> None:
        super().__init__()
        self._mixer, self.name = mixer, name
        self._initial = mixer.init_state(1)
        self.kv_cache = (torch.zeros(0, page_numbers(self._initial)),)  # until vLLM has given pages
        config.compilation_config.static_forward_context[name] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """One state a page, flat."""
        return ((page_numbers(self._initial),),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """fp32 whatever the weights are: what accumulates is not rounded."""
        return (torch.float32,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """That of `retnet_vllm.register`."""
        return MambaAttentionBackendEnum[BACKEND]

    def mix(self, x: Tensor, batch: StepBatch, shared: dict[Any, Positions | None], kind: int) -> Tensor:
        """The mixer's output for the tokens of a step, [T,D] → [T,D]; moves the states in their pages on.

        Args:
            x: all tokens of the step, sequence by sequence.
            batch: which they are.
            shared: positions of layers of one kind in this step, made by the first of them.
            kind: of this layer.
        """
        self._reset(batch.begun)
        parts = []
        if batch.rows:
            parts.append(self._decode(x[: batch.rows], batch, shared, kind))
        if batch.tokens > batch.rows:
            parts.append(self._read(x[None, batch.rows : batch.tokens], batch, shared, kind)[0])
        if len(x) > batch.tokens:
            parts.append(torch.zeros_like(x[batch.tokens :]))
        return torch.cat(parts)

    def _decode(self, x: Tensor, batch: StepBatch, shared: dict[Any, Positions | None], kind: int) -> Tensor:
        pages, position = batch.pages[: batch.rows], batch.position[: batch.rows].clone()
        if isinstance(self._mixer, MultiScaleRetention) and self.kv_cache[0].is_contiguous():
            state = RetentionState(next(self._parts()), position)
            positions = self._positions(x, None, state, shared, (kind, "rows"))
            return self._mixer.step(x, state, positions=positions, slots=pages)[0]  # where they lie
        state = self._take(pages, position)
        positions = self._positions(x, None, state, shared, (kind, "rows"))
        y, after = self._mixer.step(x, state, **({} if positions is None else {"positions": positions}))
        self._put(pages, after)
        return y

    def _read(self, x: Tensor, batch: StepBatch, shared: dict[Any, Positions | None], kind: int) -> Tensor:
        pages, bounds = batch.pages[batch.rows :], batch.cu_seqlens
        state = self._take(pages, batch.position[batch.rows :])
        positions = self._positions(x, bounds, state, shared, (kind, "documents"))
        handed = {} if positions is None else {"positions": positions}
        y, after = self._mixer.prefill(x, state, cu_seqlens=bounds, **handed)
        self._put(pages, after)
        return y

    def _positions(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None,
        state: Any,  # noqa: ANN401
        shared: dict[Any, Positions | None],
        key: tuple[int, str],
    ) -> Positions | None:
        if key not in shared:
            shared[key] = self._mixer.positions(x, cu_seqlens, state)
        return shared[key]

    def _parts(self) -> Iterator[Tensor]:
        """Views of all pages, [pages,...] for each part of a state that they hold."""
        (pages,) = self.kv_cache
        begin = 0
        for part in held(self._initial).values():
            numbers = prod(part.shape[1:])
            yield pages[:, begin : begin + numbers].view(-1, *part.shape[1:])
            begin += numbers

    def _reset(self, pages: Tensor) -> None:
        if len(pages):
            for part, first in zip(self._parts(), held(self._initial).values(), strict=True):
                part[pages] = first

    def _take(self, pages: Tensor, position: Tensor) -> Any:  # noqa: ANN401
        """Copies of the states of some pages."""
        parts = {name: part[pages] for name, part in zip(held(self._initial), self._parts(), strict=True)}
        return type(self._initial)(
            *(position if name == POSITION else parts[name] for name in self._initial._fields)
        )

    def _put(self, pages: Tensor, state: Any) -> None:  # noqa: ANN401
        for part, after in zip(self._parts(), held(state).values(), strict=True):
            part[pages] = after


def held(state: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """The parts of a state that a page holds."""
    return {name: part for name, part in zip(state._fields, state, strict=True) if name != POSITION}


def page_numbers(state: Any) -> int:  # noqa: ANN401
    """fp32 numbers of a page."""
    return sum(prod(part.shape[1:]) for part in held(state).values())


def largest_page(config: ModelConfig) -> int:
    """fp32 numbers of the largest page among the layers of a model, of which nothing need be made."""
    with torch.device("meta"):
        mixers = [MIXERS[kind.name](config.d_model, kind) for kind in set(config.mixers_by_layer)]
    return max(page_numbers(mixer.init_state(1, device="meta")) for mixer in mixers)
