"""Sessions: texts continued, forked, rewound, edited, saved and moved without being read from their start again."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retnet.engine.requests import Completion, Request, require_whole
from retnet.engine.session_archive import SessionArchive, session_bytes
from retnet.engine.store import BLOCK, StateStore, kept_positions, keys_of, root_of
from retnet.errors import UserError, told
from retnet.io import write_bytes

if TYPE_CHECKING:
    from retnet.engine.engine import Engine

_TAIL = 16  # tokens of a text that tell a tokenizer that what is appended is no beginning
_log = logging.getLogger("retnet.engine")


class Session:
    """A text in the making on an engine with a cache.

    It consists of its token ids; states along it lie in the engine's cache, at block boundaries of a grid whose spacing
    grows with the distance from the end, and before every `append`. Whatever is asked of it is answered by reading on from
    the last kept state before: after a rewind to any token, and after the cache has lost it, the outcome is the same. With
    `Engine(exact=True)` it is that of a session that read the same text from its start, bit for bit, in any company and in
    another process of this machine; without, it may differ by rounding.

    Args:
        engine: with `cache_bytes`.
        tokens: to begin with; None is BOS, a document's beginning.
        name: unique; None makes one up.
        cache_salt: see `Request`; forks have the same.

    Attributes:
        name: of the session.
        cache_salt: as given.
        tokens: the ids of the text so far; do not change them.
        marks: positions where something was appended, rising.

    Raises:
        UserError: an engine without a cache, or ids outside the vocabulary.
    """

    def __init__(
        self,
        engine: Engine,
        tokens: Sequence[int] | None = None,
        *,
        name: str | None = None,
        cache_salt: str = "",
    ) -> None:
        if engine.store is None:
            raise UserError("sessions need an engine that keeps states; give it cache_bytes")
        self._engine = engine
        self.name, self.cache_salt = name or uuid.uuid4().hex, cache_salt
        self.tokens: list[int] = []
        self.marks: list[int] = []
        self._chain: list[str] = []  # keys of the blocks of the text
        self.append([engine.tokenizer.bos_id] if tokens is None else tokens)

    @property
    def text(self) -> str:
        """The text so far; special tokens have none."""
        return self._engine.tokenizer.decode(self.tokens)

    def before(self, position: int | None = None) -> str:
        """The end of the text up to a position, or of all of it: what follows is then no beginning to a tokenizer."""
        end = len(self.tokens) if position is None else position
        return self._engine.tokenizer.decode(self.tokens[max(0, end - _TAIL) : end])

    def append(self, more: str | Sequence[int]) -> None:
        """Adds a text, or token ids as they are; it is read when something is generated.

        Raises:
            UserError: ids outside the vocabulary.
        """
        ids = self._ids(more, len(self.tokens))
        if self.tokens and ids:
            self.marks.append(len(self.tokens))
        self.tokens += ids

    def request(self, **options: Any) -> Request:  # noqa: ANN401
        """A request to continue this text, options as those of `Request`; for whoever steps the engine."""
        return Request(tuple(self.tokens), marks=tuple(self.marks), cache_salt=self.cache_salt, **options)

    def generate(self, **options: Any) -> Completion:  # noqa: ANN401
        """Continues the text and adds what was generated, a stop string in its tokens included.

        Args:
            **options: those of `Request` but for `prompt`, `samples`, `echo` and what is the session's. Other requests of
                the engine run on meanwhile, and their events come with the next step.

        Raises:
            UserError: a value outside its range.
        """
        for option in ("samples", "echo", "prompt", "marks", "cache_salt"):
            if option in options:
                raise UserError(f"a session's generate has no option {option!r}; fork it, or use request()")
        completion = self._engine.complete(self.request(**options))[0]
        self.extend(completion)
        return completion

    def extend(self, completion: Completion) -> None:
        """Adds what became of a `request` of this text as it is now."""
        self.tokens += completion.tokens
        self.hold()

    def fork(self, name: str | None = None) -> Session:
        """Another session with the same text; from here on they know nothing of each other."""
        other = Session(self._engine, self.tokens, name=name, cache_salt=self.cache_salt)
        other.marks = [*self.marks]
        other.hold()
        return other

    def rewind(self, position: int) -> None:
        """Takes back all tokens after the first `position`.

        Raises:
            UserError: a position that is not within the text.
        """
        self._require_within(position)
        del self.tokens[position:]
        del self._chain[position // BLOCK :]
        self.marks = [mark for mark in self.marks if mark < position]

    def edit(self, position: int, more: str | Sequence[int]) -> None:
        """Puts something else in the place of all tokens after the first `position`: a rewind and an append.

        Raises:
            UserError: a position that is not within the text, or ids outside the vocabulary; nothing has changed.
        """
        self._require_within(position)
        ids = self._ids(more, position)
        self.rewind(position)
        self.append(ids)

    def close(self) -> None:
        """Lets go of its states; others may still find them until they are dropped."""
        self._store.hold(self.name, ())

    def hold(self) -> None:
        """Says to the cache which states along this text are worth keeping."""
        keys, places = self._keys(), kept_positions(len(self.tokens), self.marks)
        self._store.hold(self.name, (keys[place // BLOCK - 1] for place in places))

    # -- as bytes -----------------------------------------------------------------------------------------------

    def export(self, *, every: bool = False) -> bytes:
        """The session as bytes: a safetensors file with ids and states, and a header in JSON; see `SessionArchive`.

        Args:
            every: all states that are kept along the text, for rewinding as fast as here; else the last one.
        """
        return session_bytes(
            self.tokens, self.marks, self._kept(every), {**_made_with(self._engine), "name": self.name}
        )

    @classmethod
    def from_bytes(
        cls, engine: Engine, content: bytes, *, name: str | None = None, cache_salt: str = ""
    ) -> Session:
        """The session that `export` made these bytes of, under a new name if one is given.

        Its states are believed: whoever has made some up gets what comes of them, and so do others of the same `cache_salt`.

        Raises:
            UserError: bytes that are damaged or no session, or one of another model, tokenizer or format.
        """
        archive = SessionArchive.from_bytes(content)
        session = cls._of(engine, archive, name, cache_salt)
        states = {place: archive.state(place, session._store.template) for place in archive.positions}
        for position, state in states.items():  # the last one is what is wanted next
            session._store.put(session._keys()[position // BLOCK - 1], state)
        session.hold()
        return session

    def save(self, path: str | Path) -> None:
        """Writes the session and every state that is kept along it to a file, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        with told(f"write the session to {path}"):
            write_bytes(Path(path), self.export(every=True))

    @classmethod
    def load(cls, engine: Engine, path: str | Path, *, name: str | None = None) -> Session:
        """Reads a session from a file. Of its states none is read before it is wanted, so the file stays open.

        One that cannot be used then is read again from its tokens, with a warning.

        Raises:
            UserError: as `from_bytes`, or the file cannot be read.
        """
        archive = SessionArchive.open(Path(path))
        session = cls._of(engine, archive, name)
        session.hold()
        keys, template = session._keys(), session._store.template

        def fetch(position: int) -> Any:  # noqa: ANN401
            try:
                return archive.state(position, template)
            except UserError as error:
                _log.warning(
                    "tokens of the session %s are read again: its state at %d: %s", path, position, error
                )
                return None

        session._store.lend({keys[place // BLOCK - 1]: partial(fetch, place) for place in archive.positions})
        return session

    @classmethod
    def _of(cls, engine: Engine, archive: SessionArchive, name: str | None, cache_salt: str = "") -> Session:
        """An archive's text, without its states."""
        archive.require(_made_with(engine))
        session = cls(engine, archive.tokens, name=name or archive.name, cache_salt=cache_salt)
        session.marks = archive.marks
        return session

    @property
    def _store(self) -> StateStore:
        assert self._engine.store is not None  # or there were no session
        return self._engine.store

    def _require_within(self, position: int) -> None:
        require_whole("position", position, 1)
        if position > len(self.tokens):
            raise UserError(f"position {position} is beyond the session's {len(self.tokens)} tokens")

    def _ids(self, more: str | Sequence[int], position: int) -> list[int]:
        """The ids of what is to stand behind the first `position` tokens."""
        encode = self._engine.tokenizer.encode
        ids = encode(more, self.before(position)) if isinstance(more, str) else list(more)
        self._engine.check_ids("tokens", ids)
        return ids

    def _keys(self) -> list[str]:
        self._chain = keys_of(root_of(self._engine.fingerprint, self.cache_salt), self.tokens, self._chain)
        return self._chain

    def _kept(self, every: bool) -> dict[int, Any]:
        """States along the text by their position: the last one that is there, or also all that are worth keeping."""
        keys = self._keys()
        places = kept_positions(len(self.tokens), self.marks) if every else []
        found = {place: self._store.get(keys[place // BLOCK - 1]) for place in places}
        last, state = self._store.longest(keys)
        return {place: state for place, state in sorted((found | {last: state}).items()) if state is not None}


def _made_with(engine: Engine) -> dict[str, str]:
    """Fingerprints of what a session is read and written by."""
    return {"model": engine.fingerprint, "tokenizer": engine.tokenizer.fingerprint}
