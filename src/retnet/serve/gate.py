"""Admission control: how many texts may run and wait, and what is said to the others; nobody is let in while it closes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from retnet.serve.errors import ApiError

RETRY_SECONDS = 5  # after which another server may be there


class Gate:
    """Counts the texts that are under way.

    Args:
        slots: that run at once.
        queue: that may wait.

    Attributes:
        texts: under way now.
        closed: whether nobody is let in any more.
        ended: whether those inside have been told to end.
    """

    def __init__(self, slots: int, queue: int) -> None:
        self._slots, self._queue = slots, queue
        self.texts, self.closed, self.ended = 0, False, False
        self._inside: set[Callable[[], None]] = set()
        self._emptied = asyncio.Event()

    @property
    def running(self) -> int:
        """Texts with a slot, as far as slots alone decide."""
        return min(self.texts, self._slots)

    @property
    def waiting(self) -> int:
        """Texts without one."""
        return self.texts - self.running

    @contextmanager
    def enter(self, texts: int, end: Callable[[], None]) -> Iterator[None]:
        """Lets so many texts of one request in while it lasts.

        Args:
            texts: how many.
            end: ends them; called when a server that shuts down has no time left.

        Raises:
            ApiError: there is no room for them, now or ever, or the server is closing.
        """
        most = self._slots + self._queue
        if self.closed:
            raise shut_down("the server is shutting down; ask again later")
        if texts > most:
            raise ApiError(
                400, f"the request asks for {texts} texts; this server takes at most {most} at once"
            )
        if self.texts + texts > most:
            raise ApiError(
                429,
                f"{self.texts} texts are running or waiting and there is no room for {texts} more (at most {most}); "
                "ask again later",
                code="rate_limit_exceeded",
                retry_after=1,
            )
        self.texts += texts
        self._inside.add(end)
        try:
            yield
        finally:
            self.texts -= texts
            self._inside.discard(end)
            if not self.texts:
                self._emptied.set()

    def close(self) -> None:
        """Lets nobody in any more; those inside go on."""
        self.closed = True

    def end_all(self) -> None:
        """Ends those that are inside."""
        self.ended = True
        for end in tuple(self._inside):
            end()

    async def wait_until_empty(self, seconds: float) -> None:
        """Waits until nobody is inside, for at most so many seconds."""
        self._emptied.clear()
        if self.texts:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._emptied.wait(), seconds)


def shut_down(
    message: str = "the server is shutting down and had no time left for this text; ask again",
) -> ApiError:
    """What is told to those that a server which shuts down has no time for; client libraries ask again after a while."""
    return ApiError(503, message, code="shutting_down", retry_after=RETRY_SECONDS)
