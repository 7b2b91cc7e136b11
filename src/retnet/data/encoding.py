"""Reading and tokenising: from sources to numbered pieces of documents with their tokens, in the order of the text."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from retnet.data.content import require_unchanged
from retnet.data.readers import Piece, read
from retnet.data.sources import Problem, Source
from retnet.data.tokenizer import Tokenizer
from retnet.errors import UserError

_BATCH = 1 << 20  # characters tokenised at a time; does not show in the result
_BATCH_EVENTS = 8192


class ReadEvent(NamedTuple):
    """What a reader gave, and where: reading goes on there after a kill."""

    source: int
    number: int  # within the source
    content: Piece | Problem


class Encoded(NamedTuple):
    """A piece of a document and its tokens, or a problem, which has none."""

    event: ReadEvent
    tokens: NDArray[np.integer]
    num_bytes: int


class Reading(NamedTuple):
    """What is read, and how.

    Attributes:
        found: the sources, all of them.
        text_field: the field of records that holds the text.
        held_out: hashes of texts that are validated on wherever they stand.
    """

    found: list[Source]
    text_field: str
    held_out: Container[float]

    def events(self, source: int, number: int, stop: int) -> Iterator[ReadEvent]:
        """Everything that sources below `stop` give from event `number` of source `source` on."""
        for here in range(source, stop):
            without = () if self.found[here].validation else self.held_out
            for count, content in enumerate(read(self.found[here], self.text_field, without)):
                if here > source or count >= number:
                    yield ReadEvent(here, count, content)
            require_unchanged(self.found[here])


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """Of tokens on disk."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def encoded(events: Iterator[ReadEvent], tokenizer: Tokenizer, threads: int) -> Iterator[list[Encoded]]:
    """Events with their tokens, in order; `threads` work at them, since encoders do outside Python's lock.

    Raises:
        UserError: the tokenizer has no ids for a text, or gives its document start for one.
    """
    dtype = dtype_of(tokenizer)

    def encode(batch: list[ReadEvent]) -> list[Encoded]:
        pieces = [event.content if isinstance(event.content, Piece) else None for event in batch]
        texts = [piece.text if piece else "" for piece in pieces]
        arrays = tokenizer.encode_batch(texts, dtype, [piece.before if piece else "" for piece in pieces])
        if any((tokens == tokenizer.bos_id).any() for tokens in arrays):
            raise UserError("this tokenizer gives its document start for ordinary text; it cannot be used")
        return [
            Encoded(event, a, len(text.encode())) for event, a, text in zip(batch, arrays, texts, strict=True)
        ]

    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[list[Encoded]]] = deque()
        try:
            for batch in _batches(events):
                waiting.append(pool.submit(encode, batch))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _batches(events: Iterable[ReadEvent]) -> Iterator[list[ReadEvent]]:
    batch: list[ReadEvent] = []
    size = 0
    for event in events:
        batch.append(event)
        size += len(event.content.text) if isinstance(event.content, Piece) else 0
        if size >= _BATCH or len(batch) >= _BATCH_EVENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
