"""Decoding at any length of context: models and mixers with the states, or filled KV caches, of so many tokens."""

# ruff: noqa: ANN401 (the state of a mixer is a type of its own)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from retnet.engine import decode_from
from retnet.measure.clock import median_seconds, wait
from retnet.mixers import Mixer
from retnet.mixers.states import select_rows
from retnet.model import LanguageModel

PIECE = 2048  # tokens of one call of `prefill`
WARMUP = 2  # steps before the timed ones

Read = Callable[[int], None]  # told how many tokens were read


class Contexts:
    """States of a model or mixer after any of some lengths, which can be decoded from.

    A state of constant size is real: random tokens were read, for how fast a step is may depend on what it holds. A cache
    that grows is as large as if so many tokens had been read, and holds random numbers: its time depends on its size
    alone, and to read them would cost hours. Caches of all lengths lie in the same memory, one at a time.
    """

    def __init__(self, subject: LanguageModel | Mixer, d_model: int, room: int = 512) -> None:
        """`room` is how many steps a cache has room for."""
        self.subject, self.d_model, self.room = subject, d_model, room
        self.grows = any(_empty(part) for part in _tensors(subject.init_state(1)))
        self._buffers: dict[int, Tensor] = {}
        self._after: dict[int, Any] = {}
        self._seen, self._last = 0, subject.init_state(1)

    def read(self, lengths: Sequence[int], told: Read = lambda tokens: None) -> None:
        """Reads what must be read for these lengths, none below those of earlier calls, whose states are given up."""
        self._after = {}
        for length in [] if self.grows else sorted(set(lengths)):
            with torch.inference_mode():
                while self._seen < length:
                    piece = self._tokens(1, min(PIECE, length - self._seen))
                    _, self._last = self.subject.prefill(piece, self._last)
                    self._seen += piece.shape[1]
                    told(self._seen)
            self._after[length] = select_rows(self._last, [0])

    def state(self, length: int, batch: int) -> Any:
        """A state after `length` tokens, of `batch` equal rows; the next call may overwrite it."""
        if not self.grows:
            return select_rows(self._after[length], [0] * batch)
        empty = self.subject.init_state(batch)
        number = iter(range(1000))
        return _mapped(empty, lambda part: self._filled(next(number), part, length))

    def state_bytes(self, length: int, batch: int) -> int:
        """Bytes of that state, its tensors measured; room to grow into is not counted."""
        parts, before = (_tensors(x) for x in (self.state(length, batch), self.subject.init_state(batch)))
        return sum(
            part[:, :length].nbytes if _empty(first) else part.nbytes
            for part, first in zip(parts, before, strict=True)
        )

    def token(self, batch: int) -> Tensor:
        """What one step reads: int64 [B] for a model, [B,D] for a mixer."""
        return self._tokens(batch, 1)[:, 0]

    def seconds(self, length: int, batch: int, budget: float) -> float:
        """Median seconds of a step from there, of as many as the budget in seconds holds, at least 3."""
        state, token = self.state(length, batch), self.token(batch)
        subject, decoder = self.subject, None
        if isinstance(subject, LanguageModel) and not self.grows:
            decoder, slots = decode_from(subject, state)

        def step() -> None:
            nonlocal state
            # as `retnet generate` steps; caches, which it would copy, lie where they are
            if decoder is not None:
                decoder.step(token, slots)
            else:
                _, state = subject.step(token, state)
            wait(token.device)

        with torch.inference_mode():
            return median_seconds(step, self.room - WARMUP, warmup=WARMUP, budget=budget)

    def _tokens(self, batch: int, length: int) -> Tensor:
        weight = next(self.subject.parameters())
        if isinstance(self.subject, LanguageModel):
            return torch.randint(self.subject.config.vocab_size or 1, (batch, length), device=weight.device)
        return torch.randn(batch, length, self.d_model, device=weight.device, dtype=weight.dtype)

    def _filled(self, number: int, part: Tensor, length: int) -> Tensor:
        if not _empty(part):
            return torch.full_like(part, length) if part.dtype == torch.int64 else part
        shape = (part.shape[0], length + self.room, *part.shape[2:])
        count = torch.Size(shape).numel()
        buffer = self._buffers.get(number)
        if buffer is None or buffer.numel() < count:
            buffer = torch.empty(count, dtype=part.dtype, device=part.device).uniform_(-1, 1)
            self._buffers[number] = buffer
        return buffer[:count].view(shape)


def _empty(part: Tensor) -> bool:
    """Whether it has one row a token, of which there are none yet."""
    return part.dim() > 1 and part.shape[1] == 0


def _tensors(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [x for part in state for x in _tensors(part)]


def _mapped(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(state, Tensor):
        return change(state)
    parts = [_mapped(part, change) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
