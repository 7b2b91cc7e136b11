"""Sessions of clients: whose they are, what may be done with them now, and storage that replicas of a server share."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TypeVar

import msgspec

from retnet.engine import Completion, Engine, Session
from retnet.engine.storage import Storage
from retnet.engine.versioned_files import ConflictError, Versioned, VersionedFiles
from retnet.errors import reason_of
from retnet.serve.engine_thread import EngineThread
from retnet.serve.errors import ApiError
from retnet.serve.session_records import SessionEntry, entry_of, is_name, session_of
from retnet.settings import UserError

Result = TypeVar("Result")

RECORDS, STATES = "records", "states"  # folders in the place of sessions
OLD = ".session.json"  # how files of format 1 end, which had one a session
SWEPT_AFTER = 3600.0  # seconds that a file has lain unused when a server starts
_log = logging.getLogger("retnet.serve")


class _UnusableError(ApiError):
    """A record is of another model, or of a format that this version does not read."""


class SessionStore:
    """All sessions. Each belongs to the key it was made with, and for others it is not there.

    With a storage, a session's record, which has its tokens, is written after every change, whole or not at all, before the
    change is answered. So a server that is killed has lost nothing, and several servers may share the storage: each looks,
    before it does something with a session, whether another has changed it, and a change that another has overtaken is
    refused. States are written by `save`, when memory has no room for them, and when the server ends, and only spare
    reading. Without a storage, sessions end with the server.

    Args:
        engine: the thread they live in.
        storage: for records; None for none.
        most: sessions that this server keeps at once.
    """

    def __init__(self, engine: EngineThread, storage: Storage | None, most: int) -> None:
        self._engine, self._most = engine, most
        self._storage = storage
        self._files = None if storage is None else VersionedFiles(storage, RECORDS)
        self._entries: dict[str, SessionEntry] = {}
        self._coming = 0  # that are being made

    def __len__(self) -> int:
        return len(self._entries)

    async def load(self) -> None:
        """Takes up the sessions of the storage, and sweeps what belongs to none and has lain there for an hour.

        Records that cannot be read stay where they are, with a warning; then no states are swept, which may be theirs.
        """
        if self._files is None or self._storage is None:
            return
        files = self._files
        try:
            _warn_of_old(self._storage.url, await asyncio.to_thread(self._storage.names))
            sound = await self._load_all(files)
            swept = await asyncio.to_thread(files.sweep, SWEPT_AFTER)
        except OSError as error:
            _log.warning("sessions were not taken up: %s", reason_of(error))
            return

        def sweep(engine: Engine) -> int:
            assert engine.store is not None  # or there were no sessions
            return engine.store.sweep(SWEPT_AFTER)

        swept += await self._engine.call(sweep) if sound else 0
        if swept:
            _log.info("swept %d files that no session needs any more", swept)

    async def _load_all(self, files: VersionedFiles) -> bool:
        """Whether every record could be read."""
        sound = True
        for name in await asyncio.to_thread(files.names):
            try:
                found = await asyncio.to_thread(files.load, name)
                if found is not None:
                    await self._take(name, found)
            except (UserError, msgspec.DecodeError, ValueError) as error:
                _log.warning("session %s was left out: %s", name, error)
                sound = False
        return sound

    async def flush(self) -> None:
        """Writes the states of all sessions that memory holds, as before the process ends."""
        try:
            await self._flush(None)
        except OSError as error:
            _log.warning("states are not kept (%s): texts will be read again", reason_of(error))

    async def _flush(self, owner: str | None) -> None:
        def work(engine: Engine) -> None:
            assert engine.store is not None  # or there were no sessions
            engine.store.flush(owner)

        await self._engine.call(work)

    async def list_of(self, owner: str) -> list[SessionEntry]:
        """The sessions of a key, the oldest first, as they are now."""
        if self._files is not None:
            with _told("listed"):
                names = await asyncio.to_thread(self._files.names)
            for name in {*names, *self._entries}:
                if is_name(name):
                    with suppress(_UnusableError):  # the log has said so when the server began
                        await self._refresh(name)
        found = [entry for entry in self._entries.values() if entry.owner == owner]
        return sorted(found, key=lambda entry: entry.created)

    async def find(self, owner: str, name: str) -> SessionEntry:
        """A session of a key, as it is now.

        Raises:
            ApiError: it has none of this name.
        """
        if is_name(name):
            await self._refresh(name)
        entry = self._entries.get(name)
        if entry is None or entry.owner != owner:
            raise ApiError(
                404, f"there is no session {name[:80]!r}", param="session", code="session_not_found"
            )
        return entry

    @asynccontextmanager
    async def use(self, owner: str, name: str) -> AsyncIterator[SessionEntry]:
        """A session that nobody else on this server changes meanwhile.

        Raises:
            ApiError: it is not there, or somebody does something with it.
        """
        entry = await self.find(owner, name)
        if entry.busy:
            raise ApiError(
                409, f"session {name} is being used; wait until that has ended", code="session_busy"
            )
        entry.busy = True
        try:
            yield entry
        finally:
            if entry.changing is None or entry.changing.done():
                entry.busy = False
            else:  # the client has left; what it began is not to be parted by others
                entry.changing.add_done_callback(lambda _: entry.free())

    async def add(self, owner: str, make: Callable[[Engine, str], Session]) -> SessionEntry:
        """Keeps a session that is made in the engine's thread, of the engine and a new name.

        Raises:
            ApiError: there are too many, or it cannot be written.
            UserError: as `make`.
        """
        if len(self._entries) + self._coming >= self._most:
            raise ApiError(
                429, f"this server keeps {self._most} sessions; delete one first", code="too_many_sessions"
            )
        name = uuid.uuid4().hex
        self._coming += 1
        try:
            made = await self._engine.call(lambda engine: make(engine, name))
            entry = SessionEntry(made, owner, int(time.time()))
            await self.change(entry, lambda session: None)
        except BaseException:
            await self._release(name)
            raise
        finally:
            self._coming -= 1
        self._entries[name] = entry
        return entry

    async def change(self, entry: SessionEntry, verb: Callable[[Session], Result]) -> Result:
        """Does something with a session, and writes its record; nothing has changed where that fails.

        Raises:
            ApiError: another server has changed it meanwhile, or it cannot be written.
        """
        changing = asyncio.ensure_future(self._change(entry, verb))
        entry.changing = changing
        return await asyncio.shield(changing)  # a client that leaves must not part text and record

    async def _change(self, entry: SessionEntry, verb: Callable[[Session], Result]) -> Result:
        before = list[int](), list[int]()

        def work(engine: Engine) -> tuple[Result, bytes]:
            nonlocal before
            before = list(entry.session.tokens), list(entry.session.marks)
            try:
                result = verb(entry.session)
            except BaseException:
                undo(engine)
                raise
            entry.session.hold()
            entry.look()
            return result, entry.record(engine)

        def undo(engine: Engine) -> None:
            entry.session = session_of(engine, entry.id, entry.owner, *before)
            entry.look()

        result, content = await self._engine.call(work)
        if self._files is None:
            return result
        try:
            with _told("written"):
                entry.generation = await asyncio.to_thread(
                    self._files.save, entry.id, content, entry.generation
                )
        except (ApiError, ConflictError) as error:
            await self._engine.call(undo)
            if isinstance(error, ApiError):
                raise
            raise ApiError(
                409,
                f"session {entry.id} was changed through another server meanwhile; ask again",
                code="session_conflict",
            ) from None
        return result

    async def extend(self, entry: SessionEntry, completion: Completion) -> None:
        """Adds what was generated."""
        await self.change(entry, lambda session: session.extend(completion))

    async def save(self, entry: SessionEntry) -> None:
        """Writes its states.

        Raises:
            ApiError: there is no storage, or they cannot be written.
        """
        if self._files is None:
            raise ApiError(400, "this server was started without --sessions and keeps nothing; use export")
        with _told("written, but its text is kept"):
            await self._flush(entry.id)

    async def delete(self, entry: SessionEntry) -> None:
        """Forgets a session, in memory and in the storage.

        Raises:
            ApiError: another server has changed it meanwhile, or it cannot be removed.
        """
        if self._files is not None:
            try:
                with _told("removed"):
                    await asyncio.to_thread(self._files.remove, entry.id, entry.generation)
            except ConflictError:
                raise ApiError(
                    409, f"session {entry.id} was changed meanwhile; ask again", code="session_conflict"
                ) from None
        await self._drop(entry.id)

    async def _refresh(self, name: str) -> None:
        """Looks whether another server has made, changed or removed a session."""
        if self._files is None:
            return
        entry = self._entries.get(name)
        if entry is not None and entry.busy:
            return  # whoever uses it finds out when it writes
        with _told("read"):
            last = await asyncio.to_thread(self._files.generation, name)
            if entry is not None and last == entry.generation:
                return
            found = await asyncio.to_thread(self._files.load, name) if last else None
        if found is None:
            await self._drop(name)
            return
        try:
            await self._take(name, found)
        except (UserError, msgspec.DecodeError, ValueError) as error:
            raise _UnusableError(409, f"session {name} cannot be used here: {error}") from None

    async def _take(self, name: str, found: Versioned) -> None:
        """Puts a session as its record says in the place of what is known of it."""
        made = await self._engine.call(lambda engine: entry_of(engine, name, found))
        known = self._entries.setdefault(name, made)
        if known is not made and known.generation < made.generation and not known.busy:
            known.session, known.generation = made.session, made.generation
            known.position, known.marks = made.position, made.marks

    async def _drop(self, name: str) -> None:
        if self._entries.pop(name, None) is not None:
            await self._release(name)

    async def _release(self, name: str) -> None:
        """Lets go of a session's states."""

        def work(engine: Engine) -> None:
            assert engine.store is not None  # or there were no sessions
            engine.store.hold(name, ())

        await self._engine.call(work)


def _warn_of_old(url: str, names: Sequence[str]) -> None:
    if old := sum(name.endswith(OLD) for name in names):
        _log.warning(
            "%s has %d sessions of an older format (files *%s) that this version does not read, and leaves as they are: ask "
            "the version that wrote them for the tokens of each (GET /v1/sessions/ID) and create it here of these (POST "
            "/v1/sessions), or delete the files",
            url,
            old,
            OLD,
        )


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of the storage as what a client is told."""
    try:
        yield
    except OSError as error:
        raise ApiError(507, f"the session cannot be {what}: {reason_of(error)}") from None
