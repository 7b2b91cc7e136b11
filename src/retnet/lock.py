"""File lock of a directory (a run, a study, a GPU day): one owner, and it dies with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from retnet.errors import UserError, told

LOCK = "run.lock"
_TIME = "%Y-%m-%d %H:%M:%S"
_FLOCK = "hhqqi0q"  # struct flock of Linux on 64 bits: type, whence, start, length, process
_ASKED = sys.platform == "linux" and sys.maxsize > 1 << 32  # elsewhere the struct is another one
_log = logging.getLogger("retnet.lock")


class _Held(NamedTuple):
    """What this process has: since when, and which directory and lock file these were, whatever their names become."""

    since: str
    directory: tuple[int, int]
    file: tuple[int, int]


# By this process. Record locks do not keep a process out that has them, and reading the lock file would give the lock
# away: closing any handle of a file drops all of a process's locks on it.
_held: dict[Path, _Held] = {}
_taking = threading.Lock()  # one thread at a time


def _forget() -> None:
    """In the child of a fork, which has none of its parent's locks."""
    global _taking
    _held.clear()
    _taking = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def sole_owner(directory: Path, what: str = "run", option: str = "--run-dir") -> Iterator[None]:
    """Holds a directory, which is made if need be, for this process; while it lasts, others are refused.

    The lock is a POSIX record lock: the system drops it when the process dies, however it dies, NFS knows it, and children
    that are forked meanwhile do not inherit it (`flock`, and libraries on it, live on in a worker that outlives its parent).
    Where a file system has no locks, that is said in the log.

    Args:
        directory: to be held.
        what: it is of, in messages.
        option: that chooses another one, in messages.

    Raises:
        UserError: another process holds it, here or on another machine; or the directory cannot be written.
    """
    path, owner = directory / LOCK, os.getpid()
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        with told(f"write the {what} directory {directory}"), _taking:
            directory.mkdir(parents=True, exist_ok=True)
            where = path.resolve()
            file = _locked(path, where, option)
            _held[where] = _Held(time.strftime(_TIME), _identity(directory), _identity(file.fileno()))
    except UserError:
        _tidy(made)
        raise
    held = _held[where]
    try:
        yield
    finally:
        if os.getpid() == owner:  # not in a child that was forked meanwhile
            _held.pop(where, None)
            with suppress(OSError):  # whoever removed the directory has removed this too
                if _identity(path) == held.file:
                    path.unlink()
            file.close()
            _tidy(made)


def lost(directory: Path) -> bool:
    """Whether a directory that this process holds has been replaced by another one, or is held by others too.

    It has been moved, say, and something else is at its old place now; or somebody has removed the lock file, which let
    another process in.
    """
    held = _held.get((directory / LOCK).resolve())
    if held is None:
        return False
    try:
        return _identity(directory) != held.directory or _identity(directory / LOCK) != held.file
    except FileNotFoundError:  # nobody else is there
        return False


def holder(directory: Path) -> str:
    """Which process holds a directory, such as ``"process 7 on node1 since …"``; empty if none does. Takes no lock."""
    path = directory / LOCK
    if (held := _held.get(path.resolve())) is not None:
        return _named(_owner(held.since))
    if not _ASKED:
        owner = _read(path)
        return _named(owner) if owner and _may_live(owner) else ""
    try:
        with path.open("rb") as file:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            (kind, *_) = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
            owner = _parsed(file.read().decode("utf-8", errors="replace"))
    except FileNotFoundError:
        return ""
    except OSError:  # no locks here, or not to be read: what the file says is all there is
        owner, kind = _read(path), fcntl.F_WRLCK
    if kind == fcntl.F_UNLCK:
        return ""
    return _named(owner) if owner else "another process"


def _may_live(owner: dict[str, Any]) -> bool:
    """Whether the process that a lock file names is there, as far as this machine can tell."""
    if owner["host"] != socket.gethostname():
        return True
    try:
        os.kill(owner["process"], 0)
    except (ProcessLookupError, TypeError, OverflowError):
        return False
    except OSError:  # it is another user's
        pass
    return True


def _identity(file: Path | int) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_dev, status.st_ino


def _tidy(made: Sequence[Path]) -> None:
    """Removes directories in which nothing was begun."""
    with suppress(OSError):
        for folder in made:
            folder.rmdir()


def _locked(path: Path, where: Path, option: str) -> IO[str]:
    """The lock file, open, locked and saying whose it is."""
    while True:
        if (held := _held.get(where)) is not None:
            raise UserError(_in_use(path, _owner(held.since), option))
        file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                message = _in_use(path, _read(path), option)
                file.close()
                raise UserError(message) from None
            _log.warning(
                "%s cannot be locked (%s); see to it that only one process works there", path, error.strerror
            )
        try:
            current = _identity(file.fileno()) == _identity(path)
        except FileNotFoundError:  # the owner before took its file along while this one waited
            current = False
        if current:
            break
        file.close()
    _say_whose_it_was(file, path)
    try:
        file.truncate(0)
        json.dump(_owner(time.strftime(_TIME)), file)
        file.flush()
    except OSError:
        path.unlink()
        with suppress(OSError):  # what was not written before is not written now either
            file.close()
        raise
    return file


def _say_whose_it_was(file: IO[str], path: Path) -> None:
    """Warns where the lock of another machine's process could be had though its file is there.

    The process did not end in order: it died, or it lives, and this file system does not share locks between machines.
    """
    file.seek(0)
    owner = _parsed(file.read())
    if owner and owner["host"] != socket.gethostname():
        _log.warning(
            "%s was left by %s, which has died, or lives where this file system shares no locks; make sure it has died",
            path,
            _named(owner),
        )


def _owner(since: str) -> dict[str, Any]:
    return {"process": os.getpid(), "host": socket.gethostname(), "since": since}


def _read(path: Path) -> dict[str, Any]:
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _parsed(text: str) -> dict[str, Any]:
    """The owner that a lock file names; nothing where it is empty, cut, or not ours."""
    try:
        owner = dict(json.loads(text))
    except (ValueError, TypeError):
        return {}
    return owner if owner.keys() >= {"process", "host", "since"} else {}


def _named(owner: dict[str, Any]) -> str:
    return "process {process} on {host} since {since}".format(**owner)


def _in_use(path: Path, owner: dict[str, Any], option: str) -> str:
    by = _named(owner) if owner else "another process"
    return f"{path.parent} is in use by {by}; wait for it, stop it, or choose another {option}"
