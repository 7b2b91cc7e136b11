"""Versioned records in files: compare-and-swap by generation numbers, so that replicas of a server lose no update.

They lie in a `Storage`, a directory or a bucket that all replicas share.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from contextlib import suppress
from typing import NamedTuple

from retnet.engine.storage import Storage
from retnet.errors import UserError

KEPT = 4  # generations of a record, at least
SECONDS = 60.0  # that others are kept
EVERY = 8  # generations, they are looked for
_log = logging.getLogger("retnet.engine")


class ConflictError(UserError):
    """Another process has changed or removed a record meanwhile."""


class Versioned(NamedTuple):
    """A record as it was found."""

    content: bytes
    generation: int


class VersionedFiles:
    """Records that several processes change: a change is refused when another has come in between (compare-and-swap).

    Generation g of record NAME is the file NAME/g, and is never written to again: whoever saves generation g + 1 first has
    changed the record, the others learn of it. So it needs no lock and no clock, and a process that dies holds nobody up.
    This holds where `Storage.create` does, and for a process that stands still for less than `SECONDS` between looking and
    creating. A record that is damaged is passed over for the generation before.

    Args:
        storage: where.
        folder: in it; empty is the storage itself.
    """

    def __init__(self, storage: Storage, folder: str = "") -> None:
        self._storage, self._folder = storage, folder

    def names(self) -> list[str]:
        """Of all records, removed ones that nobody has swept included.

        Raises:
            OSError: they cannot be listed.
        """
        return self._storage.names(self._folder)

    def generation(self, name: str) -> int:
        """The last generation of a record; 0 when there is none. Costs no more than looking.

        Raises:
            OSError: it cannot be read.
        """
        return max(self._generations(name), default=0)

    def load(self, name: str) -> Versioned | None:
        """The last generation that is sound; None when there is none, or the record was removed.

        Raises:
            OSError: it cannot be read.
        """
        for generation in sorted(self._generations(name), reverse=True):
            content = _unsealed(self._storage.read(self._file(name, generation)))
            if content is None:
                _log.warning("generation %d of %s/%s is damaged", generation, self._storage.url, name)
                continue
            return Versioned(content, generation) if content else None
        return None

    def save(self, name: str, content: bytes, after: int) -> int:
        """Writes the next generation of a record, and says which.

        Args:
            name: of the record.
            content: of it, not empty.
            after: the generation that was changed; 0 for a new record.

        Raises:
            ConflictError: that is no longer the last one.
            OSError: it cannot be written.
        """
        if not content:
            raise ValueError("a record must not be empty")
        return self._publish(name, content, after)

    def remove(self, name: str, after: int) -> None:
        """Removes a record of this generation.

        Raises:
            ConflictError: it is no longer the last one.
            OSError: it cannot be removed.
        """
        last = self._publish(name, b"", after)  # says to others that it is gone
        for generation in self._generations(name):
            if generation < last:
                self._storage.remove(self._file(name, generation))

    def sweep(self, seconds: float) -> int:
        """Removes what is left of records that were removed so many seconds ago; says how many.

        Raises:
            OSError: they cannot be read.
        """
        swept = 0
        for name in self.names():
            found = self._generations(name)
            if len(found) == 1 and _unsealed(self._storage.read(self._file(name, found[0]))) == b"":
                swept += self._storage.sweep((), seconds, self._file(name))
        return swept

    def _publish(self, name: str, content: bytes, after: int) -> int:
        newer = [generation for generation in self._generations(name) if generation >= after]
        sound = [
            generation
            for generation in newer
            if generation > after and _unsealed(self._storage.read(self._file(name, generation))) is not None
        ]
        last = max(newer, default=0)
        if (
            sound
            or (after and not newer)
            or not self._storage.create(self._file(name, last + 1), _sealed(content))
        ):
            raise ConflictError(f"{name} was changed by another process meanwhile; load it again")
        if (last + 1) % EVERY == 0:
            keep = {f"{generation:010}" for generation in range(last + 2 - KEPT, last + 2)}
            with suppress(OSError):  # the next one tries again
                self._storage.sweep(keep, SECONDS, self._file(name))
        return last + 1

    def _generations(self, name: str) -> list[int]:
        return [int(found) for found in self._storage.names(self._file(name)) if found.isdecimal()]

    def _file(self, name: str, generation: int | None = None) -> str:
        parts = [self._folder, name, "" if generation is None else f"{generation:010}"]
        return "/".join(filter(None, parts))


def _sealed(content: bytes) -> bytes:
    """A record's content behind its hash, and behind a number that tells it from any other of the same content."""
    unique = uuid.uuid4().bytes + content
    return hashlib.sha256(unique).digest() + unique


def _unsealed(sealed: bytes | None) -> bytes | None:
    """What `_sealed` was given; None when it is damaged."""
    if sealed is None or len(sealed) < 48 or hashlib.sha256(sealed[32:]).digest() != sealed[:32]:
        return None
    return sealed[48:]
