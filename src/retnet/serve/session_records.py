"""Sessions on disk and in memory: their records, and what a server knows of each."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from retnet.engine import Engine, Session
from retnet.engine.versioned_files import Versioned
from retnet.settings import UserError

FORMAT = 2  # of records; 1 was one file a session


class SessionRecord(msgspec.Struct):
    """A session in storage: its tokens, for states only spare reading.

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
        generation: of its record that this is; 0 where there are no records.
        busy: whether something is done with it now.
        position: tokens.
        marks: where something was appended.
        changing: the last change of it, which may be under way.
    """

    def __init__(self, session: Session, owner: str, created: int, generation: int = 0) -> None:
        self.session, self.owner, self.created, self.busy = session, owner, created, False
        self.generation = generation
        self.changing: asyncio.Future[Any] | None = None
        self.look()

    def free(self) -> None:
        """Others may do something with it."""
        self.busy = False

    def record(self, engine: Engine) -> bytes:
        """Its record as it is now; in the engine's thread."""
        session = self.session
        about = engine.fingerprint, engine.tokenizer.fingerprint, self.id, self.owner, self.created
        return msgspec.json.encode(SessionRecord(FORMAT, *about, session.tokens, session.marks))

    def look(self) -> None:
        """Takes position and marks from the session; in the engine's thread."""
        self.position, self.marks = len(self.session.tokens), list(self.session.marks)

    @property
    def id(self) -> str:
        """The session's name."""
        return self.session.name


def is_name(name: str) -> bool:
    """Names are made here: 32 hexadecimal digits, never a path."""
    return re.fullmatch("[0-9a-f]{32}", name) is not None


def entry_of(engine: Engine, name: str, found: Versioned) -> SessionEntry:
    """What a record says; in the engine's thread.

    Raises:
        UserError: it is of another model, or no record.
        msgspec.DecodeError: it is no record.
    """
    record = msgspec.json.decode(found.content, type=SessionRecord)
    if record.format != FORMAT:
        raise UserError(f"its record has format {record.format}; this version reads {FORMAT}")
    if not is_name(name) or record.id != name:
        raise UserError("its record is of a session of another name")
    if (record.model, record.tokenizer) != (engine.fingerprint, engine.tokenizer.fingerprint):
        raise UserError("it is of another model")
    session = session_of(engine, name, record.owner, record.tokens, record.marks)
    return SessionEntry(session, record.owner, record.created, found.generation)


def session_of(engine: Engine, name: str, owner: str, tokens: Sequence[int], marks: Sequence[int]) -> Session:
    """A session of an owner's with these tokens and marks, its states held; in the engine's thread."""
    session = Session(engine, tokens, name=name, cache_salt=owner)
    session.marks = [mark for mark in marks if 0 < mark <= len(tokens)]
    session.hold()
    return session


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
