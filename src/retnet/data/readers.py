"""From a source to a stream of pieces of documents, and of problems: in a fixed order, with flat memory.

A document longer than `PIECE` characters comes in several pieces. They are cut between a letter or digit and a space,
where tokenizers (byte-level as GPT-2's and Llama 3's, SentencePiece's with a mark for each space as Llama 2's and T5's)
divide the text anyway, and each piece knows what stands before it, so the tokens are those of the whole. A text without
such a place for a whole piece is cut at other white space, and one without that where the piece is full.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from retnet.data import hub
from retnet.data.content import BROKEN, CHUNK, MARK, Mender, chunks, lines
from retnet.data.remote import open_bytes
from retnet.data.sources import TEXT, Problem, Source
from retnet.data.split import content_share, share, text_share
from retnet.errors import UserError, printable, reason_of

if TYPE_CHECKING:
    import pyarrow

Row = tuple[int, object, int]  # line, row or record number; its text, or a Problem; position

PIECE = 1 << 17  # characters
_VALIDATED = "the same text is validated on"
_ROWS = 128  # of a table at a time
_SAFE_CUTS = (
    re.compile(r"[^\W_](?= )"),
    re.compile(r"[^\W_](?=[\t\r\n])"),
)  # the second for byte-level ones alone
_BEFORE = 64  # characters that a piece knows of those before it; no word that is one token is longer


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
        text: never empty.
        first: whether it begins a document.
        before: the end of what stands before it in the document; empty for the first.
        share: of its document, in [0, 1): decides the split unless the source has.
        position: bytes of the source read so far, for progress.
    """

    text: str
    first: bool
    share: float
    position: int
    before: str = ""


class Shares:
    """The hashes of the documents in some sources, 8 bytes each, to find the same texts elsewhere."""

    def __init__(self, sources: Iterable[Source], text_field: str) -> None:
        every = list(sources)
        files = [source for source in every if source.kind in TEXT and source.size]
        others = [source for source in every if source.kind not in TEXT]
        records = chain.from_iterable(read(source, text_field) for source in others)
        found = array("d", (content_share(source.identity) for source in files))
        found.extend(piece.share for piece in records if isinstance(piece, Piece) and piece.first)
        self._sorted = array("d", sorted(found))

    def __contains__(self, share: object) -> bool:
        assert isinstance(share, float)
        at = bisect_left(self._sorted, share)
        return at < len(self._sorted) and self._sorted[at] == share


def read(source: Source, text_field: str, without: Container[float] = ()) -> Iterator[Piece | Problem]:
    """Everything in one source. A source that breaks off gives what stands before the break, then a problem.

    Args:
        source: what to read.
        text_field: the field of records that holds the text.
        without: hashes of texts that are left out and told as duplicates, because they are validated on.

    Raises:
        UserError: a streamed dataset breaks off; what a network lost is not left out of a corpus.
    """
    name = printable(source.path)
    for content in _read(source, text_field, without):
        yield content._replace(file=name) if isinstance(content, Problem) else content


def _read(source: Source, text_field: str, without: Container[float]) -> Iterator[Piece | Problem]:
    line = None
    try:
        if source.kind in TEXT:
            if source.identity and content_share(source.identity) in without:
                yield Problem(source.path, 0, "duplicate", _VALIDATED)
            else:
                yield from _text_file(source)
            return
        opened = _json_lines if source.kind == ".jsonl" else _table_rows
        for line, text, position in opened(source, text_field):
            yield from _record(source, text_field, line, text, position, without)
        if line is None:
            yield Problem(source.path, 0, "no text", "it holds no records")
    except UserError:
        raise
    except BROKEN as error:
        where = f"after line {line}: " if line else ""
        yield Problem(source.path, 0, "unreadable", f"{where}{reason_of(error, without=source.path)}")


def _record(
    source: Source, field: str, line: int, text: object, position: int, without: Container[float]
) -> Iterator[Piece | Problem]:
    """One record: the text of a document, bytes that should be one, or a problem found earlier."""
    if isinstance(text, Problem):
        yield text
        return
    if isinstance(text, bytes):
        try:
            text = str(text, "utf-8")
        except UnicodeDecodeError as error:
            yield Problem(source.path, line, "invalid UTF-8", error.reason)
            text = error.object.decode("utf-8", "replace")
    if not isinstance(text, str):
        what = "is missing" if text is msgspec.UNSET else f"holds {type(text).__name__}, not text"
        yield Problem(source.path, line, "no text", f"the field {field!r} {what}")
        return
    if "\0" in text:
        yield Problem(source.path, line, "not text", f"character {text.index(chr(0))} is NUL")
        return
    text = text.removeprefix(MARK)
    if MARK in text:
        yield Problem(source.path, line, "byte order mark", "inside the text, removed")
        text = text.replace(MARK, "")
    if not text:
        yield Problem(source.path, line, "empty document", "")
        return
    key = text_share(text)
    if key in without:
        yield Problem(source.path, line, "duplicate", _VALIDATED)
        return
    parts = (text[i : i + PIECE] for i in range(0, len(text), PIECE))
    for before, piece in pieces(parts):
        yield Piece(piece, not before, key, position, before)


def _text_file(source: Source) -> Iterator[Piece | Problem]:
    found: list[Problem] = []
    key, position = share(source.name), source.start
    before = piece = ""
    for before, piece in pieces(_decoded(source, found)):
        yield from found
        found.clear()
        position += len(piece.encode())
        yield Piece(piece, not before, key, min(position, source.size) - source.start, before)
    yield from found
    if not piece:
        yield Problem(source.path, 0, "empty document", "")


