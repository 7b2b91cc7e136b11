"""Files at fsspec URLs (``s3://``, ``https://``, ``hf://``, ``memory://``, …): listed, stamped, opened as local ones.

Which protocols there are is fsspec's business: a library for each (s3fs, gcsfs, adlfs, …), and its own settings for keys.
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from typing import IO, Any, NamedTuple

from retnet.errors import UserError, printable

BUFFER = 1 << 20  # bytes asked for at a time
_OF_THE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
_SIZE = "size"
# What tells one content of a file from another, as file systems name it, in lower case without signs. The first that there
# is counts, since a listing may say less than a question for one file.
_TELLING: tuple[str, ...] = (
    "etag",
    "blobid",
    "contentmd5",
    "md5hash",
    "md5",
    "checksum",
    "digest",
    "generation",
    "versionid",
)
_TELLING += ("lastmodified", "modified", "mtime", "created")
_KEYS = re.compile(r"(\w://)([^\s/?'\"@]*@)?([^\s?'\"]*)(\?[^\s'\"]*)?")


class RemoteFile(NamedTuple):
    """A file at a URL.

    Attributes:
        url: of it.
        name: below its corpus.
        size: in bytes; 0 where nobody says.
        stamp: changes when it is written.
    """

    url: str
    name: str
    size: int
    stamp: str


def is_url(spec: str) -> bool:
    """Whether a corpus or a path is a URL, and no local file that is called so."""
    return "://" in spec and not os.path.lexists(spec)


def without_keys(text: str) -> str:
    """A text to be shown or stored, in which URLs have no user, no password and no query, where signatures stand."""
    return _KEYS.sub(lambda f: f"{f[1]}{'…@' if f[2] else ''}{f[3]}{'?…' if f[4] else ''}", text)


def open_bytes(path: str) -> IO[bytes]:
    """A local file or one at a URL, to read.

    Raises:
        OSError: nobody may open a local file, or it is none.
        UserError: one at a URL cannot be opened or read, or a disk fails; what was lost so is not left out of a corpus.
    """
    try:
        return io.BufferedReader(_Remote(path) if is_url(path) else _Local(path), BUFFER)
    except OSError as error:
        if error.errno in _OF_THE_FILE:
            raise
        raise UserError(_failed(path, error)) from None


def files(spec: str) -> Iterator[RemoteFile]:
    """The files that a URL names: itself, those of a folder, or those that fit a pattern with ``*``; sorted by name.

    Raises:
        UserError: nothing is there, or it cannot be reached.
    """
    system, root = _system(spec)
    shown = repr(without_keys(spec))
    try:
        system.invalidate_cache()
        if "*" in root or "[" in root:
            found = system.glob(root, detail=True)
            start = root[: min(root.find(sign) for sign in "*[" if sign in root)]
            start = start[: start.rfind("/") + 1]
        else:
            info = system.info(root)
            folder = info["type"] == "directory"
            found = system.find(root, detail=True) if folder else {root: info}
            start = f"{root.rstrip('/')}/" if folder else root[: root.rfind("/") + 1]
    except Exception as error:  # every file system has errors of its own
        raise UserError(f"no corpus {shown}: {_said(error)}") from None
    if not found:
        raise UserError(f"no corpus {shown}: nothing is there")
    for path, info in sorted(found.items()):
        if info["type"] != "directory":
            url = system.unstrip_protocol(path)
            name = path.removeprefix(start).partition("?")[0]
            yield RemoteFile(url, name, *_size_and_stamp(system, path, url, info))


def stamp(url: str) -> str:
    """What changes when a file is written.

    Raises:
        OSError: it is gone, or cannot be reached.
    """
    system, path = _system(url)
    system.invalidate_cache()
    try:
        return _stamp(url, system.info(path))
    except Exception as error:
        raise OSError(_cannot(url, error)) from None


def tells_changes(stamp: str) -> bool:
    """Whether a stamp has more than a size, which another content may have too."""
    return "=" in stamp.rpartition("\n")[2]


def _size_and_stamp(system: Any, path: str, url: str, listed: Mapping[str, Any]) -> tuple[int, str]:  # noqa: ANN401
    """Of a file in a listing; where that tells no changes, as a page of links, the file is asked for, as `stamp` asks."""
    if not tells_changes(_stamp(url, listed)):
        try:
            listed = system.info(path)
        except Exception as error:
            raise UserError(_cannot(url, error)) from None
    return int(listed.get(_SIZE) or 0), _stamp(url, listed)


class _Local(io.FileIO):
    """A local file; a disk that fails while it is read is no damage of it."""

    def readinto(self, buffer: Any) -> int | None:  # noqa: ANN401
        try:
            return super().readinto(buffer)
        except OSError as error:
            raise UserError(_failed(os.fspath(self.name), error)) from None


class _Remote(io.RawIOBase):
    """A file at a URL with a position of its own: file systems in memory have one for all readers of a file."""

    def __init__(self, url: str) -> None:
        self._url, self._at = url, 0
        system, path = _system(url)
        try:
            self._file = system.open(path, "rb")
            self._size = int(getattr(self._file, "size", None) or system.info(path).get(_SIZE) or 0)
        except Exception as error:
            raise UserError(_cannot(url, error)) from None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401
        try:
            self._file.seek(self._at)
            content = self._file.read(len(buffer))
        except Exception as error:
            raise UserError(_cannot(self._url, error)) from None
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        if not self.closed:
            with suppress(Exception):
                self._file.close()
        super().close()


def _system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and what it calls the file."""
    from fsspec.core import url_to_fs

    if "::" in url:
        raise UserError(
            f"no corpus {without_keys(url)!r}: URLs within URLs (::) are not read; unpack the archive, and name its files"
        )
    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        # "Install s3fs to access S3"
        raise UserError(f"cannot read {without_keys(url)}: {error}") from None
    except Exception as error:
        why = without_keys(" ".join(str(error).split()))
        raise UserError(f"no corpus {without_keys(url)!r}: {why}") from None
    return system, path


def _stamp(url: str, info: Mapping[str, Any]) -> str:
    told = {"".join(filter(str.isalnum, name)).lower(): value for name, value in info.items()}
    name = next((name for name in _TELLING if told.get(name)), "")
    value = told.get(name)
    value = value.timestamp() if isinstance(value, datetime) else value  # listings and answers differ in form
    first = f"{name}={value}" if name else ""
    return f"{url}\n{told.get(_SIZE)} {first}"


def _failed(path: str, error: OSError) -> str:
    return f"cannot read {printable(path)}: {error.strerror}; try again, or take the file out of the corpus"


def _cannot(url: str, error: Exception) -> str:
    return f"cannot read {without_keys(url)}: {_said(error)}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {without_keys(' '.join(str(error).split())) or 'it cannot be reached'}"
