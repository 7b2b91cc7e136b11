"""Perplexity of a model over documents: in fresh windows of several lengths, and with the state carried through.

A document is read as in training: a document start (BOS), then its tokens. Every token of the text is scored exactly
once in every mode, so all numbers are of the same tokens and bytes; the end of a text is not scored. ``windows`` of
length L cut the sequence BOS t₁ t₂ … into L tokens each, read from nothing like a row of a training batch, each token
predicting its successor; ``carried`` never cuts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from retnet.data import Problem, Tokenizer
from retnet.evals.corpus import Corpus, Text, TextHash
from retnet.evals.readers import Reader
from retnet.evals.statistics import Bucket, Estimate
from retnet.evals.windows import DocumentScorer, Track
from retnet.settings import UserError, nearest

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
MODES = ("windows", "carried")
_CHARACTERS = 1 << 20  # encoded at once
_PIECES = 1024  # of documents, likewise


class ReadingProgress(NamedTuple):
    """How far one model has come: part of the corpus, 0 to 1 (0: unknown), documents and tokens of text."""

    done: float
    documents: int
    tokens: int


class Result(NamedTuple):
    """One mode and length.

    Attributes:
        mode: ``"windows"`` or ``"carried"``.
        length: tokens of a window; None when carried.
        refused: why the model has no numbers here, or None.
        nats_per_token: of the scored tokens; None when refused.
        bits_per_byte: of the text's UTF-8 bytes; None when refused.
        by_context: losses by the number of tokens they were predicted from.
    """

    mode: str
    length: int | None
    refused: str | None
    nats_per_token: Estimate | None
    bits_per_byte: Estimate | None
    by_context: list[Bucket]

    @property
    def perplexity(self) -> Estimate | None:
        """Per token: the exponential of the loss and of its interval; its standard error is left out."""
        nats = self.nats_per_token
        if nats is None or nats.low is None or nats.high is None:
            return nats and Estimate(_exp(nats.value), None, None, None)
        return Estimate(_exp(nats.value), None, _exp(nats.low), _exp(nats.high))


class Measured(NamedTuple):
    """One model over all documents.

    Attributes:
        results: one for each mode and length.
        documents: how many there were.
        tokens: scored, the same in each result.
        bytes: of their text in UTF-8.
        sha256: of the text, see `TextHash`.
        problems: kind → how many, of what could not be used.
    """

    results: list[Result]
    documents: int
    tokens: int
    bytes: int
    sha256: str
    problems: dict[str, int]


def measure(
    reader: Reader,
    tokenizer: Tokenizer,
    corpus: Corpus,
    *,
    lengths: Sequence[int] = LENGTHS,
    modes: Sequence[str] = MODES,
    max_documents: int | None = None,
    on_progress: Callable[[ReadingProgress], None] | None = None,
    on_problem: Callable[[Problem], None] | None = None,
) -> Measured:
    """Reads a corpus once with one model, in all modes and lengths together. Memory does not grow with the documents.

    Args:
        reader: the model.
        tokenizer: the one it was trained with; its document start begins every document.
        corpus: the text.
        lengths: of windows, in tokens.
        modes: of `MODES`.
        max_documents: stop after so many.
        on_progress: called after every piece of a document.
        on_problem: called for what could not be used.

    Raises:
        UserError: no text, an unknown mode, a length below 1, or a loss that is not finite.
    """
    tracks = _tracks(lengths, modes)
    scorer, text_hash = DocumentScorer(reader, tracks), TextHash()
    problems: dict[str, int] = {}

    def report(problem: Problem) -> None:
        problems[problem.kind] = problems.get(problem.kind, 0) + 1
        if on_problem:
            on_problem(problem)

    for batch in _batches(_first(corpus.texts(report), max_documents)):
        texts, before = [piece.text for piece in batch], [piece.before for piece in batch]
        for piece, ids in zip(batch, tokenizer.encode_batch(texts, before=before), strict=True):
            text_hash.add(piece)
            if piece.first:
                scorer.start(tokenizer.bos_id)
            scorer.feed(ids.astype(np.int64, copy=False), len(piece.text.encode()))
            if on_progress:
                on_progress(ReadingProgress(piece.done, scorer.documents, scorer.tokens))
    scorer.finish()
    if not scorer.tokens:
        found = ", ".join(f"{count} × {kind}" for kind, count in problems.items())
        raise UserError(f"no text to score in {', '.join(corpus.specs)}{f' ({found})' if found else ''}")
    results = [_result(track) for track in tracks]
    return Measured(results, scorer.documents, scorer.tokens, scorer.bytes, text_hash.hexdigest(), problems)


def _tracks(lengths: Sequence[int], modes: Sequence[str]) -> list[Track]:
    for mode in modes:
        if mode not in MODES:
            raise UserError(f"unknown mode {mode!r}; {nearest(mode, MODES)}")
    for length in lengths:
        if length < 1:
            raise UserError(f"a window has {length} tokens; it must have at least 1")
    windows = [Track(length) for length in sorted(set(lengths))] if "windows" in modes else []
    tracks = windows + ([Track(None)] if "carried" in modes else [])
    if not tracks:
        raise UserError("nothing to measure: give at least one length, or the mode 'carried'")
    return tracks


def _result(track: Track) -> Result:
    mode = "carried" if track.limit is None else "windows"
    if track.refused is not None:
        return Result(mode, track.limit, track.refused, None, None, [])
    nats, bits = track.nats_per_token.estimate(), track.nats_per_byte.estimate().times(1 / math.log(2))
    return Result(mode, track.limit, None, nats, bits, track.by_context.rows())


def _first(texts: Iterable[Text], documents: int | None) -> Iterator[Text]:
    """The pieces of the first so many documents."""
    for text in texts:
        if documents is not None and text.first:
            if documents == 0:
                return
            documents -= 1
        yield text


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Pieces that are encoded together: a few at least, since that keeps all cores busy."""
    batch: list[Text] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.text)
        if size >= _CHARACTERS or len(batch) >= _PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
