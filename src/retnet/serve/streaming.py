"""Answers that stop when nobody listens any more: streams of server-sent events, and whole ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing
from typing import TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from retnet.serve.errors import ApiError, as_api_error
from retnet.serve.events import DONE, sse
from retnet.serve.metrics import ServerMetrics

Outcome = TypeVar("Outcome")


class EventStream(Response):
    """Server-sent events, `[DONE]` at the end; where something goes wrong, the error's envelope is the event before.

    Args:
        events: of one answer each, encoded.
        stack: what is to be closed behind them, whether or not they are read.
        metrics: counts clients that left.
        seconds: that sending may take.
        done: what ends it.
        failed: the event that says what went wrong.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        stack: AsyncExitStack,
        metrics: ServerMetrics,
        seconds: float,
        done: bytes = DONE,
        failed: Callable[[ApiError], bytes] = lambda error: sse(error.envelope()),
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._stack, self._metrics, self._seconds = events, stack, metrics, seconds
        self._done, self._failed = done, failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        async with self._stack:
            if not await unless_gone(receive, self._send_all(send)):
                self._metrics.cancelled.inc()

    async def _send_all(self, send: Send) -> bool:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with asyncio.timeout(self._seconds), aclosing(self._events) as events:  # type: ignore[type-var]  # they can be
                try:
                    async for event in events:
                        await send({"type": "http.response.body", "body": event, "more_body": True})
                except Exception as error:
                    said = self._failed(as_api_error(error))
                    await send({"type": "http.response.body", "body": said, "more_body": True})
                await self._stack.aclose()  # whoever has read the end finds a session free
                await send({"type": "http.response.body", "body": self._done, "more_body": True})
        except TimeoutError:
            pass  # a reader this slow has not seen what is missing either
        await send({"type": "http.response.body", "body": b""})
        return True


async def unless_gone(
    receive: Callable[[], Awaitable[object]], work: Coroutine[object, object, Outcome]
) -> Outcome | None:
    """What some work returns; None when the client left before, and the work was cancelled.

    Args:
        receive: of ASGI, after the body has been read.
        work: is cancelled where it is.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, gone):
            if not each.done():
                each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Callable[[], Awaitable[object]]) -> None:
    while True:
        message = await receive()
        if isinstance(message, dict) and message["type"] == "http.disconnect":
            return


async def answer(
    request: HttpRequest, metrics: ServerMetrics, work: Coroutine[object, object, bytes]
) -> Response:
    """A JSON answer that some work makes, unless the client leaves before."""
    content = await unless_gone(request.receive, work)
    if content is None:
        metrics.cancelled.inc()
        return Response(status_code=499)  # nobody reads it
    return Response(content, media_type="application/json")
