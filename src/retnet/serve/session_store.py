"""Sessions of clients: whose they are, what may be done with them now, and their records on disk."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from retnet.engine import Completion, Engine, Session
from retnet.io import write_bytes
from retnet.serve.engine_thread import EngineThread
from retnet.serve.errors import ApiError
from retnet.settings import UserError

Result = TypeVar("Result")

FORMAT = 1  # of records
STATES = "states"  # the folder of states, within that of sessions
_log = logging.getLogger("retnet.serve")


class SessionRecord(msgspec.Struct):
    """A session on disk: its tokens, for states only spare reading.

    Attributes:
        format: of this record.
        model: fingerprint of the model.
        tokenizer: fingerprint of the tokenizer.
        id: of the session.
        owner: of which key it is, by a name that says nothing about it.
        created: seconds since 1970.
        tokens: all of them.
        marks: where something was appended.
    """

    format: int
    model: str
    tokenizer: str
    id: str
    owner: str
    created: int
    tokens: list[int]
    marks: list[int]


class SessionEntry:
    """A session of a client.

    Attributes:
        session: the engine's; touched in its thread alone.
        owner: whose it is.
        created: seconds since 1970.
        busy: whether something is done with it now.
        position: tokens.
        marks: where something was appended.
    """

    def __init__(self, session: Session, owner: str, created: int) -> None:
        self.session, self.owner, self.created, self.busy = session, owner, created, False
        self.position, self.marks = len(session.tokens), list(session.marks)

    @property
    def id(self) -> str:
        """The session's name."""
        return self.session.name


