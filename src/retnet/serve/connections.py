"""HTTP connections: how many there may be, and how long one may stand still, so that those who wait shut nobody out."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from retnet.serve.errors import ApiError

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]  # a module, or None

STILL_SECONDS = (
    90.0  # that a connection may stand still; longer than uvicorn keeps one that waits for a request
)
MOST = 65_536  # connections, where the system allows as many
HEAD_BYTES = 65_536  # of a request beside its body: its head, and what stands between the pieces of a body
FILES = 256  # descriptors that are left for files, at most half of all
_log = logging.getLogger("retnet.serve")


def most_connections() -> int:
    """How many connections there may be, after the process's limit of file descriptors has been raised to what it may be."""
    if resource is None:
        return MOST
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST + FILES if hard == resource.RLIM_INFINITY else min(hard, MOST + FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # a system may allow less than its limit says
            wanted = soft
    return wanted - min(FILES, wanted // 2)


class WatchedConnection(HttpToolsProtocol):
    """Uvicorn's connection, closed when nothing moves on it, and refused with a sentence when there are too many.

    Uvicorn closes a connection that waits for its next request; not one that waits for its first, that never finishes a
    request's head, or that does not take what is sent to it; nor does it limit a head. Bodies have limits of their own, see
    `read_body`.

    Args:
        most: connections at once.
        **options: those of uvicorn.
    """

    _refused = False  # whether that has been said in the log

    def __init__(self, *, most: int, **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        self._most, self._answered, self._resumed, self._head = most, 0, 0, 0
        self._seen = 0, 0, 0
        self._watch: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's transport
        """See asyncio."""
        super().connection_made(transport)
        if len(self.connections) > self._most:
            self._refuse()
        else:
            self._watch = self.loop.call_later(STILL_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio; a head that does not end is refused: nothing else limits it."""
        if self.transport.is_closing():
            return
        self._head += len(data)
        super().data_received(data)
        if self._head > HEAD_BYTES:
            if self._waits:
                self._close_with(
                    ApiError(
                        431, f"the request's head has more than the {HEAD_BYTES:,} bytes that it may have"
                    )
                )
            else:
                self.transport.abort()

    def on_headers_complete(self) -> None:
        """See uvicorn."""
        self._head = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """See uvicorn."""
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See uvicorn."""
        self._head = 0
        super().on_message_complete()

    def resume_writing(self) -> None:
        """See asyncio."""
        self._resumed += 1
        super().resume_writing()

    def on_response_complete(self) -> None:
        """See uvicorn."""
        self._answered += 1
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """See uvicorn; with the envelope that all errors have."""
        self._close_with(ApiError(400, f"this is no HTTP request: {msg}"))

    def _look(self) -> None:
        """Ends a connection that has neither taken nor brought anything since the last look."""
        unsent = self.transport.get_write_buffer_size()
        now = unsent, self._resumed, self._answered
        if (unsent or self._waits) and now == self._seen:
            self.transport.abort()
            return
        self._seen = now
        self._watch = self.loop.call_later(STILL_SECONDS, self._look)

    @property
    def _waits(self) -> bool:
        """Whether it is the client's turn."""
        return self.cycle is None or self.cycle.response_complete

    def _refuse(self) -> None:
        if not WatchedConnection._refused:
            _log.warning(
                "%d connections are open, as many as the limit of file descriptors (ulimit -n) leaves room for; "
                "others are answered with 503",
                self._most,
            )
        WatchedConnection._refused = True
        many = f"this server has its {self._most:,} connections; ask again later"
        self._close_with(ApiError(503, many, code="too_many_connections", retry_after=1))

    def _close_with(self, error: ApiError) -> None:
        response = error.response()
        head = [b"HTTP/1.1 %d \r\nconnection: close\r\n" % response.status_code]
        head += [b"%b: %b\r\n" % header for header in response.raw_headers]
        self.transport.write(b"".join([*head, b"\r\n", bytes(response.body)]))
        self.transport.close()
