"""Choice of the next token of every running stream: sampling parameters, penalties, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_not
from typing import NamedTuple

import torch
from torch import Tensor

from retnet.engine.decoder import Decoder
from retnet.engine.requests import TokenLogprobs
from retnet.engine.sampling import NOT_FINITE, Sampling, SamplingBatch
from retnet.engine.streams import Stream
from retnet.settings import UserError


class ChosenTokens(NamedTuple):
    """The next tokens of some streams.

    Attributes:
        tokens: int64 [B], where logits are.
        ids: the same as numbers.
        faults: by row why there is none, whose token is any.
    """

    tokens: Tensor
    ids: list[int]
    faults: dict[int, UserError]


class TokenChooser:
    """From logits to tokens, a row a running stream.

    Args:
        decoder: whose logits and slots these are.
        vocab_size: V, the ids that may be chosen.
        bos_id: does not count in a prompt for the repetition penalty: that a text begins says nothing against its end.
    """

    def __init__(self, decoder: Decoder, vocab_size: int, bos_id: int) -> None:
        self._vocab_size, self._device = vocab_size, decoder.device
        self._tallies = Tallies(decoder.slots, vocab_size, bos_id, decoder.device)
        self._no_draws = torch.empty(0, dtype=torch.float64)
        self._rows: tuple[tuple[Sampling, ...], SamplingBatch] | None = None  # those of the last step

    def start(self, slot: int, prompt: Sequence[int], sampling: Sampling) -> None:
        """A text with this prompt begins in a slot."""
        self._tallies.start(slot, prompt, sampling)

    def choose(self, logits: Tensor, streams: Sequence[Stream]) -> ChosenTokens:
        """The next token of each stream, from logits [B,…]."""
        if logits.shape[1] > self._vocab_size:
            logits = logits[:, : self._vocab_size]
        faults: dict[int, UserError] = {}
        allowed, batch = self._allowed(logits, streams, faults), self._batch(streams)
        draws = self._no_draws
        if batch.draws:
            draws = torch.tensor([stream.chance.random() for stream in streams], dtype=torch.float64)
        if batch.penalised is None:
            tokens = batch.sample(allowed, draws)
        else:
            slots = torch.tensor([stream.slot for stream in streams])
            seen, counts = self._tallies.rows(slots, batch.penalised)
            tokens = batch.sample(allowed, draws, seen, counts)
            self._tallies.add(slots, tokens)
        ids = tokens.tolist()
        if min(ids) < 0:
            faults = {row: UserError(NOT_FINITE) for row, token in enumerate(ids) if token < 0} | faults
        return ChosenTokens(tokens, ids, faults)

    def logprobs(self, logits: Tensor, token: int, count: int) -> TokenLogprobs:
        """Log-probabilities of the chosen token and of the `count` likeliest, from logits [V]."""
        logprobs = logits[: self._vocab_size].double().log_softmax(-1)
        best = logprobs.topk(min(count, len(logprobs)))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return TokenLogprobs(token, float(logprobs[token]), top)

    def _batch(self, streams: Sequence[Stream]) -> SamplingBatch:
        """The streams' parameters, made anew when some came or went."""
        rows = tuple(stream.asked.sampling for stream in streams)
        if self._rows is None or len(rows) != len(self._rows[0]) or any(map(is_not, rows, self._rows[0])):
            self._rows = rows, SamplingBatch(rows, self._vocab_size, self._device)
        return self._rows[1]

    def _allowed(self, logits: Tensor, streams: Sequence[Stream], faults: dict[int, UserError]) -> Tensor:
        """The logits, −∞ where a token would end a text before `min_tokens` or break its grammar."""
        bound = [row for row, stream in enumerate(streams) if stream.must_go_on or stream.constraint]
        if not bound:
            return logits
        logits = logits.clone()
        for row in bound:
            if streams[row].must_go_on:
                logits[row, [token for token in streams[row].ends if token < self._vocab_size]] = -torch.inf
            if (constraint := streams[row].constraint) is not None:
                try:
                    forbidden = constraint.forbidden(self._vocab_size)
                    logits[row].masked_fill_(forbidden.to(logits.device), -torch.inf)
                except UserError as error:
                    faults[row] = error
        return logits


class Tallies:
    """Which tokens each slot's text has had: two tables with a row a slot, made when the first request with a penalty comes.

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
