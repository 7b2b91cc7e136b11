"""Evaluation text: documents in pieces, in a fixed order, with flat memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from retnet.data import DataConfig, Problem, RunData, Tokenizer, TokenShards, load
from retnet.data.config import as_tuple
from retnet.data.manifest import prepared_folder
from retnet.data.readers import Piece, pieces, read
from retnet.data.run_data import OR_DIVISION
from retnet.data.sources import TEXT, Source
from retnet.data.split import DIVISION, Taken, found_in, gather, is_held_out, text_fingerprint
from retnet.errors import printable
from retnet.model.runs import meant
from retnet.settings import UserError, build, read_toml

_UNKNOWN = "an older version began this run and did not note its text; if that has changed, this may have been trained on"
_CHUNK = 1 << 16  # tokens of a prepared folder turned into text at a time


class Text(NamedTuple):
    """A part of a document.

    Attributes:
        text: never empty.
        first: whether it begins one.
        done: the part of the corpus read so far, 0 to 1.
        before: the end of what stands before it in the document.
    """

    text: str
    first: bool
    done: float
    before: str = ""


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
        self._left_out: list[Problem] = []
        taken: Taken = {}
        self._parts = [_part(spec, text_field, self._left_out.append, taken) for spec in specs]
        self._bytes = sum(_size(source) for part in self._parts for source in part.sources)

    def texts(self, on_problem: Callable[[Problem], None]) -> Iterator[Text]:
        """All documents, in pieces; what could not be used is reported and left out."""
        for problem in self._left_out:
            on_problem(problem)
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
                        yield Text(content.text, content.first, min(done, 1.0), content.before)
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
    return os.path.isfile(meant(path) / "config.toml")


def _part(spec: str, text_field: str, on_problem: Callable[[Problem], None], taken: Taken) -> _Part:
    if is_run(spec):
        run = meant(spec)
        part, began = _validation_of(run, on_problem), RunData.read(run)
        return _once(part, run, began.validation if began else "", on_problem, taken)
    if (folder := prepared_folder(spec)) is not None:
        tokens = load(folder).validation.fingerprint
        return _once(_Part([], text_field, prepared=folder), folder, tokens, on_problem, taken)
    return _Part(list(found_in([spec], on_problem, taken)), text_field)


def _once(
    part: _Part, place: Path, tokens: str, on_problem: Callable[[Problem], None], taken: Taken
) -> _Part:
    """Held-out text without what was there before: other runs hold out the same of one corpus or prepared folder.

    Files are known by their content. A prepared folder has none, and is known by its tokens, as is what a run made of files.
    """
    if part.prepared is not None:
        tokens, place = load(part.prepared).validation.fingerprint, part.prepared
    here, other = f"prepared {tokens}", f"made of files {tokens}"
    known = (here, other) if part.prepared else (here,)
    if (found := next((taken[False, name] for name in known if (False, name) in taken), None)) is not None:
        on_problem(Problem(printable(place), 0, "duplicate", f"the same text as {found}"))
        return part._replace(prepared=None, sources=[])
    if tokens:
        taken[False, here if part.prepared else other] = printable(place)
    if part.prepared is not None:
        return part
    kept = []
    for source in part.sources:
        all_of_it = source.validation is True or part.fraction is None
        whole = all_of_it and not source.start and source.stop is None
        name = source.identity if whole else f"{source.identity} {source.start} {source.stop} {part.fraction}"
        key = (source.kind in TEXT, name)
        if key in taken:
            on_problem(Problem(printable(source.path), 0, "duplicate", f"the same text as {taken[key]}"))
        else:
            taken[key] = printable(source.path)
            kept.append(source)
    return part._replace(sources=kept)


def _validation_of(run: Path, on_problem: Callable[[Problem], None]) -> _Part:
    """The documents that training held out; see `retnet.data.prepare`. What is left out was said then.

    Raises:
        UserError: they are not there any more, or not the same: what is held out now may have been trained on.
    """
    config = build(DataConfig, read_toml(run / "config.toml").get("data", {}), "data")
    began = RunData.read(run)
    if began is None:
        on_problem(Problem(str(run), 0, "not known", _UNKNOWN))
    try:
        part = _held_out(config)
        if began is not None and not _same(began, part):
            doubt = part.fraction is not None and not began.known_division
            raise UserError(
                f"its text{OR_DIVISION if doubt else ''} has changed since it was trained, and what is held out now may "
                "have been trained on"
            )
    except UserError as error:
        raise UserError(
            f"the validation split of {run} cannot be found again: {error}; "
            "restore the files, go to the folder it was trained in, or name other data"
        ) from None
    return part


def _held_out(config: DataConfig) -> _Part:
    if (folder := prepared_folder(config.corpus)) is not None:
        return _Part([], config.text_field, prepared=folder)
    if config.validation is not None:
        return _Part(list(found_in(as_tuple(config.validation), lambda _: None)), config.text_field)
    held_out = [source for source in gather(config).sources if source.validation is not False]
    return _Part(held_out, config.text_field, config.validation_fraction)


def _same(began: RunData, part: _Part) -> bool:
    if part.prepared is not None:
        return load(part.prepared).validation.fingerprint == began.validation
    if part.fraction is not None and began.division not in (0, DIVISION):
        return False  # the files are the same, not the sides that their records fall on
    return text_fingerprint(part.sources, validation=True) == began.validation_text


def _counts(piece: Piece, source: Source, part: _Part) -> bool:
    return part.fraction is None or is_held_out(source, piece.share, part.fraction)


def _size(source: Source) -> int:
    return (source.size if source.stop is None else source.stop) - source.start


def _decoded(directory: Path) -> Iterator[Text]:
    """The validation split of a prepared folder, as text."""
    prepared = load(directory)
    shards = prepared.validation
    for document in range(shards.num_documents):
        for before, text in pieces(_document(shards, document, prepared.tokenizer)):
            yield Text(text, not before, document / shards.num_documents, before)


def _document(shards: TokenShards, document: int, tokenizer: Tokenizer) -> Iterator[str]:
    start, stop = shards.document_span(document)
    stream = tokenizer.stream()
    for at in range(start + 1, stop, _CHUNK):  # after BOS
        tokens = shards.tokens(at, min(at + _CHUNK, stop)).tolist()
        text = "".join(map(stream.push, tokens)) + (stream.finish() if at + _CHUNK >= stop else "")
        if text:
            yield text
