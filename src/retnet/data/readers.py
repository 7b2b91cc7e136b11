"""From a source to a stream of pieces of documents, and of problems: in a fixed order, with flat memory.

A document longer than `PIECE` characters comes in several pieces. They are cut between a letter or digit and white
space, where the pre-tokenizers of byte-level tokenizers (GPT-2, GPT-4, Llama 3, …) divide the text anyway, so the
tokens are those of the whole. A text without such a place for a whole piece is cut where the piece is full.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import msgspec

from retnet.data import hub
from retnet.data.sources import TEXT, Source, share
from retnet.settings import UserError

if TYPE_CHECKING:
    import pyarrow

Row = tuple[int, object, int]  # line, row or record number; its text, or a Problem; position

PIECE = 1 << 17  # characters
_CHUNK = 1 << 20  # bytes read at a time
_ROWS = 128  # of a table at a time
_SAFE_CUT = re.compile(r"[^\W_](?=[ \t\r\n])")


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
        text: never empty.
        first: whether it begins a document.
        share: of its document, in [0, 1): decides the split unless the source has.
        position: bytes of the source read so far, for progress.
    """

    text: str
    first: bool
    share: float
    position: int


class Problem(NamedTuple):
    """Something in a corpus that could not be used, or only after mending.

    Attributes:
        file: where.
        line: which line, row or record, from 1; 0 for the whole file.
        kind: ``unreadable``, ``bad JSON``, ``no text``, ``empty document`` (all left out) or ``invalid UTF-8``
            (kept, with U+FFFD in place of the bytes).
        message: what is wrong, for people.
    """

    file: str
    line: int
    kind: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.kind}: {self.message}" if self.message else f"{place}: {self.kind}"


def read(source: Source, text_field: str) -> Iterator[Piece | Problem]:
    """Everything in one source. A source that breaks off gives what stands before the break, then a problem.

    Raises:
        UserError: a streamed dataset breaks off; what a network lost is not left out of a corpus.
    """
    name = os.fsencode(source.path).decode("utf-8", "replace")  # file names need not be UTF-8, reports are
    for content in _read(source, text_field):
        yield content._replace(file=name) if isinstance(content, Problem) else content


def _read(source: Source, text_field: str) -> Iterator[Piece | Problem]:
    line = 0
    try:
        if source.kind in TEXT:
            yield from _text_file(source)
        elif source.kind == "?":
            yield Problem(source.path, 0, "unreadable", "a kind of file that is not known here")
        else:
            opened = _json_lines if source.kind.startswith(".jsonl") else _table_rows
            for line, text, position in opened(source, text_field):
                yield from _record(source, text_field, line, text, position)
    except UserError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:  # pyarrow's errors are OSError or ValueError
        where = f"after line {line}: " if line else ""
        yield Problem(source.path, 0, "unreadable", f"{where}{getattr(error, 'strerror', None) or error}")


def _record(source: Source, field: str, line: int, text: object, position: int) -> Iterator[Piece | Problem]:
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
    elif not text:
        yield Problem(source.path, line, "empty document", "")
    else:
        key = share(text)
        chunks = (text[i : i + PIECE] for i in range(0, len(text), PIECE))
        for number, piece in enumerate(_pieces(chunks)):
            yield Piece(piece, number == 0, key, position)


def _text_file(source: Source) -> Iterator[Piece | Problem]:
    found: list[Problem] = []
    key, position, first = share(source.name), source.start, True
    for piece in _pieces(_decoded(source, found)):
        yield from found
        found.clear()
        position += len(piece.encode())
        yield Piece(piece, first, key, min(position, source.size) - source.start)
        first = False
    yield from found
    if first:
        yield Problem(source.path, 0, "empty document", "")


def _decoded(source: Source, found: list[Problem]) -> Iterator[str]:
    """The text of a file in chunks. Bytes that are not UTF-8 are replaced, and the first of them is reported."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    with open(source.path, "rb") as file:
        file.seek(source.start)
        left = (source.stop or 1 << 62) - source.start
        while True:
            chunk = file.read(min(_CHUNK, left))
            left -= len(chunk)
            state = decoder.getstate()
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line = _line_of(source.path, file.tell() - len(chunk) - len(state[0]) + error.start)
                found.append(
                    Problem(
                        source.path, line, "invalid UTF-8", f"{error.reason}; bytes replaced from here on"
                    )
                )
                decoder = codecs.getincrementaldecoder("utf-8")("replace")
                decoder.setstate(state)
                text = decoder.decode(chunk, final=not chunk)
            if text:
                yield text
            if not chunk:
                return


def _line_of(path: str, offset: int) -> int:
    """The number of the line that holds a byte, from 1."""
    lines = 1
    with open(path, "rb") as file:
        while offset > 0 and (chunk := file.read(min(_CHUNK, offset))):
            lines += chunk.count(b"\n")
            offset -= len(chunk)
    return lines


def _json_lines(source: Source, field: str) -> Iterator[Row]:
    spec = [("text", Any, msgspec.field(name=field, default=msgspec.UNSET))]
    decoder = msgspec.json.Decoder(msgspec.defstruct("Record", spec))  # leaves the other fields unread
    with open(source.path, "rb") as raw:
        for number, line in enumerate(_lines(source.kind, raw), 1):
            position = source.size if raw.closed else raw.tell()
            if line.isspace():
                continue
            try:
                value = decoder.decode(line).text  # type: ignore[attr-defined]
            except (msgspec.DecodeError, UnicodeDecodeError):
                value, kind, message = _parse(line, field)
                if kind:
                    yield number, Problem(source.path, number, kind, message), position
                if kind == "bad JSON":
                    continue
            yield number, value, position


def _lines(kind: str, raw: IO[bytes]) -> Iterable[bytes]:
    if kind.endswith(".gz"):
        return gzip.open(raw)
    if kind.endswith(".zst"):
        import pyarrow

        # zstandard's own reader takes a truncated file for a complete one; this one raises OSError.
        return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"), _CHUNK)
    return raw


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
            if field not in table.schema.names:
                columns = ", ".join(table.schema.names)
                yield (
                    0,
                    Problem(source.path, 0, "no text", f"no column {field!r}; columns: {columns}"),
                    position,
                )
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


def _tables(source: Source, field: str) -> Iterator[tuple[pyarrow.RecordBatch | pyarrow.Table, int]]:
    """A few rows at a time, and the position after them."""
    if source.kind == "hf":
        yield from ((table, 0) for table in hub.tables(source.path, _ROWS))
        return
    from pyarrow import parquet

    with parquet.ParquetFile(source.path, pre_buffer=False, buffer_size=_CHUNK) as file:
        done, total = 0, max(file.metadata.num_rows, 1)
        columns = [field] if field in file.schema_arrow.names else None
        for batch in file.iter_batches(_ROWS, columns=columns):
            done += batch.num_rows
            yield batch, source.size * done // total


def _pieces(chunks: Iterable[str]) -> Iterator[str]:
    """Cuts a text into pieces of at most `PIECE` characters; where, depends on the text alone, not on the chunks."""
    buffer = ""
    for chunk in chunks:
        buffer += chunk
        while len(buffer) > PIECE:
            cut = _cut(buffer)
            yield buffer[:cut]
            buffer = buffer[cut:]
    if buffer:
        yield buffer


def _cut(text: str) -> int:
    """The last safe place to cut in the first `PIECE` characters; that many when there is none."""
    for start in (max(PIECE - 4096, 0), 0):
        places = [match.end() for match in _SAFE_CUT.finditer(text, start, PIECE + 1)]
        if places:
            return places[-1]
    return PIECE
