"""File input and output: reading of text, atomic writing (never half a file), SHA-256.

What cannot be written raises OSError with the name of the file, for `retnet.errors.told` to say what it was for.

Text is UTF-8. A byte order mark (BOM) at its beginning is no part of it; UTF-16, UTF-32 and anything with NUL bytes is
refused instead of being taken for text.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from retnet.errors import UserError, dangling, told

BOM = codecs.BOM_UTF8
_HEAD = 1 << 16  # bytes that are looked at before the others are read
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # what a pointer begins with
LFS_ADVICE = "it is a Git LFS pointer, not the file itself; `git lfs pull` in its repository fetches that"
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_FOREIGN_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_text(path: str | Path, name: str | None = None) -> str:
    """The text of a file, whole.

    Args:
        path: of a file, or of something else that ends, such as ``/dev/stdin``.
        name: what error messages call it; the path itself when left out.

    Raises:
        UserError: it cannot be read, or is not text in UTF-8.
    """
    name = name or str(path)
    try:
        with Path(path).open("rb") as file:
            return read_stream(file, name)
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}{dangling(path)}") from None


def read_stream(stream: BinaryIO, name: str) -> str:
    """The text of a stream, to its end; refused at once where it begins with what is no text, as endless devices do.

    Args:
        stream: of bytes.
        name: what error messages call it.

    Raises:
        UserError: it is not text in UTF-8.
        OSError: it cannot be read.
    """
    head = stream.read(_HEAD)
    _require_no_binary(head, name)
    return decode(head + stream.read(), name)


def expanded(path: str) -> str:
    """A path whose leading ``~`` or ``~user`` is replaced by that home.

    Raises:
        UserError: nobody knows that home.
    """
    found = os.path.expanduser(path)
    if path.startswith("~") and found == path:
        user = path.partition("/")[0]
        raise UserError(f"{path}: no home is known for {user}; a file that is called so is written ./{user}")
    return found


def decode(content: bytes, name: str) -> str:
    """Bytes as text, without a byte order mark at the beginning.

    Args:
        content: the bytes.
        name: what error messages call them.

    Raises:
        UserError: they are not text in UTF-8.
    """
    _require_no_binary(content, name)
    try:
        return content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start + len(content) - len(error.object)
        line = content.count(b"\n", 0, at) + 1
        raise UserError(
            f"{name} is not UTF-8 text: byte {at} (in line {line}) is 0x{content[at]:02x}; save it as UTF-8"
        ) from None


def _require_no_binary(content: bytes, name: str) -> None:
    if why := foreign_encoding(content) or nul_byte(content):
        raise UserError(f"{name} is not UTF-8 text: {why}")


def foreign_encoding(head: bytes) -> str:
    """Why bytes that begin like this are not UTF-8, from their byte order mark; empty when they may be."""
    for mark, encoding in _FOREIGN_MARKS:
        if head.startswith(mark):
            return f"it begins with the byte order mark of {encoding}; save it as UTF-8"
    return ""


def nul_byte(content: bytes, before: int = 0) -> str:
    """Why bytes with a NUL among them are no text; empty when there is none.

    Args:
        content: the bytes.
        before: how many bytes stand before these, for the message.
    """
    at = content.find(b"\0")
    if at < 0:
        return ""
    head = content[:4096]
    even, odd = head[0::2].count(0), head[1::2].count(0)
    # of Latin letters, one half is 0
    if max(even, odd) > len(head) // 8 and min(even, odd) <= max(even, odd) // 8:
        return "it looks like UTF-16 without a byte order mark; save it as UTF-8"
    return f"byte {before + at} is NUL"


def lfs_pointer(path: Path) -> str:
    """Why a file is not what its name says, when it is what Git leaves in place of a large file; else empty."""
    try:
        if path.stat().st_size >= 1024:  # no pointer is so long
            return ""
        with path.open("rb") as file:
            return LFS_ADVICE if file.read(len(LFS_POINTER)) == LFS_POINTER else ""
    except OSError:
        return ""


def require_fetched(path: Path) -> None:
    """Refuses what Git leaves in place of a large file.

    Raises:
        UserError: it is a Git LFS pointer.
    """
    if why := lfs_pointer(path):
        raise UserError(f"cannot read {path}: {why}")


def not_a_file(mode: int) -> str:
    """What something that is neither file nor folder is called, from its `os.stat_result.st_mode`; empty for a file."""
    kinds = (
        (stat.S_ISREG, ""),
        (stat.S_ISFIFO, "pipe"),
        (stat.S_ISSOCK, "socket"),
        (stat.S_ISDIR, "folder"),
    )
    return next((name for test, name in kinds if test(mode)), "device")


def cache_folder() -> Path:
    """Where this user's caches lie: ``$RETNET_CACHE``, ``$XDG_CACHE_HOME/retnet``, or ``~/.cache/retnet``.

    It need not be there.

    Raises:
        RuntimeError: nobody knows where the user's home is.
    """
    if own := os.environ.get("RETNET_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retnet"


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replaces a text file in one step; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a record, completely or not at all; numbers that JSON has no word for (NaN, infinities) become null.

    Raises:
        UserError: it cannot be written.
    """
    with told(f"write {path}"):
        write_text(path, json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file in one step: readers see the old content or the new, whenever the machine stops.

    A link stays one, and what is no file, such as ``/dev/stdout``, is written to as it is.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.partial")
    try:
        if _is_device(path):
            path.write_bytes(content)
            return
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        move(partial, target)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def _is_device(path: Path) -> bool:
    """Whether a path is nothing that could be replaced, such as a pipe, or ``/dev/stdout``, whatever that leads to."""
    place = os.path.abspath(path).startswith(("/dev/", "/proc/"))
    return path.exists() and (place or not (path.is_file() or path.is_dir()))


def require_writable(path: Path) -> None:
    """Says before any work is done that a file could not be written.

    Raises:
        UserError: it is a folder, or lies in one that is not there or cannot be written.
    """
    folder = Path(os.path.realpath(path)).parent
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
    if not folder.is_dir() and not _is_device(path):
        raise UserError(f"cannot write {path}: there is no folder {folder}")
    if not _is_device(path):
        with told(f"write {path}"):
            require_writable_folder(folder)


def require_writable_folder(folder: Path) -> None:
    """Makes a file of one byte in a folder, and removes it.

    Raises:
        OSError: that cannot be done.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", buffering=0) as file:
            file.write(b"\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def move(finished: Path, path: Path) -> None:
    """Gives a file that is on the disk its name, and waits until the name is there too."""
    finished.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Sees to it that a file or directory has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
