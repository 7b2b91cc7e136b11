"""Scoring of token sequences by a model: many short ones as a batch, or one of any length with a carried state."""

# ruff: noqa: ANN401 (the state of a mixer is a type of its own)

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from retnet.model import LanguageModel

Tokens = NDArray[np.int64]
Losses = NDArray[np.float64]

BATCH_TOKENS = 8192  # read at once
LOGITS = 1 << 25  # numbers of them at once


class CarryError(Exception):
    """A model cannot go on from what it has read; the message says why."""


class Reader(Protocol):
    """A model that gives losses in nats: of the successors in sequences of T + 1 tokens, T losses each.

    Attributes:
        batch_tokens: the longest sequence that `score` should be given, and about how many tokens in all.
        piece: the most tokens that `carry` should be given at once.
        limit: the longest context the model can hold; None for any.
    """

    batch_tokens: int
    piece: int
    limit: int | None

    def score(self, sequences: Sequence[Tokens]) -> list[Losses]:
        """Each from its beginning, independently of the others."""

    def carry(self, sequence: Tokens, state: Any) -> tuple[Losses, Any]:
        """One sequence from a state (None: its beginning), and the state after all but its last token.

        Raises:
            CarryError: there is no such state.
        """


class RecurrentReader:
    """A `LanguageModel` with any mixer: short sequences are packed in one row, a long one is carried by its state."""

    limit: int | None = None  # positions are unbounded in every mixer

    def __init__(self, model: LanguageModel, batch_tokens: int | None = None) -> None:
        vocab_size = model.config.vocab_size
        assert vocab_size is not None  # no model is built without
        self.batch_tokens = batch_tokens or BATCH_TOKENS
        self._rows = max(LOGITS // vocab_size, 1)
        self.piece = max(min(self.batch_tokens, self._rows), 1)
        self._model = model
        self._device = next(model.parameters()).device

    @torch.inference_mode()
    def score(self, sequences: Sequence[Tokens]) -> list[Losses]:
        """See `Reader`."""
        lengths = [len(sequence) - 1 for sequence in sequences]
        inputs = self._tensor(np.concatenate([sequence[:-1] for sequence in sequences]))
        targets = self._tensor(np.concatenate([sequence[1:] for sequence in sequences]))
        bounds = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=self._device)
        features = self._model.features(inputs[None], bounds)[0]
        parts = zip(features.split(self._rows), targets.split(self._rows), strict=True)
        losses = torch.cat([_losses(self._model.head(x), y) for x, y in parts])
        return np.split(losses.double().cpu().numpy(), np.cumsum(lengths)[:-1])

    @torch.inference_mode()
    def carry(self, sequence: Tokens, state: Any) -> tuple[Losses, Any]:
        """See `Reader`."""
        if state is None:
            state = self._model.init_state(1)
        logits, state = self._model.prefill(self._tensor(sequence[:-1])[None], state)
        return _losses(logits[0], self._tensor(sequence[1:])).double().cpu().numpy(), state

    def _tensor(self, tokens: Tokens) -> Tensor:
        return torch.from_numpy(tokens).to(self._device)


class CachedReader:
    """A causal model of Hugging Face's: short sequences are padded on the right, a long one is carried by its cache.

    Args:
        model: takes input_ids, attention_mask, past_key_values and use_cache.
        vocab_size: of its logits.
        limit: positions it can hold, or None.
        batch_tokens: tokens read at once, padding included; default: by the size of the logits.
    """

    def __init__(
        self, model: nn.Module, vocab_size: int, limit: int | None, batch_tokens: int | None = None
    ) -> None:
        self.limit = limit
        self.batch_tokens = batch_tokens or max(min(BATCH_TOKENS, LOGITS // vocab_size), 1)
        self.piece = self.batch_tokens
        self._model = model
        self._device = next(model.parameters()).device

    @torch.inference_mode()
    def score(self, sequences: Sequence[Tokens]) -> list[Losses]:
        """See `Reader`. Sequences of like length stand together, so little is padding."""
        losses: dict[int, Losses] = {}
        for rows in _rectangles([len(sequence) - 1 for sequence in sequences], self.batch_tokens):
            lengths = [len(sequences[row]) - 1 for row in rows]
            tokens = np.zeros((len(rows), max(lengths) + 1), np.int64)
            for padded, row in zip(tokens, rows, strict=True):
                padded[: len(sequences[row])] = sequences[row]
            content = torch.from_numpy(tokens).to(self._device)
            places = torch.arange(max(lengths), device=self._device)
            mask = places < torch.tensor(lengths, device=self._device)[:, None]
            logits = self._model(
                input_ids=content[:, :-1], attention_mask=mask.long(), use_cache=False
            ).logits
            found = _losses(logits.flatten(0, 1), content[:, 1:].flatten()).view(mask.shape)
            for row, length, loss in zip(rows, lengths, found.double().cpu().numpy(), strict=True):
                losses[row] = loss[:length]
        return [losses[row] for row in range(len(sequences))]

    @torch.inference_mode()
    def carry(self, sequence: Tokens, state: Any) -> tuple[Losses, Any]:
        """See `Reader`."""
        content = torch.from_numpy(sequence).to(self._device)
        out = self._model(input_ids=content[None, :-1], past_key_values=state, use_cache=True)
        if getattr(out, "past_key_values", None) is None:
            raise CarryError(
                f"{type(self._model).__name__} returns no cache to go on from after {self.batch_tokens:,} tokens; "
                "a larger --batch-tokens reads more at once"
            )
        return _losses(out.logits[0], content[1:]).double().cpu().numpy(), out.past_key_values


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target [N] under logits [N,vocab_size], in fp32 or better."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, reduction="none")


def _rectangles(lengths: Sequence[int], area: int) -> list[list[int]]:
    """Indices grouped, longest first, so that number × longest of a group stays within `area` (one always fits)."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= area:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
