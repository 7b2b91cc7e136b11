"""Token losses of documents of any length, in fresh windows or with a carried state, summed with flat memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retnet.evals.readers import CarryError, Losses, Reader, Tokens
from retnet.evals.statistics import ByContext, Ratio
from retnet.settings import UserError


class Track:
    """What one kind of reading gave: in fresh windows of `limit` tokens, or (None) carried through whole documents.

    Attributes:
        limit: tokens of a window.
        refused: why the model cannot do this; the sums mean nothing then.
        nats_per_token: over documents.
        nats_per_byte: over documents.
        by_context: over tokens.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.refused: str | None = None
        self.nats_per_token, self.nats_per_byte, self.by_context = Ratio(), Ratio(), ByContext()
        self.restart()

    def restart(self) -> None:
        """A document begins."""
        self.buffer: Tokens = np.empty(0, np.int64)  # the next token to be read, and those after it
        self.context = 0  # tokens of the current window that were read
        self.state: Any = None

    def advance(self, size: int) -> None:
        """So many tokens of the buffer were read."""
        self.buffer = self.buffer[size:]
        self.context += size
        if self.context == self.limit:
            self.context, self.state = 0, None


class _Document:
    """Sums of one document, while parts of it may wait to be scored."""

    def __init__(self, number: int, tracks: int) -> None:
        self.number = number
        self.nats: NDArray[np.float64] = np.zeros(tracks)
        self.tokens = self.bytes = 0
        self.complete = False


class _Waiting(NamedTuple):
    """A sequence to be scored from its beginning, for some tracks (by index) of one document."""

    sequence: Tokens
    tracks: list[int]
    document: _Document


class DocumentScorer:
    """Reads a stream of documents with one model, in several tracks at once.

    Whole windows that fit a batch wait until they fill one; longer ones are read piece by piece, carrying the state. A
    document that fits a batch is held whole: the tracks whose windows do not cut it share one reading.

    Attributes:
        documents: begun so far.
        tokens: fed so far; each is scored once in each track.
        bytes: of their text.
    """

    def __init__(self, reader: Reader, tracks: Sequence[Track]) -> None:
        self.documents = self.tokens = self.bytes = 0
        self._reader, self._tracks = reader, tracks
        self._everyone = range(len(tracks))
        self._waiting: list[_Waiting] = []
        self._waiting_tokens = 0
        self._open: list[_Document] = []  # not summed up yet; the last is the current one
        self._held: list[Tokens] | None = None  # the current document, while it may still fit a batch

    def start(self, bos_id: int) -> None:
        """Begins a document, and ends the one before."""
        self._end()
        self.documents += 1
        self._open.append(_Document(self.documents, len(self._tracks)))
        self._held = [np.array([bos_id], np.int64)]
        for track in self._tracks:
            track.restart()

    def feed(self, tokens: Tokens, num_bytes: int) -> None:
        """More tokens of the current document, and the bytes of their text."""
        document = self._open[-1]
        document.tokens += len(tokens)
        document.bytes += num_bytes
        self.tokens += len(tokens)
        self.bytes += num_bytes
        if self._held is None:
            self._pass_on(tokens, self._everyone)
            return
        self._held.append(tokens)
        if document.tokens > self._reader.batch_tokens:
            held, self._held = np.concatenate(self._held), None
            self._pass_on(held, self._everyone)

    def finish(self) -> None:
        """Ends the last document and scores what still waits."""
        self._end()
        self._flush()

    def _end(self) -> None:
        if not self._open or self._open[-1].complete:
            return
        document = self._open[-1]
        if self._held is not None:
            whole = np.concatenate(self._held)
            uncut = [i for i in self._everyone if (self._tracks[i].limit or math.inf) >= document.tokens]
            self._wait(whole, uncut)
            self._pass_on(whole, [i for i in self._everyone if i not in uncut])
        for index in self._everyone:
            self._read(index, last=True)
        document.complete = True
        if not self._waiting:
            self._flush()

    def _pass_on(self, tokens: Tokens, tracks: Iterable[int]) -> None:
        for index in tracks:
            track = self._tracks[index]
            if track.refused is None:
                track.buffer = np.concatenate([track.buffer, tokens])
                self._read(index, last=False)

    def _read(self, index: int, *, last: bool) -> None:
        """Reads what a track's buffer has of whole windows and pieces; at the end of a document, all of it."""
        track, batch = self._tracks[index], self._reader.batch_tokens
        while track.refused is None and (known := len(track.buffer) - 1) > 0:  # inputs with a known successor
            room = math.inf if track.limit is None else track.limit - track.context
            fresh = track.context == 0
            if fresh and min(known, room) <= batch and (known >= room or last):
                size = int(min(known, room))
                self._wait(track.buffer[: size + 1], [index])
            elif fresh and room <= batch:
                return  # the window will be complete
            else:
                size = int(min(room, self._reader.piece))
                if known < size and not last:
                    return
                size = min(known, size)
                self._carry(index, size)
            track.advance(size)

    def _carry(self, index: int, size: int) -> None:
        """Reads the next piece of a window that is longer than a batch."""
        track, document = self._tracks[index], self._open[-1]
        if not self._can_hold(index, track.context + size):
            return
        try:
            losses, track.state = self._reader.carry(track.buffer[: size + 1], track.state)
        except CarryError as error:
            track.refused = f"document {document.number} is too long: {error}"
        else:
            self._add([index], document, losses, track.context + 1)

    def _wait(self, sequence: Tokens, tracks: list[int]) -> None:
        """Lets a sequence be scored with the next batch."""
        tracks = [index for index in tracks if self._can_hold(index, len(sequence) - 1)]
        if not tracks or len(sequence) < 2:
            return
        self._waiting.append(_Waiting(sequence, tracks, self._open[-1]))
        self._waiting_tokens += len(sequence) - 1
        if self._waiting_tokens >= self._reader.batch_tokens:
            self._flush()

    def _can_hold(self, index: int, context: int) -> bool:
        track, limit = self._tracks[index], self._reader.limit
        if limit is not None and context > limit and track.refused is None:
            track.refused = (
                f"document {self._open[-1].number} needs a context of {context:,} tokens or more; "
                f"the model holds {limit:,}"
            )
        return track.refused is None

    def _flush(self) -> None:
        """Scores what waits, and sums up the documents that are complete."""
        waiting, self._waiting, self._waiting_tokens = self._waiting, [], 0
        if waiting:
            scored = self._reader.score([w.sequence for w in waiting])
            for w, losses in zip(waiting, scored, strict=True):
                self._add(w.tracks, w.document, losses, 1)
        for document in self._open:
            if document.complete:
                for track, nats in zip(self._tracks, document.nats.tolist(), strict=True):
                    track.nats_per_token.add(nats, document.tokens)
                    track.nats_per_byte.add(nats, document.bytes)
        self._open = [document for document in self._open if not document.complete]

    def _add(self, tracks: list[int], document: _Document, losses: Losses, context: int) -> None:
        if not np.isfinite(losses).all():
            raise UserError(
                f"the loss is not a finite number in document {document.number}: the weights are damaged, or "
                "they overflow in the type they were loaded with (--dtype float32)"
            )
        for index in tracks:
            document.nats[index] += losses.sum()
            self._tracks[index].by_context.add(losses, context)
