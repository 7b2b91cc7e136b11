"""File storage for sessions and states: a directory or a bucket (any fsspec URL), by name, each file whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from retnet.errors import UserError, told
from retnet.io import flush, move, require_writable_folder

FEW = 2  # files that are asked for one by one
_NAME = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z_.-]*")
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_creating = threading.Lock()


class Storage(ABC):
    """Files by name, such as "key" or "folder/key", in one place; each is there whole or not at all.

    Names are letters, digits, "_", "-" and ".", and do not begin with a dot.

    Attributes:
        url: of the place.
    """

    url: str

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A file's content; None when there is none.

        Raises:
            OSError: it cannot be read.
        """

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Makes or replaces a file: readers see the old content or the new.

        Raises:
            OSError: it cannot be written.
        """

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Makes a file that is not there; False when it is. Of several who try at once, one succeeds.

        Raises:
            OSError: it cannot be written.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file, if it is there.

        Raises:
            OSError: it cannot be removed.
        """

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Names of the files and folders right in a folder, as it is now, sorted; none when there is no such folder.

        Raises:
            OSError: it cannot be read.
        """

    @abstractmethod
    def among(self, names: Sequence[str]) -> set[str]:
        """Which of these files are there.

        Raises:
            OSError: nobody can tell.
        """

    @abstractmethod
    def sweep(self, keep: Collection[str], seconds: float, folder: str = "") -> int:
        """Removes files right in a folder that are not in `keep` and are older than so many seconds; says how many.

        What a killed writer left half written goes too.

        Raises:
            OSError: the folder cannot be read.
        """


def open_storage(url: str | Path) -> Storage:
    """The storage at a directory, which is made if need be, or at a URL such as ``s3://bucket/sessions``.

    Raises:
        UserError: a directory that cannot be made, or a URL that nothing installed can open.
    """
    text = str(url)
    if "://" not in text or text.startswith("file://"):
        return DirectoryStorage(Path(text.removeprefix("file://")))
    return BucketStorage(text)


class DirectoryStorage(Storage):
    """Storage in a directory of this machine, or of a network filesystem: files are linked into place when they are whole.

    Args:
        path: of the directory; made when it is missing.

    Raises:
        UserError: it cannot be made, or nothing can be written there.
    """

    def __init__(self, path: Path) -> None:
        self.url, self._path = str(path), path
        with told(f"write the directory {path}"):
            path.mkdir(parents=True, exist_ok=True)
            require_writable_folder(path)

    def read(self, name: str) -> bytes | None:
        """See `Storage.read`."""
        try:
            return self._file(name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """See `Storage.write`."""
        with self._partial(name, content) as partial:
            move(partial, self._file(name))

    def create(self, name: str, content: bytes) -> bool:
        """See `Storage.create`."""
        file = self._file(name)
        with self._partial(name, content) as partial:
            try:
                os.link(partial, file)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return _create_in_place(file, content)
            flush(file.parent)
        return True

    def remove(self, name: str) -> None:
        """See `Storage.remove`; a folder that is empty then goes too."""
        file = self._file(name)
        file.unlink(missing_ok=True)
        if file.parent != self._path:
            with suppress(OSError):  # others are in it
                file.parent.rmdir()

    def names(self, folder: str = "") -> list[str]:
        """See `Storage.names`."""
        try:
            return sorted(name for name in os.listdir(self._folder(folder)) if not name.startswith("."))
        except FileNotFoundError:
            return []

    def among(self, names: Sequence[str]) -> set[str]:
        """See `Storage.among`."""
        return {name for name in names if self._file(name).exists()}

    def sweep(self, keep: Collection[str], seconds: float, folder: str = "") -> int:
        """See `Storage.sweep`."""
        swept = 0
        with os.scandir(self._folder(folder)) as entries:
            for entry in entries:
                leftover = entry.name.startswith(".") and entry.name.endswith(".partial")
                if not leftover and (entry.name in keep or entry.name.startswith(".")):
                    continue
                with suppress(FileNotFoundError):  # another swept it
                    if entry.is_file() and time.time() - entry.stat().st_mtime >= seconds:
                        os.unlink(entry.path)
                        swept += 1
        if folder:
            with suppress(OSError):  # something is in it
                self._folder(folder).rmdir()
        return swept

    @contextmanager
    def _partial(self, name: str, content: bytes) -> Iterator[Path]:
        """The content on disk, under a name that nobody else has and that is gone afterwards."""
        file = self._file(name)
        partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.partial")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
            yield partial
        finally:
            partial.unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self._path.joinpath(*_checked(name))

    def _folder(self, folder: str) -> Path:
        return self._file(folder) if folder else self._path


class BucketStorage(Storage):
    """Storage at an fsspec URL. An object store shows an object when it is whole; other filesystems may show a part.

    `create` is as safe as the filesystem's own "create" mode: one conditional request on S3 (If-None-Match), Google Cloud
    Storage and Azure. Where fsspec looks first and writes then, two processes that try in the same instant may both succeed;
    threads of one process never do.

    Args:
        url: as fsspec has it; credentials come from where its filesystem looks for them.

    Raises:
        UserError: nothing installed can open it.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except Exception as error:  # each filesystem has its own
            raise UserError(f"cannot open {url}: {' '.join(str(error).split())[:300]}") from error
        self._root = root.rstrip("/")

    def read(self, name: str) -> bytes | None:
        """See `Storage.read`."""
        path = self._path(name)
        with self._told(name):
            try:
                return bytes(self._fs.cat_file(path))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """See `Storage.write`."""
        path = self._path(name)
        with self._told(name):
            self._fs.pipe_file(path, content)

    def create(self, name: str, content: bytes) -> bool:
        """See `Storage.create`."""
        path = self._path(name)
        try:
            with self._told(name), _creating:
                self._fs.pipe_file(path, content, mode="create")
        except OSError:
            # It may be there, or a request was made twice and the first one, whose answer was lost, has made it.
            found = self.read(name)
            if found is None:
                raise
            return found == content
        return True

    def remove(self, name: str) -> None:
        """See `Storage.remove`."""
        path = self._path(name)
        with self._told(name), suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def names(self, folder: str = "") -> list[str]:
        """See `Storage.names`."""
        return sorted(self._listed(folder))

    def among(self, names: Sequence[str]) -> set[str]:
        """See `Storage.among`; one request a file, or for many one that lists their folder."""
        if len(names) <= FEW:
            with self._told(""):
                return {name for name in names if self._fs.exists(self._path(name))}
        folders = {name.rpartition("/")[0] for name in names}
        found = {f"{folder}/{name}".lstrip("/") for folder in folders for name in self._listed(folder)}
        return found.intersection(names)

    def sweep(self, keep: Collection[str], seconds: float, folder: str = "") -> int:
        """See `Storage.sweep`."""
        swept = 0
        for name, path in self._listed(folder).items():
            if name in keep:
                continue
            with self._told(name), suppress(FileNotFoundError, IsADirectoryError):
                if self._fs.isfile(path) and time.time() - self._fs.modified(path).timestamp() >= seconds:
                    self._fs.rm_file(path)
                    swept += 1
        return swept

    def _listed(self, folder: str) -> dict[str, str]:
        path = self._path(folder) if folder else self._root
        self._fs.invalidate_cache()  # what others have made counts
        with self._told(folder):
            try:
                found = self._fs.ls(path, detail=False)
            except FileNotFoundError:
                return {}
        return {place.rstrip("/").rsplit("/", 1)[-1]: place for place in found if place.rstrip("/") != path}

    def _path(self, name: str) -> str:
        return "/".join([self._root, *_checked(name)])

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Every error is one of files."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # each filesystem has its own
            words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise OSError(errno.EIO, words, f"{self.url}/{name}") from error


def _create_in_place(file: Path, content: bytes) -> bool:
    """`DirectoryStorage.create` on a filesystem without links, where a reader may see a part."""
    try:
        with file.open("xb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
    except FileExistsError:
        return False
    return True


def _checked(name: str) -> list[str]:
    parts = name.split("/")
    if not all(map(_NAME.fullmatch, parts)):
        raise ValueError(f"{name!r} is no name of a file here")
    return parts
