"""File lock of a run directory: one owner, and it dies with the process that holds it."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from retnet.errors import UserError, told

try:
    import fcntl
except ImportError:  # Windows has no record locks
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"
_TIME = "%Y-%m-%d %H:%M:%S"
_log = logging.getLogger("retnet.train")
# By this process, and since when. Record locks do not keep a process out that has them, and reading the lock file would
# give the lock away: closing any handle of a file drops all of a process's locks on it.
_held: dict[Path, str] = {}


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
    path = directory / LOCK
    made = [directory, *(parent for parent in directory.parents if not parent.exists())]
    try:
        with told(f"write the {what} directory {directory}"):
            directory.mkdir(parents=True, exist_ok=True)
            file = _locked(path, option)
            where = path.resolve()
    except UserError:
        _tidy(made)
        raise
    _held[where] = time.strftime(_TIME)
    try:
        yield
    finally:
        _held.pop(where, None)
        with suppress(OSError):  # whoever removed the directory has removed this too
            path.unlink()
        file.close()
        _tidy(made)


def _tidy(made: Sequence[Path]) -> None:
    """Removes directories in which nothing was begun."""
    with suppress(OSError):
        for folder in made:
            folder.rmdir()


def _locked(path: Path, option: str) -> IO[str]:
    """The lock file, open, locked and saying whose it is."""
    while True:
        if (since := _held.get(path.resolve())) is not None:
            raise UserError(_in_use(path, _owner(since), option))
        file = path.open("a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                message = _in_use(path, _read(path), option)
                file.close()
                raise UserError(message) from None
            _log.warning(
                "%s cannot be locked (%s); see to it that only one process trains there", path, error.strerror
            )
        try:
            current = os.fstat(file.fileno()).st_ino == path.stat().st_ino
        except FileNotFoundError:  # the owner before took its file along while this one waited
            current = False
        if current:
            break
        file.close()
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


def _owner(since: str) -> dict[str, Any]:
    return {"process": os.getpid(), "host": socket.gethostname(), "since": since}


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _in_use(path: Path, owner: dict[str, Any], option: str) -> str:
    by = "process {process} on {host} since {since}".format(**owner) if owner else "another process"
    return f"{path.parent} is in use by {by}; wait for it, stop it, or choose another {option}"
