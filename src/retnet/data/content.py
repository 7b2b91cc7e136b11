"""Content of a file: decompressed bytes without byte order mark, SHA-256 of their text, and whether they are text at all.

The hash is what a file is known by: two files of the same text are the same, wherever they lie and however they are named,
linked, compressed or mended when they are read, and a corpus is the same corpus under another path.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import hashlib
import io
import lzma
import os
import re
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from retnet.data.remote import is_url, open_bytes, tells_changes, without_keys
from retnet.data.sources import TEXT, Source, current_stamp
from retnet.io import BOM, cache_folder, foreign_encoding, lfs_pointer, nul_byte, sha256
from retnet.settings import UserError

CHUNK = 1 << 20  # bytes read at a time
# What files and the libraries that decompress them raise; pyarrow's own errors are OSError or ValueError.
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)
_MOST_INVALID = (
    0.25  # of a file's bytes; texts in Latin-1 have fewer, those in other alphabets and no texts more
)
_SETTLED = (
    2.0  # seconds after which a file's times tell a later change apart; file systems have clocks this coarse
)
_STEP = 4096  # bytes of a compressed text, which are lost before damage at most
_PACKED = 1 << 13  # bytes read at a time of what is compressed
_SURROGATES = re.compile("[\udc80-\udcff]")
MARK = "\ufeff"  # a byte order mark


class Content(NamedTuple):
    """What one file holds.

    Attributes:
        digest: SHA-256 of what is trained on: its text, decompressed and mended; of tables, its bytes.
        identity: of the same with all line endings alike: what twins have in common.
        size: how many bytes it has, decompressed, without a byte order mark.
        refused: why they are no text; empty when they may be.
    """

    digest: str
    identity: str
    size: int
    refused: str = ""


class Mender:
    """Decoder of UTF-8 in chunks that makes U+FFFD of what is not UTF-8.

    Attributes:
        invalid: how many bytes were not.
        error: the first of them in the last chunk, or None.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.invalid = 0
        self.error: UnicodeDecodeError | None = None

    def decode(self, chunk: bytes, final: bool = False) -> str:
        """The text of the next chunk; a character that it breaks off in comes with the one after."""
        before, self.error = self._decoder.getstate(), None
        try:
            return self._decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            self.error = error
        escaped = self._again("surrogateescape", before, chunk, final)
        self.invalid += len(_SURROGATES.findall(escaped))
        return self._again("replace", before, chunk, final)

    def _again(self, errors: str, before: tuple[bytes, int], chunk: bytes, final: bool) -> str:
        self._decoder.setstate(before)
        self._decoder.errors = errors
        try:
            return self._decoder.decode(chunk, final)
        finally:
            self._decoder.errors = "strict"


class _ContentHash:
    """SHA-256 of a text, and of the same with all line endings alike; byte order marks are no part of either."""

    def __init__(self) -> None:
        self._exact = hashlib.sha256()
        self._alike = self._exact  # its own from the first line ending that is not \n
        self._held = ""

    def add(self, text: str, final: bool = False) -> None:
        """The next part of it."""
        text = self._held + text.replace(MARK, "")
        self._held = "\r" if text.endswith("\r") and not final else ""
        content = text[: len(text) - len(self._held)].encode()
        if b"\r\n" in content and self._alike is self._exact:
            self._alike = self._exact.copy()
        self._exact.update(content)
        if self._alike is not self._exact:
            self._alike.update(content.replace(b"\r\n", b"\n"))

    def add_bytes(self, content: bytes) -> None:
        """The next part of what is no text, or only known to be broken."""
        self._exact.update(content)
        if self._alike is not self._exact:
            self._alike.update(content)

    def digests(self) -> tuple[str, str]:
        """Of the text as it is, and of all alike in line endings."""
        return self._exact.hexdigest(), self._alike.hexdigest()


def chunks(source: Source) -> Iterator[bytes]:
    """The bytes of a file between `source.start` and `source.stop`, decompressed, without a byte order mark.

    What stands before the place where a file breaks off is given before the error is raised.

    Raises:
        OSError: or another of `BROKEN`: the file cannot be read, or is not compressed as its name says.
    """
    with open_bytes(source.path) as raw:
        file = _decompressed(raw, source.compression)
        head = b""
        while len(head) < len(BOM) and (more := file.read1(CHUNK)):
            head += more
        skip, left = source.start, (source.stop or 1 << 62) - source.start
        content = head.removeprefix(BOM)
        if skip and not source.compression:
            file.seek(len(head) - len(content) + skip)
            skip, content = 0, file.read1(CHUNK)
        while content and left > 0:
            part = content[skip : skip + left]
            skip -= min(skip, len(content))
            left -= len(part)
            if part:
                yield part
            content = file.read1(CHUNK)


