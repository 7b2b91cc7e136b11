"""Bridge between asyncio and the engine: one thread steps it, coroutines submit, cancel and call by a queue."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from retnet.engine import Engine, Event, Request
from retnet.serve.arrivals import Arrivals

Result = TypeVar("Result")

_log = logging.getLogger("retnet.serve")
_MOST_FAILURES = 3  # in a row: then nothing that waits has a chance
TOGETHER = 0.05  # seconds; twenty times a second is fluent to the eye


class Feed:
    """Where the events of one request go: arrivals of a coroutine's, each beside the number that it gave the request.

    Args:
        arrivals: which.
        number: of the request there.
        request: what is to be run.
    """

    def __init__(self, arrivals: Arrivals, number: int, request: Request) -> None:
        self.arrivals, self.number, self.request = arrivals, number, request
        self.left = request.samples  # that have not ended
        self.begun = False  # whether something of it has been sent
        self.id = -1  # the engine's, once it has it


class EngineThread:
    """Owns an engine: all that is done with it is done in one thread, between its steps.

    A text's first token and its end are sent at once. Others wait for the next ones, no longer than `TOGETHER`: waking the
    loop, the socket and the client takes a core that the next step needs. Of steps that take longer none waits.

    Args:
        engine: nobody else uses it from `start` on.

    Attributes:
        error: why it cannot serve any more; empty while it can.
    """

    def __init__(self, engine: Engine) -> None:
        self.error = "the engine has not started"
        self._engine = engine
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._feeds: dict[int, Feed] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False
        self._failures = 0
        self._held: list[tuple[Feed, Event]] = []  # what has not been sent yet
        self._sent = 0.0  # when something last was
        self._thread = threading.Thread(target=self._run, name="retnet-engine", daemon=True)

    def start(self) -> None:
        """Begins to step, for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.error = ""
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """Ends the thread after the step it is in; whether that took no longer than so many seconds."""
        self.error = "the engine has been stopped"
        self._stopping = True
        self._inbox.put(lambda: None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    async def call(self, function: Callable[[Engine], Result]) -> Result:
        """What a function of the engine returns or raises, called between two steps."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

        def work() -> None:
            try:
                result = function(self._engine)
            except BaseException as error:  # a panic of a library in Rust is no Exception
                self._post(
                    _fail, future, error if isinstance(error, Exception) else RuntimeError(repr(error))
                )
            else:
                self._post(_succeed, future, result)

        self._inbox.put(work)
        return await future

    async def submit(self, feed: Feed) -> None:
        """Gives a request to the engine; its events go to the feed.

        Raises:
            UserError: as `Engine.submit`.
        """

        def work(engine: Engine) -> None:
            feed.id = engine.submit(feed.request)
            self._feeds[feed.id] = feed

        await self.call(work)

    def cancel(self, feed: Feed) -> None:
        """Ends a request at the next step, also one whose `submit` has not been answered; it has no more events."""

        def work() -> None:
            if self._feeds.pop(feed.id, None) is not None:
                self._engine.cancel(feed.id)

        self._inbox.put(work)

    def interrupt(self, feed: Feed) -> None:
        """Ends a request at the next step as it is then; its last events say so."""

        def work() -> None:
            self._engine.cancel(feed.id)

        self._inbox.put(work)

    # -- in the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            if self._work_off():
                self._send()  # the next step may take longer than the last one
            if self._stopping:
                return
            if not self._engine.busy:
                continue
            began = time.monotonic()
            urgent = self._hold(self._step())
            now = time.monotonic()
            if urgent or now + (now - began) > self._sent + TOGETHER:
                self._send()

    def _step(self) -> Sequence[Event]:
        try:
            events = self._engine.step()
            self._failures = 0
        except BaseException:  # a panic of a library in Rust is no Exception; the thread has to live
            _log.exception("a step of the engine failed")
            self._failures += 1
            events = []
            if self._failures >= _MOST_FAILURES:
                self.error = "the engine fails at every step; the log says why"
                for number in list(self._feeds):
                    self._engine.cancel(number)
        return events

    def _work_off(self) -> bool:
        """All that has been asked for, if anything; waits for something where there is nothing else to do."""
        found = False
        try:
            while True:
                self._inbox.get(block=not self._engine.busy and not self._stopping)()
                found = True
        except Empty:
            return found

    def _hold(self, events: Sequence[Event]) -> bool:
        """Keeps events until they are sent; whether one of them must not wait."""
        urgent = False
        for event in events:
            feed = self._feeds.get(event.request)
            if feed is None:
                continue
            self._held.append((feed, event))
            if event.completion is not None:
                feed.left -= 1
                if not feed.left:
                    del self._feeds[event.request]
            urgent = urgent or event.completion is not None or not feed.begun
            feed.begun = True
        return urgent

    def _send(self) -> None:
        self._sent = time.monotonic()
        if self._held:
            self._post(_hand_out, self._held)
            self._held = []

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:  # noqa: ANN401
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has been closed: nobody waits any more
            return


def _hand_out(batch: Sequence[tuple[Feed, Event]]) -> None:
    for feed, event in batch:
        feed.arrivals.put(feed.number, event)


def _succeed(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