class SessionStore:
    """All sessions. Each belongs to the key it was made with, and for others it is not there.

    With a directory, a session's tokens are written after every change, whole or not at all, so that a server that is
    killed has them all when it starts again; its states are written by `save`, when memory has no room for them, and when
    the server ends. Without one, sessions end with the server.

    Args:
        engine: the thread they live in.
        directory: for records; None for none.
        most: sessions at once.
    """

    def __init__(self, engine: EngineThread, directory: Path | None, most: int) -> None:
        self._engine, self._directory, self._most = engine, directory, most
        self._entries: dict[str, SessionEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    async def load(self) -> None:
        """Takes up the sessions that the directory has; records that cannot be read stay where they are, with a warning."""
        if self._directory is None:
            return
        for file in sorted(self._directory.glob("*.session.json")):
            try:
                entry = await self._engine.call(lambda engine, file=file: _load(engine, file))  # type: ignore[misc]
                self._entries[entry.id] = entry
            except (OSError, UserError, msgspec.DecodeError, ValueError) as error:
                _log.warning("session %s was left out: %s", file.name, error)

    async def flush(self) -> None:
        """Writes the states of all sessions that memory holds to the directory, as before the process ends."""
        try:
            await self._flush()
        except OSError as error:
            _log.warning("states are not kept (%s): texts will be read again", error.strerror)

    async def _flush(self) -> None:
        def work(engine: Engine) -> None:
            assert engine.store is not None  # or there were no sessions
            engine.store.flush()

        await self._engine.call(work)

    def list_of(self, owner: str) -> list[SessionEntry]:
        """The sessions of a key, the oldest first."""
        return [entry for entry in self._entries.values() if entry.owner == owner]

    def find(self, owner: str, name: str) -> SessionEntry:
        """A session of a key.

        Raises:
            ApiError: it has none of this name.
        """
        entry = self._entries.get(name)
        if entry is None or entry.owner != owner:
            raise ApiError(
                404, f"there is no session {name[:80]!r}", param="session", code="session_not_found"
            )
        return entry

    @contextmanager
    def use(self, owner: str, name: str) -> Iterator[SessionEntry]:
        """A session that nobody else changes meanwhile.

        Raises:
            ApiError: it is not there, or somebody does something with it.
        """
        entry = self.find(owner, name)
        if entry.busy:
            raise ApiError(
                409, f"session {name} is being used; wait until that has ended", code="session_busy"
            )
        entry.busy = True
        try:
            yield entry
        finally:
            entry.busy = False

    async def add(self, owner: str, make: Callable[[Engine, str], Session]) -> SessionEntry:
        """Keeps a session that is made in the engine's thread, of the engine and a new name.

        Raises:
            ApiError: there are too many, or it cannot be written.
            UserError: as `make`.
        """
        if len(self._entries) >= self._most:
            raise ApiError(
                429, f"this server keeps {self._most} sessions; delete one first", code="too_many_sessions"
            )
        name = uuid.uuid4().hex

        def work(engine: Engine) -> SessionEntry:
            entry = SessionEntry(make(engine, name), owner, int(time.time()))
            try:
                self._write(engine, entry)
            except ApiError:
                entry.session.close()
                raise
            entry.session.hold()
            return entry

        self._entries[name] = entry = await self._engine.call(work)
        return entry

    async def change(self, entry: SessionEntry, verb: Callable[[Session], Result]) -> Result:
        """Does something with a session, and writes its record.

        Raises:
            ApiError: it cannot be written; the session is what it was.
        """

        def work(engine: Engine) -> Result:
            session = entry.session
            before = list(session.tokens), list(session.marks)
            result = verb(session)
            try:
                self._write(engine, entry)
            except ApiError:
                session.tokens[:], session.marks[:] = before
                session.hold()
                raise
            session.hold()
            entry.position, entry.marks = len(session.tokens), list(session.marks)
            return result

        return await self._engine.call(work)

    async def extend(self, entry: SessionEntry, completion: Completion) -> None:
        """Adds what was generated."""
        await self.change(entry, lambda session: session.extend(completion))

    async def save(self, entry: SessionEntry) -> None:
        """Writes its states to the directory.

        Raises:
            ApiError: there is no directory, or it cannot be written.
        """
        if self._directory is None:
            raise ApiError(400, "this server was started without --sessions and keeps nothing; use export")
        await self.change(entry, lambda session: None)
        try:
            await self._flush()
        except OSError as error:
            raise _not_written(
                "states", error, "the session's text is kept, and read again after a restart"
            ) from None

    async def delete(self, entry: SessionEntry) -> None:
        """Forgets a session, in memory and on disk.

        Raises:
            ApiError: it cannot be removed from disk; nothing has changed.
        """

        def work(engine: Engine) -> None:
            if self._directory is not None:
                try:
                    self._file(entry.id).unlink(missing_ok=True)
                except OSError as error:
                    raise ApiError(
                        507, f"the session cannot be removed from disk: {error.strerror}"
                    ) from None
            entry.session.close()

        await self._engine.call(work)
        self._entries.pop(entry.id, None)

    def _file(self, name: str) -> Path:
        assert self._directory is not None
        assert re.fullmatch("[0-9a-f]{32}", name)  # names are made here, and are never a path
        return self._directory / f"{name}.session.json"

    def _write(self, engine: Engine, entry: SessionEntry) -> None:
        if self._directory is None:
            return
        session = entry.session
        record = SessionRecord(
            FORMAT,
            engine.fingerprint,
            engine.tokenizer.fingerprint,
            entry.id,
            entry.owner,
            entry.created,
            session.tokens,
            session.marks,
        )
        try:
            write_bytes(self._file(entry.id), msgspec.json.encode(record))
        except OSError as error:
            raise _not_written("session", error, "no session has changed") from None


def _not_written(what: str, error: OSError, whole: str) -> ApiError:
    return ApiError(507, f"the {what} cannot be written to disk: {error.strerror}; {whole}", code="disk")


def _load(engine: Engine, file: Path) -> SessionEntry:
    record = msgspec.json.decode(file.read_bytes(), type=SessionRecord)
    if (
        record.format != FORMAT
        or not re.fullmatch("[0-9a-f]{32}", record.id)
        or not file.name.startswith(record.id)
    ):
        raise UserError(f"it is no record of a session of format {FORMAT}")
    if (record.model, record.tokenizer) != (engine.fingerprint, engine.tokenizer.fingerprint):
        raise UserError("it is of another model")
    session = Session(engine, record.tokens, name=record.id)
    session.marks = [mark for mark in record.marks if 0 < mark <= len(record.tokens)]
    session.hold()
    return SessionEntry(session, record.owner, record.created)


def described(entry: SessionEntry, model: str, state_bytes: int) -> dict[str, Any]:
    """A session as clients see it."""
    return {
        "id": entry.id,
        "object": "session",
        "created": entry.created,
        "model": model,
        "position": entry.position,
        "marks": entry.marks,
        "state_bytes": state_bytes,
        "busy": entry.busy,
    }


def more_of(session: Session, text: str | None, tokens: Sequence[int] | None) -> str | Sequence[int]:
    """What a body adds to a session: one of the two.

    Raises:
        ApiError: neither or both are given.
    """
    if (text is None) == (tokens is None):
        raise ApiError(400, "give text or tokens, one of the two", param="text")
    return text if text is not None else tokens or ()
