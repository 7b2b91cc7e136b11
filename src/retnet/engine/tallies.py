"""Which tokens each slot's text has had, for repetition, presence and frequency penalties."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retnet.engine.sampling import Sampling


class Tallies:
    """Two tables with a row a slot, made when the first request with a penalty comes.

    Args:
        slots: rows.
        vocab_size: V.
        bos_id: does not count in a prompt: that a text begins says nothing against its end.
        device: of the logits.
    """

    def __init__(self, slots: int, vocab_size: int, bos_id: int, device: torch.device) -> None:
        self._size, self._bos_id, self._device = (slots, vocab_size), bos_id, device
        self._seen: Tensor | None = None  # bool [slots,V]: in the prompt or generated
        self._counts: Tensor | None = None  # int32 [slots,V]: how often generated

    def start(self, slot: int, prompt: Sequence[int], sampling: Sampling) -> None:
        """A text with this prompt begins in a slot; nothing is done for one without penalties."""
        if not sampling.penalises:
            return
        if self._seen is None or self._counts is None:
            self._seen = torch.zeros(self._size, dtype=torch.bool, device=self._device)
            self._counts = torch.zeros(self._size, dtype=torch.int32, device=self._device)
        self._seen[slot] = False
        self._counts[slot] = 0
        self._seen[slot, list({*prompt} - {self._bos_id})] = True

    def add(self, slots: Tensor, tokens: Tensor) -> None:
        """Each of these slots' texts, int64 [B], has one more token."""
        if self._seen is not None and self._counts is not None:
            self._seen[slots, tokens] = True
            self._counts[slots, tokens] += 1

    def rows(self, slots: Tensor, which: Tensor | slice | None) -> tuple[Tensor | None, Tensor | None]:
        """What `SamplingBatch.sample` wants of the slots that are penalised: seen [P,V], counts [P,V]."""
        if which is None or self._seen is None or self._counts is None:
            return None, None
        rows = slots.to(self._device)[which]
        return self._seen[rows], self._counts[rows]