def _decoded(source: Source, found: list[Problem]) -> Iterator[str]:
    """The text of a file in chunks. The first mended place of each kind is reported.

    Bytes that are not UTF-8 are replaced. Byte order marks inside a text, which joined files have, are removed.
    """
    mender = Mender()
    position, mended, marked = source.start, False, False
    for chunk in chain(chunks(source), [b""]):
        text = mender.decode(chunk, final=not chunk)
        if mender.error is not None and not mended:
            error, mended = mender.error, True
            line = _line_of(source, position + len(chunk) - len(error.object) + error.start)
            message = f"{error.reason}; bytes replaced from here on"
            found.append(Problem(source.path, line, "invalid UTF-8", message))
        if MARK in text:
            if not marked:
                line = _line_of(source, position) + text.count("\n", 0, text.index(MARK))
                found.append(
                    Problem(source.path, line, "byte order mark", "inside the text, removed from here on")
                )
                marked = True
            text = text.replace(MARK, "")
        position += len(chunk)
        if text:
            yield text


def _line_of(source: Source, offset: int) -> int:
    """The number of the line that holds a byte, from 1."""
    before = source._replace(start=0, stop=offset)
    return 1 + (sum(chunk.count(b"\n") for chunk in chunks(before)) if offset else 0)


def _json_lines(source: Source, field: str) -> Iterator[Row]:
    spec = [("text", Any, msgspec.field(name=field, default=msgspec.UNSET))]
    decoder = msgspec.json.Decoder(msgspec.defstruct("Record", spec))  # leaves the other fields unread
    for number, (line, position) in enumerate(lines(source), 1):
        if not line.strip():
            continue
        try:
            value = decoder.decode(line).text  # type: ignore[attr-defined]  # a field of `spec`
        except (msgspec.DecodeError, UnicodeDecodeError):
            value, kind, message = _parse(line, field)
            if kind:
                yield number, Problem(source.path, number, kind, message), position
            if kind == "bad JSON":
                continue
        yield number, value, position


def _parse(line: bytes, field: str) -> tuple[object, str, str]:
    """(value of the field, kind of problem, message) of a line that the strict parser refused.

    Mended are a byte order mark, bytes that are not UTF-8 and halves of surrogate pairs; NaN and Infinity, which
    Python itself writes, are let pass.
    """
    kind = message = ""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text, kind, message = line.decode("utf-8-sig", "replace"), "invalid UTF-8", error.reason
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, "bad JSON", f"{getattr(error, 'msg', error)} (character {getattr(error, 'pos', 0)})"
    if not isinstance(record, dict):
        return None, "bad JSON", f"an object is expected, got {type(record).__name__}"
    value = record.get(field, msgspec.UNSET)
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        value, kind, message = (
            re.sub("[\ud800-\udfff]", "\ufffd", value),
            "invalid UTF-8",
            "half a surrogate pair",
        )
    return value, kind, message


def _table_rows(source: Source, field: str) -> Iterator[Row]:
    import pyarrow

    number = 0
    try:
        for table, position in _tables(source, field):
            names = table.schema.names
            if names.count(field) != 1:
                yield 0, Problem(source.path, 0, "no text", _no_column(field, names)), position
                return
            column = table.column(field)
            if pyarrow.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            if str(column.type).endswith(("string", "binary", "string_view", "binary_view")):
                column = column.cast(
                    pyarrow.large_binary()
                )  # as bytes: Arrow does not promise that text is UTF-8
            for value in column.to_pylist():
                number += 1
                yield number, value, position
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None


def _no_column(field: str, names: list[str]) -> str:
    count = names.count(field)
    return f"{count if count else 'no'} column{'s' * bool(count)} {field!r}; columns: {', '.join(names)}"


def _tables(source: Source, field: str) -> Iterator[tuple[pyarrow.RecordBatch | pyarrow.Table, int]]:
    """A few rows at a time, and the position after them."""
    if source.kind == "hf":
        yield from ((table, 0) for table in hub.tables(source.path, _ROWS))
        return
    from pyarrow import parquet

    with (
        open_bytes(source.path) as raw,
        parquet.ParquetFile(raw, pre_buffer=False, buffer_size=CHUNK) as file,
    ):
        schema = file.schema_arrow
        if schema.names.count(field) != 1:
            yield schema.empty_table(), 0
            return
        done, total = 0, max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(_ROWS, columns=[field]):
            done += batch.num_rows
            yield batch, source.size * done // total


def pieces(chunks: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Cuts a text into pieces of at most `PIECE` characters; where, depends on the text alone, not on the chunks.

    Yields:
        the end of what stands before a piece (empty for the first), and the piece.
    """
    before = buffer = ""
    for chunk in chunks:
        buffer += chunk
        while len(buffer) > PIECE:
            cut = _cut(buffer)
            yield before, buffer[:cut]
            before, buffer = buffer[max(cut - _BEFORE, 0) : cut], buffer[cut:]
    if buffer:
        yield before, buffer


def _cut(text: str) -> int:
    """The last safe place to cut in the first `PIECE` characters; that many when there is none."""
    for safe in _SAFE_CUTS:
        for start in (max(PIECE - 4096, 0), 0):
            places = [match.end() for match in safe.finditer(text, start, PIECE + 1)]
            if places:
                return places[-1]
    return PIECE
