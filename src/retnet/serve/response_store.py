"""Responses that the server remembers, so that conversations go on from them."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any, NamedTuple

from retnet.serve.chat_template import ChatTurn
from retnet.serve.errors import ApiError

MOST_BYTES = 1 << 28  # of the texts of all conversations


class StoredResponse(NamedTuple):
    """A response that may be gone on from.

    Attributes:
        owner: whose it is.
        turns: of the conversation, the answer last; without instructions.
        record: as it was answered.
    """

    owner: str
    turns: tuple[ChatTurn, ...]
    record: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Of the texts of its conversation, those that others have too included."""
        return sum(sys.getsizeof(turn.text) for turn in self.turns)


class ResponseStore:
    """The last responses, in memory; the engine's cache has the states along them.

    Args:
        most: kept, and at most `MOST_BYTES`; the least recently used ones go first.
    """

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, 0
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()

    def put(self, name: str, stored: StoredResponse) -> None:
        """Keeps one."""
        self._stored[name] = stored
        self._bytes += stored.bytes
        while len(self._stored) > self._most or self._bytes > MOST_BYTES:
            self._bytes -= self._stored.popitem(last=False)[1].bytes

    def find(self, owner: str, name: str) -> StoredResponse:
        """One of a key's.

        Raises:
            ApiError: it has none of this name, or no more.
        """
        stored = self._stored.get(name)
        if stored is None or stored.owner != owner:
            raise ApiError(
                404,
                f"there is no response {name[:80]!r} (any more); send the whole conversation as input",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        self._stored.move_to_end(name)
        return stored

    def delete(self, owner: str, name: str) -> None:
        """Forgets one.

        Raises:
            ApiError: as `find`.
        """
        self.find(owner, name)
        self._bytes -= self._stored.pop(name).bytes
