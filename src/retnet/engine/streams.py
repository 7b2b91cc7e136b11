"""One continuation in the making: tokens → text (detokenisation), until a stop string, a stop token or the limit."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from retnet.engine.grammar import Constraint
from retnet.engine.requests import Completion, Event, Finish, Request, TokenLogprobs
from retnet.engine.stops import StopScanner

if TYPE_CHECKING:
    from retnet.data import Tokenizer

_TAIL = 16  # tokens of the prompt that tell a decoder that what follows is no beginning


class Stream:
    """One sample of one request.

    Args:
        request: its id.
        asked: what it is.
        sample: which sample, from 0.
        tokenizer: makes text of ids.
        constraint: of the request's grammar, its own.
        after: the ids of the prompt.

    Attributes:
        finish: why it ended; None while it is under way.
        error: why it failed.
        tokens: the ids generated so far.
        chance: numbers for its draws, its own.
        prompt: its ids; set, as what follows is, by whoever lets it run.
        key: of the state at the last block boundary that it has passed, in the cache.
        kept: how many tokens of prompt and text that is.
        cached_tokens: of these, how many were not read.
        slot: where its state lies.
        bytes: what that may come to.
    """

    def __init__(
        self,
        request: int,
        asked: Request,
        sample: int,
        tokenizer: Tokenizer,
        constraint: Constraint | None = None,
        after: Sequence[int] = (),
    ) -> None:
        self.request, self.asked, self.sample = request, asked, sample
        self.finish: Finish | None = None
        self.error = ""
        self.constraint = constraint
        self.tokens: array[int] = array("q")  # 8 bytes a token, however many there are
        self.prompt: tuple[int, ...] = ()
        self.key, self.kept = "", 0
        self.cached_tokens = self.bytes = 0
        self.slot = -1
        self.chance = np.random.default_rng([asked.seed, sample])
        self.ends: dict[int, Finish] = {**dict.fromkeys(tokenizer.end_ids, "end")}
        self.ends |= dict.fromkeys(asked.stop_tokens, "stop")
        self._text, self._scanner = tokenizer.stream(after[-_TAIL:]), StopScanner(asked.stop)
        self._unsent = ""
        if asked.echo:
            text = asked.prompt if asked.echo is True else asked.echo
            self._unsent = text if isinstance(text, str) else tokenizer.decode(text)
        self._sent = (
            bytearray()
        )  # UTF-8; small strings, of which StringIO keeps 100,000, take ten times what they say
        self._logprobs: list[TokenLogprobs] = []

    @property
    def must_go_on(self) -> bool:
        """Whether the next token may not end the text."""
        return len(self.tokens) < self.asked.min_tokens

    @property
    def length(self) -> int:
        """Tokens of prompt and text."""
        return len(self.prompt) + len(self.tokens)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is the likeliest one, whatever was generated before, and nothing is asked about it."""
        chosen, plain = self.asked.sampling, self.constraint is None and self.asked.logprobs is None
        return (
            chosen.temperature == 0
            and plain
            and not (chosen.penalises or chosen.logit_bias or self.must_go_on)
        )

    def ids(self, start: int, end: int) -> tuple[int, ...]:
        """The ids of prompt and text from one place to another."""
        n = len(self.prompt)
        return (*self.prompt[start:end], *self.tokens[max(0, start - n) : max(0, end - n)])

    def push(self, token: int, logprobs: TokenLogprobs | None = None) -> Event:
        """Takes the next token; sets `finish` when it is the last.

        Raises:
            UserError: the grammar cannot be followed any further; nothing has changed.
        """
        text, ends = "", token in self.ends
        if ends:
            self.finish = self.ends[token]
        else:
            if self.constraint is not None:
                self.constraint.push(token)
            free = not self.must_go_on
            self.tokens.append(token)
            text = self._text.push(token)
            if free:
                text = self._scanner.push(text)
            if logprobs is not None:
                self._logprobs.append(logprobs)
            if self.constraint is not None and self.constraint.complete:
                self.finish = "end"
            elif len(self.tokens) == self.asked.max_tokens:
                self.finish = "length"
        if self.finish is not None:  # what the text and the scanner waited with comes out
            text += self._scanner.push(self._text.finish())
            text += self._scanner.finish()
        if self._scanner.stopped:
            self.finish = "stop"
        return self._event(text, None if ends else token, None if ends else logprobs)

    def end(self, finish: Finish, error: str = "") -> Event:
        """Ends it from outside; what waited to become a stop string is part of the text."""
        self.finish, self.error = finish, error
        return self._event(self._scanner.finish(), None, None)

    def _event(self, text: str, token: int | None, logprobs: TokenLogprobs | None) -> Event:
        text, self._unsent = self._unsent + text, ""
        self._sent += text.encode()
        return Event(self.request, self.sample, text, token, logprobs, self._completion())

    def _completion(self) -> Completion | None:
        if self.finish is None:
            return None
        return Completion(
            self._sent.decode(),
            tuple(self.tokens),
            self.finish,
            len(self.prompt),
            self.cached_tokens,
            tuple(self._logprobs),
            self.error,
        )
