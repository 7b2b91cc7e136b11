"""Intake of requests: token ids of a prompt, checks against the vocabulary and the budget, its grammar, and its streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from retnet.engine.prompts import Prompt
from retnet.engine.requests import Request
from retnet.engine.slots import room_for
from retnet.engine.streams import Stream
from retnet.settings import UserError

if TYPE_CHECKING:
    from retnet.data import Tokenizer
    from retnet.engine.decoder import Decoder


class Intake:
    """Makes prompts of requests.

    Args:
        decoder: says what a state comes to.
        tokenizer: makes ids of text.
        max_bytes: of all states; None is any.

    Attributes:
        vocab_size: ids from here on are refused.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, max_bytes: int | None) -> None:
        self._decoder, self._tokenizer, self._max_bytes = decoder, tokenizer, max_bytes
        self.vocab_size = min(decoder.vocab_size, tokenizer.vocab_size)

    def prompt(self, number: int, request: Request) -> Prompt:
        """A request under its number, ready to be read.

        Raises:
            UserError: ids outside the vocabulary, a grammar that means nothing, or a state larger than all may be.
        """
        if isinstance(request.prompt, str):
            ids = (self._tokenizer.bos_id, *self._tokenizer.encode(request.prompt))
        else:
            ids = tuple(request.prompt)
        self.check_ids("prompt", ids)
        self.check_ids("stop_tokens", request.stop_tokens)
        self.check_ids("logit_bias", [token for token, _ in request.sampling.logit_bias])
        rule = None if request.grammar is None else request.grammar.compile(self._tokenizer)
        streams = [
            Stream(number, request, sample, self._tokenizer, rule and rule.copy(), after=ids)
            for sample in range(request.samples)
        ]
        return Prompt(number, ids, streams, self._bytes_of(len(ids), request.max_tokens))

    def check_ids(self, name: str, tokens: Sequence[int]) -> None:
        """Refuses ids outside the vocabulary.

        Raises:
            UserError: naming the one that is farthest outside.
        """
        if max(tokens, default=0) >= self.vocab_size:
            raise UserError(
                f"{name} has the token id {max(tokens)}, but the vocabulary ends with {self.vocab_size - 1}"
            )
        if min(tokens, default=0) < 0:
            raise UserError(f"{name} has the token id {min(tokens)}; ids are whole numbers of 0 or more")

    def _bytes_of(self, prompt: int, more: int) -> int:
        """What a state may come to, where that counts."""
        if self._max_bytes is None:
            return 0
        need = self._decoder.state_bytes(room_for(prompt + more))
        if need > self._max_bytes:
            raise UserError(
                f"a state of {need:,} bytes for {prompt} + {more} tokens is more than the "
                f"{self._max_bytes:,} bytes of max_state_bytes; ask for fewer tokens, or allow more"
            )
        return need
