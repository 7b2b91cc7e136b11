"""Mixers on vLLM's pages: states of a constant size, a page a sequence; keys and values of tokens, in blocks of pages."""

# ruff: noqa: ANN401 (the state of a mixer is a type of its own)

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from retnet.mixers import MIXERS, Mixer, MultiScaleRetention, RetentionState, SoftmaxAttention
from retnet.model.config import ModelConfig
from retnet.nn import Positions
from retnet.settings import UserError
from retnet_vllm import BACKEND
from retnet_vllm.backend import StepBatch

POSITION = "position"  # a part of states that vLLM knows of every sequence, and no page holds


@dataclass(frozen=True)
class Step:
    """What the layers of a model share in one step of vLLM.

    Attributes:
        batches: of each layer by its name; alike where states have one shape.
        position: of each token in its sequence, int64 [T].
        shared: positions as mixers make them, by kind of mixer and form, made by the first layer that needs them.
    """

    batches: Mapping[str, StepBatch]
    position: Tensor
    shared: dict[tuple[int, str], Positions | None] = field(default_factory=dict)


class StatePages(MambaBase):
    """The states of one layer, flattened, in fp32, and the layer's mixer run on them.

    Args:
        mixer: its states have a constant size.
        kind: layers of one kind share positions.
        name: of the layer, by which vLLM finds it.
        config: where vLLM looks for it.
    """

    def __init__(self, mixer: Mixer, kind: int, name: str, config: VllmConfig) -> None:
        super().__init__()
        self._mixer, self._kind, self.name = mixer, kind, name
        self._initial = mixer.init_state(1)
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

    def mix(self, x: Tensor, step: Step) -> Tensor:
        """The mixer's output for the tokens of a step, [T,D] → [T,D]; moves the states in their pages on."""
        batch, parts = step.batches[self.name], []
        if len(batch.begun):
            for part, first in zip(self._parts(), held(self._initial).values(), strict=True):
                part[batch.begun] = first
        if batch.rows:
            parts.append(self._decode(x[: batch.rows], batch, step))
        if batch.tokens > batch.rows:
            parts.append(self._read(x[None, batch.rows : batch.tokens], batch, step)[0])
        if len(x) > batch.tokens:
            parts.append(torch.zeros_like(x[batch.tokens :]))
        return torch.cat(parts)

    def _decode(self, x: Tensor, batch: StepBatch, step: Step) -> Tensor:
        """One token of each sequence: x [B,D] → [B,D]."""
        pages, position = batch.pages[: batch.rows], batch.position[: batch.rows].clone()
        if isinstance(self._mixer, MultiScaleRetention) and self.kv_cache[0].is_contiguous():
            state = RetentionState(next(self._parts()), position)
            handed = self._positions(x, None, state, step)
            return self._mixer.step(x, state, slots=pages, **handed)[0]  # where the states lie
        state = self._take(pages, position)
        y, after = self._mixer.step(x, state, **self._positions(x, None, state, step))
        self._put(pages, after)
        return y

    def _read(self, x: Tensor, batch: StepBatch, step: Step) -> Tensor:
        """Pieces of prompts as packed documents: x [1,T,D] → [1,T,D]."""
        pages, bounds = batch.pages[batch.rows :], batch.cu_seqlens
        state = self._take(pages, batch.position[batch.rows :])
        handed = self._positions(x, bounds, state, step)
        y, after = self._mixer.prefill(x, state, cu_seqlens=bounds, **handed)
        self._put(pages, after)
        return y

    def _positions(self, x: Tensor, bounds: Tensor | None, state: Any, step: Step) -> dict[str, Any]:
        """The keyword for a mixer that takes positions."""
        key = (self._kind, "rows" if bounds is None else "documents")
        if key not in step.shared:
            step.shared[key] = self._mixer.positions(x, bounds, state)
        found = step.shared[key]
        return {} if found is None else {"positions": found}

    def _parts(self) -> Iterator[Tensor]:
        """Views of all pages, [pages,...] for each part of a state that they hold."""
        (pages,) = self.kv_cache
        begin = 0
        for part in held(self._initial).values():
            numbers = prod(part.shape[1:])
            yield pages[:, begin : begin + numbers].unflatten(1, part.shape[1:])
            begin += numbers

    def _take(self, pages: Tensor, position: Tensor) -> Any:
        """Copies of the states of some pages."""
        parts = {name: part[pages] for name, part in zip(held(self._initial), self._parts(), strict=True)}
        names = self._initial._fields
        return type(self._initial)(*(position if name == POSITION else parts[name] for name in names))

    def _put(self, pages: Tensor, state: Any) -> None:
        for part, after in zip(self._parts(), held(state).values(), strict=True):
            part[pages] = after


class TokenPages:
    """Keys and values of one layer of softmax, which vLLM's own attention writes and reads.

    Args:
        mixer: of the layer.
        name: of the layer, by which vLLM finds it.
        config: where vLLM looks for it.

    Raises:
        UserError: vLLM's attention has no kernel for heads of such a width.
    """

    def __init__(self, mixer: SoftmaxAttention, name: str, config: VllmConfig) -> None:
        self._mixer, self.name = mixer, name
        heads, width = mixer.num_heads, mixer.key_dim
        groups, cache = heads // mixer.group, config.cache_config
        self.attention = Attention(heads, width, width**-0.5, groups, cache_config=cache, prefix=name)
        backend = self.attention.get_attn_backend()
        if not backend.supports_head_size(width):  # on a CPU vLLM itself does not ask
            raise UserError(
                f"{name} is 'softmax' with heads of width {width}, for which vLLM's attention here ({backend.get_name()}) "
                f"has no kernel; allowed: {', '.join(map(str, backend.get_supported_head_sizes()))}"
            )

    def mix(self, x: Tensor, step: Step) -> Tensor:
        """The mixer's output for the tokens of a step, [T,D] → [T,D]."""
        q, k, v = self._mixer.project(x[None], Positions(step.position[None], None, None))
        o = self.attention(*(y[0].flatten(1) for y in (q, k, v)))
        return self._mixer.out_proj(o)


def pages_of(mixer: Mixer, kind: int, name: str, config: VllmConfig) -> StatePages | TokenPages:
    """What keeps a layer's states, and runs its mixer on them."""
    if isinstance(mixer, SoftmaxAttention):
        return TokenPages(mixer, name, config)
    return StatePages(mixer, kind, name, config)


def held(state: Any) -> dict[str, Tensor]:
    """The parts of a state that a page holds."""
    return {name: part for name, part in zip(state._fields, state, strict=True) if name != POSITION}


def page_numbers(state: Any) -> int:
    """fp32 numbers of a page."""
    return sum(prod(part.shape[1:]) for part in held(state).values())


def largest_page(config: ModelConfig) -> int:
    """fp32 numbers of the largest page among the layers of a model, of which nothing need be made; 0 where none has any."""
    with torch.device("meta"):
        mixers = [MIXERS[kind.name](config.d_model, kind) for kind in set(config.mixers_by_layer)]
        states = [mixer.init_state(1, device="meta") for mixer in mixers if not mixer.caches]
    return max(map(page_numbers, states), default=0)
