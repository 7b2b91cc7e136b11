"""The text that models are measured on: documents in pieces, in a fixed order, with flat memory."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from retnet.data import DataConfig, Problem, Tokenizer, TokenShards, load
from retnet.data.config import as_tuple
from retnet.data.manifest import FORMAT, MANIFEST
from retnet.data.readers import Piece, read
from retnet.data.sources import Source, find, hold_out, is_held_out
from retnet.settings import UserError, build

_CHUNK = 1 << 16  # tokens of a prepared folder turned into text at a time


class Text(NamedTuple):
    """A part of a document: `first` begins one, and `done` is the part of the corpus read so far, 0 to 1."""

    text: str
    first: bool
    done: float


class _Part(NamedTuple):
    """Files, and how to tell which of their documents count: all, or those of a validation split."""

    sources: list[Source]
    text_field: str
    fraction: float | None = None  # of documents held out where `Source.validation` leaves it open
    prepared: Path | None = None


class Corpus:
    """Documents to evaluate on.

    Args:
        specs: files, folders or globs of the kinds that training reads, ``hf:NAME[:CONFIG[:SPLIT]]``, ``stdlib``; a run
            directory stands for the validation split of its corpus, a prepared folder for its own.
        text_field: the field of records that holds the text. A run brings its own.

    Raises:
        UserError: one of them is not there, or has no readable file.
    """

    def __init__(self, specs: Sequence[str], text_field: str = "text") -> None:
        if not specs:
            raise UserError("no data to evaluate on")
        self.specs = tuple(specs)
        self._parts = [_part(spec, text_field) for spec in specs]
        self._bytes = sum(_size(source) for part in self._parts for source in part.sources)

    def texts(self, on_problem: Callable[[Problem], None]) -> Iterator[Text]:
        """All documents, in pieces; what could not be used is reported and left out."""
        before = 0
        for part in self._parts:
            if part.prepared is not None:
                yield from _decoded(part.prepared)
            for source in part.sources:
                for content in read(source, part.text_field):
                    if isinstance(content, Problem):
                        on_problem(content)
                    elif _counts(content, source, part):
                        done = (before + content.position) / self._bytes if self._bytes else 0.0
                        yield Text(content.text, content.first, min(done, 1.0))
                before += _size(source)


class TextHash:
    """SHA-256 of documents: the same text gives the same, however it lies in files or pieces."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, piece: Text) -> None:
        """The next piece."""
        self._sha256.update(b"\xff" * piece.first + piece.text.encode())  # UTF-8 has no byte 0xff

    def hexdigest(self) -> str:
        """Of everything so far."""
        return self._sha256.hexdigest()


def is_run(path: str | Path) -> bool:
    """Whether this is a run directory, which says what it was trained and validated on."""
    return (Path(path) / "config.toml").is_file()


def _part(spec: str, text_field: str) -> _Part:
    if is_run(spec):
        return _validation_of(spec)
    if _is_prepared(spec):
        return _Part([], text_field, prepared=Path(spec))
    return _Part(find(spec), text_field)


def _validation_of(run: str) -> _Part:
    """The documents that training held out; see `retnet.data.prepare`."""
    path = Path(run) / "config.toml"
    try:
        config = build(DataConfig, tomllib.loads(path.read_text(encoding="utf-8")).get("data", {}), "data")
        if isinstance(config.corpus, str) and _is_prepared(config.corpus):
            return _Part([], config.text_field, prepared=Path(config.corpus))
        if config.validation is not None:
            return _Part([s for v in as_tuple(config.validation) for s in find(v)], config.text_field)
        sources = hold_out([s for c in as_tuple(config.corpus) for s in find(c)], config.validation_fraction)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except UserError as error:
        raise UserError(
            f"the validation split of {run} cannot be found again: {error}; "
            "go to the folder it was trained in, or name other data"
        ) from None
    return _Part(
        [s for s in sources if s.validation is not False], config.text_field, config.validation_fraction
    )


def _is_prepared(spec: str) -> bool:
    manifest = Path(spec) / MANIFEST
    return manifest.is_file() and FORMAT in manifest.read_text(encoding="utf-8", errors="replace")[:200]


def _counts(piece: Piece, source: Source, part: _Part) -> bool:
    return part.fraction is None or is_held_out(source, piece.share, part.fraction)


def _size(source: Source) -> int:
    return (source.size if source.stop is None else source.stop) - source.start


def _decoded(directory: Path) -> Iterator[Text]:
    """The validation split of a prepared folder, as text."""
    prepared = load(directory)
    shards = prepared.validation
    for document in range(shards.num_documents):
        first = True
        for text in _document(shards, document, prepared.tokenizer):
            yield Text(text, first, document / shards.num_documents)
            first = False


def _document(shards: TokenShards, document: int, tokenizer: Tokenizer) -> Iterator[str]:
    start, stop = shards.document_span(document)
    stream = tokenizer.stream()
    for at in range(start + 1, stop, _CHUNK):  # after BOS
        tokens = shards.tokens(at, min(at + _CHUNK, stop)).tolist()
        text = "".join(map(stream.push, tokens)) + (stream.finish() if at + _CHUNK >= stop else "")
        if text:
            yield text
