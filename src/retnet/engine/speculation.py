"""Speculative decoding by prompt lookup: n-grams of the text so far guess what comes, one chunkwise pass verifies it.

A text that is copied in parts (code that is edited, a document that is quoted or corrected, JSON) is guessed well by itself:
where its last tokens stood before, what followed then is the draft (Saxena 2023, "Prompt lookup decoding"; Leviathan et al.
2023 for the verification). A pass over n tokens reads the weights once, a step for each of them n times. A state has one
size, so going back to the last accepted token is putting a copy back and reading those again.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from retnet.engine.decoder import Decoder
from retnet.engine.requests import Event
from retnet.engine.streams import Stream

GRAM = 3  # tokens that must have stood before
LEAST = 4  # tokens of a draft; fewer are not worth a pass
MARGIN = 1e-3  # of the likeliest token's logit before the next one's, relative to its size, that rounding cannot turn
ROUNDING = 16  # and at least so many units of the logits' type
PATIENCE = 64  # tokens that are decoded as ever, at most, after drafts that did not pay ...
LOSS = 0.02  # ... or more, so that drafts which never pay take no larger part of the time
_PLACES = 1 << 16  # that are remembered


class PromptLookup:
    """Drafts for one stream, from where its last tokens stood before; memory and time do not grow with the text.

    Args:
        most: tokens of a draft.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._after = array("q", [0]) * _PLACES  # hash of a gram → where its last occurrence ended
        self._seen = GRAM  # tokens of the text up to which grams are in there
        self._wait, self._pause = 0, 1

    def draft(self, stream: Stream) -> list[int]:
        """What may follow the stream's last token; nothing where its last tokens are new, or drafts were wrong lately."""
        if self._wait:
            self._wait -= 1
            return []
        length = stream.length
        fresh = stream.ids(self._seen - GRAM, length)
        for end in range(self._seen, length):  # the last gram is what is looked for
            place = end - self._seen
            self._after[hash(fresh[place : place + GRAM]) % _PLACES] = end
        self._seen = max(length, GRAM)
        gram = fresh[-GRAM:]
        end = self._after[hash(gram) % _PLACES]
        most = min(self._most, stream.asked.max_tokens - len(stream.tokens) - 1)
        if not end or len(gram) < GRAM or stream.ids(end - GRAM, end) != gram:
            return []
        found = stream.ids(end, min(end + most, length))
        draft = [found[i % len(found)] for i in range(most)]  # what repeats goes on repeating
        return draft if most >= LEAST else []

    def learn(self, decided: int, cost: float) -> None:
        """So many tokens came of the last draft, whose pass took as long as `cost` steps."""
        most = max(PATIENCE, int(cost / LOSS))
        self._pause = 1 if decided > cost else min(2 * self._pause, most)
        self._wait = self._pause - 1


class Speculation:
    """Decides several tokens of one greedy stream at once, where its text repeats itself.

    The tokens are those that steps would decide: each is the likeliest by at least `MARGIN`, which is more than what the
    rounding of a chunkwise pass and that of steps differ by, and where it is not, a step decides.

    Args:
        decoder: with the streams' states.
        vocab_size: ids that may be chosen.
        most: tokens of a draft.
    """

    def __init__(self, decoder: Decoder, vocab_size: int, most: int) -> None:
        self._decoder, self._vocab_size, self._most = decoder, vocab_size, most
        self._stream: Stream | None = None
        self._lookup = PromptLookup(most)
        self._step, self._since = 0.0, 0.0  # seconds of a step; when the last one began, 0 if it was none

    def advance(self, stream: Stream) -> tuple[list[Event], Tensor]:
        """Pushes the next tokens to a stream, whose slot then lacks the last of them, int64 [1].

        Returns:
            An event for each, up to the text's end, and that last one; no events where a step has to decide.
        """
        events: list[Event] = []
        decided = self._decide(stream)
        for token in decided:
            events.append(stream.push(token))
            if stream.finish is not None:
                break
        return events, torch.tensor(decided[-1:], device=self._decoder.device)

    def _decide(self, stream: Stream) -> list[int]:
        if self._most < LEAST or not stream.is_plain_greedy:
            return []
        if stream is not self._stream:
            self._stream, self._lookup = stream, PromptLookup(self._most)
        now, since, self._since = time.perf_counter(), self._since, 0.0
        if since:  # the least lately: whatever else took time between was no step
            self._step = min(now - since, 1.05 * self._step or math.inf)
        if not (draft := self._lookup.draft(stream)):
            self._since = time.perf_counter()
            return []
        decided = self._verify(stream.slot, [stream.tokens[-1], *draft])
        cost = (time.perf_counter() - now) / self._step if self._step else LEAST
        self._lookup.learn(len(decided), cost)
        return decided

    def _verify(self, slot: int, tokens: Sequence[int]) -> list[int]:
        """Of a token and a draft after it: what the model says instead, up to the first that differs."""
        where, text = torch.tensor([slot]), torch.tensor(tokens, device=self._decoder.device)
        before = self._decoder.read(where)
        logits = self._decoder.prefill_logits(text, where)[:, : self._vocab_size]
        margin = max(MARGIN, ROUNDING * torch.finfo(logits.dtype).eps)
        values, ids = logits.float().topk(2)
        sure = values[:, 0] - values[:, 1] > margin * (1 + values[:, 0].abs())
        decided: list[int] = []
        for row, (token, certain) in enumerate(zip(ids[:, 0].tolist(), sure.tolist(), strict=True)):
            if not certain:
                break
            decided.append(token)
            if tokens[row + 1 : row + 2] != [token]:
                break
        if len(decided) < len(tokens):
            self._decoder.write(where, before)
            if decided:
                self._decoder.prefill(text[: len(decided)], torch.tensor([0, len(decided)]), where)
        return decided
