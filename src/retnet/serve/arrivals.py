"""Pieces of texts on their way from the engine to the reader of one answer."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from retnet.engine import Completion, Event, TokenLogprobs


class Delta(NamedTuple):
    """What is new of one text: one event of the engine, or several that came before they were read.

    Attributes:
        sample: of its request, from 0.
        text: whole characters; may be empty.
        logprobs: of the tokens that are new, where they were asked for.
        completion: all of it, with its last piece; None before.
    """

    sample: int
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    completion: Completion | None = None


class Arrivals:
    """Pieces on their way to one reader, each beside the number of its request.

    What comes of a text while a piece of it waits becomes part of that piece. So a reader that is far behind gets more at
    once, and however slow it is, what waits for it takes no more memory than the texts themselves.
    """

    def __init__(self) -> None:
        self._waiting: dict[
            tuple[int, int], _GrowingDelta
        ] = {}  # by request and sample, in the order they came
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, number: int, event: Event) -> None:
        """Adds what is new of a request's text; not after an error."""
        if self._error is not None:
            return
        key = number, event.sample
        waiting = self._waiting.get(key)
        if waiting is None:
            waiting = self._waiting[key] = _GrowingDelta()
        waiting.add(event)
        self._wake()

    def fail(self, error: Exception) -> None:
        """Has the reader find an error behind all that waits."""
        self._error = self._error or error
        self._wake()

    async def get(self) -> tuple[int, Delta]:
        """The piece that has waited longest, and its request's number.

        Raises:
            Exception: the error that `fail` was told.
        """
        while not self._waiting:
            if self._error is not None:
                raise self._error
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        key = next(iter(self._waiting))
        return key[0], self._waiting.pop(key).delta(key[1])

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class _GrowingDelta:
    """A delta that may still grow."""

    __slots__ = ("completion", "logprobs", "text")

    def __init__(self) -> None:
        self.text = bytearray()  # UTF-8: no string for each token, however many come
        self.logprobs: list[TokenLogprobs] = []
        self.completion: Completion | None = None

    def add(self, event: Event) -> None:
        self.text += event.text.encode()
        if event.logprobs is not None:
            self.logprobs.append(event.logprobs)
        self.completion = event.completion

    def delta(self, sample: int) -> Delta:
        return Delta(sample, self.text.decode(), tuple(self.logprobs), self.completion)