def lines(source: Source) -> Iterator[tuple[bytes, int]]:
    """The lines of a file, without their ends, and the position after each. The last one needs no end."""
    parts: list[bytes] = []  # of a line that may be longer than many chunks
    position = 0
    for chunk in chunks(source):
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for other in others:
            line = b"".join(parts)
            position += len(line) + 1
            yield line, position
            parts = [other]
    if last := b"".join(parts):
        yield last, position + len(last)


def _decompressed(raw: IO[bytes], compression: str) -> io.BufferedReader:
    file: object = raw
    if compression == ".gz":
        file = gzip.GzipFile(fileobj=raw)
    elif compression == ".bz2":
        file = io.BufferedReader(_StreamsInARow(raw, bz2.BZ2Decompressor), CHUNK)
    elif compression == ".xz":
        file = io.BufferedReader(_StreamsInARow(raw, lzma.LZMADecompressor), CHUNK)
    elif compression == ".zst":
        import pyarrow

        # zstandard's own reader takes a truncated file for a complete one; this one raises OSError.
        file = io.BufferedReader(_InSteps(pyarrow.input_stream(raw, compression="zstd")), CHUNK)
    return file  # type: ignore[return-value]  # all of them have read1


class _StreamsInARow(io.RawIOBase):
    """One compressed stream behind the other, and zeros between them; anything else behind one is an error.

    Python's own readers take a damaged stream, and all behind it, for garbage that they leave out in silence.
    """

    def __init__(self, raw: IO[bytes], new: type[bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> None:
        self._raw, self._new, self._stream = raw, new, new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401
        content = b""
        while not content:
            packed = b""
            if self._stream.eof:
                if not (packed := self._behind()):
                    return 0
                self._stream = self._new()
            elif self._stream.needs_input and not (packed := self._raw.read(_PACKED)):
                raise EOFError
            content = self._stream.decompress(packed, len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _behind(self) -> bytes:
        """What follows the stream that ended and the zeros behind it; empty at the end of the file."""
        packed = self._stream.unused_data.lstrip(b"\0")
        while not packed and (more := self._raw.read(_PACKED)):
            packed = more.lstrip(b"\0")
        return packed


class _InSteps(io.RawIOBase):
    """A stream that gives what it has read when it breaks off, to within a step, before it raises the error."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._error: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401
        if self._error is not None:
            raise self._error
        into, done = memoryview(buffer), 0
        try:
            while done < len(into) and (count := self._stream.readinto(into[done : done + _STEP])):  # type: ignore[attr-defined]
                done += count
        except BROKEN as error:
            if not done:
                raise
            self._error = error
        return done


class Contents:
    """Reads what files hold, and remembers it, so that a corpus is recognised later without reading it again.

    A file is trusted to be unchanged while its device, inode, size, and times of modification and of change are, and
    those lay some seconds back when it was read. What is remembered lies in the user's cache and may be deleted.

    Args:
        verify: read every file, whatever is remembered.
        on_bytes: called with the number of bytes just read.
    """

    def __init__(self, *, verify: bool = False, on_bytes: Callable[[int], None] | None = None) -> None:
        self._verify, self._on_bytes = verify, on_bytes
        self._read: dict[str, Content] = {}
        self._settled: list[str] = []
        self._memory: sqlite3.Connection | None = None
        with contextlib.suppress(OSError, RuntimeError, sqlite3.Error):  # without it, files are read again
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            self._memory = sqlite3.connect(folder / "files.sqlite", timeout=5, check_same_thread=False)
            self._memory.execute(  # another number when what is read or refused changes
                "CREATE TABLE IF NOT EXISTS contents_4 "
                "(stamp TEXT PRIMARY KEY, digest TEXT, identity TEXT, size INT, refused TEXT)"
            )

    def __enter__(self) -> Contents:
        return self

    def __exit__(self, *error: object) -> None:
        """Remembers what was read."""
        with contextlib.suppress(sqlite3.Error):
            if self._memory is not None:
                rows = [(stamp, *self._read[stamp]) for stamp in self._settled]
                with self._memory:
                    self._memory.executemany("INSERT OR REPLACE INTO contents_4 VALUES (?, ?, ?, ?, ?)", rows)
                self._memory.close()

    def of(self, source: Source) -> Content:
        """What a source holds.

        Raises:
            UserError: the file changes while it is read.
        """
        if source.kind == "hf":
            name = hashlib.sha256(source.stamp.encode()).hexdigest()
            return Content(name, name, 0)
        key = f"{source.kind}{source.compression} {source.stamp}"  # the kind decides what is refused
        if (known := self._known(key)) is not None:
            return known
        now = time.time_ns()
        content = self._read[key] = _examine(source, self._on_bytes)
        require_unchanged(source)
        if _settled(source, now):
            self._settled.append(key)
        return content

    def _known(self, key: str) -> Content | None:
        if key in self._read:
            return self._read[key]
        if self._memory is None or self._verify:
            return None
        with contextlib.suppress(sqlite3.Error):
            query = "SELECT digest, identity, size, refused FROM contents_4 WHERE stamp = ?"
            if row := self._memory.execute(query, [key]).fetchone():
                return Content(*row)
        return None


def require_unchanged(source: Source) -> None:
    """Makes sure that a file is what it was when the corpus was listed.

    Raises:
        UserError: it is not, or a network does not say.
    """
    try:
        same = source.kind == "hf" or current_stamp(source.path) == source.stamp
    except OSError as error:
        if is_url(source.path):
            raise UserError(str(error)) from None
        same = False
    if not same:
        raise UserError(
            f"{without_keys(source.path)} changed while it was read; try again when nobody writes to it"
        )


def _settled(source: Source, now: int) -> bool:
    """Whether what a file holds may be remembered by its stamp: a later change will have another one."""
    if is_url(source.path):
        return tells_changes(source.stamp)
    return max(map(int, source.stamp.split()[-2:])) < now - _SETTLED * 1e9


def _examine(source: Source, on_bytes: Callable[[int], None] | None) -> Content:
    local = not is_url(source.path)
    if local and (pointer := lfs_pointer(Path(source.path))):  # whatever it should be, compressed or not
        name = sha256(Path(source.path))
        return Content(name, name, source.size, pointer)
    text, mender, size, refused = _ContentHash(), Mender(), 0, ""
    try:
        for chunk in _whole(source) if source.kind == ".parquet" else chunks(source):
            if refused := _foreign(source, chunk, size):
                break
            if local and not source.compression and size > source.size:
                break  # somebody goes on writing; see `require_unchanged`
            if source.kind == ".parquet":
                text.add_bytes(chunk)
            else:
                text.add(mender.decode(chunk))
            size += len(chunk)
            if on_bytes:
                on_bytes(len(chunk))
        text.add(mender.decode(b"", final=True), final=True)
    except UserError:  # of a network: what was lost is no damage to be remembered
        raise
    except BROKEN as error:  # reading it for its documents will report this; it is the same as no other file
        place = os.path.abspath(source.path) if local else source.path
        text.add_bytes(f"\0{place}: {error}".encode("utf-8", "replace"))
    if source.kind in TEXT and not refused:
        refused = _no_text(mender.invalid / size if size else 0.0)
    return Content(*text.digests(), size, refused)


def _whole(source: Source) -> Iterator[bytes]:
    with open_bytes(source.path) as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _foreign(source: Source, chunk: bytes, before: int) -> str:
    """Why the bytes that follow `before` others show that a file is no text in UTF-8; empty when they do not."""
    if source.kind == ".parquet":
        return ""
    if not before and (why := foreign_encoding(chunk)):
        return why
    # A line of records that was damaged is told on its own.
    if source.kind in TEXT or (not before and chunk.count(0) > len(chunk) // 10):
        return nul_byte(chunk, before)
    return ""


def _no_text(share: float) -> str:
    """Why a file of which so much is not UTF-8 is no text; empty when it may be."""
    if share <= _MOST_INVALID:
        return ""
    return f"{share:.0%} of its bytes are not UTF-8 (another encoding, or no text); save it as UTF-8"
