"""Bridge between asyncio and the engine: one thread steps it, coroutines submit, cancel and call by a queue."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from retnet.engine import Engine, Event, Request

Result = TypeVar("Result")
Arrival = tuple[int, Event] | Exception

_log = logging.getLogger("retnet.serve")
_MOST_FAILURES = 3  # in a row: then nothing that waits has a chance
APART = 64  # events that wait for a reader before pieces of text are put together


class Arrivals(asyncio.Queue[Arrival]):
    """Events on their way to one reader, each beside the number of its request.

    A reader that is far behind gets what is new of a text in one piece: however slow it is, what waits for it takes no more
    memory than the texts themselves.
    """

    def _init(self, maxsize: int) -> None:
        self._queue: deque[Arrival | _Backlog] = deque()
        self._open: dict[tuple[int, int], _Backlog] = {}  # in the queue, and the last of their texts there

    def _put(self, item: Arrival) -> None:
        if isinstance(item, Exception):
            self._queue.append(item)
            return
        number, event = item
        if len(self._queue) < APART or event.logprobs is not None or event.completion is not None:
            self._open.pop((number, event.sample), None)
            self._queue.append(item)
            return
        backlog = self._open.get((number, event.sample))
        if backlog is None:
            backlog = self._open[number, event.sample] = _Backlog(number)
            self._queue.append(backlog)
        backlog.event = event
        backlog.text += event.text.encode()

    def _get(self) -> Arrival:
        item = self._queue.popleft()
        if not isinstance(item, _Backlog):
            return item
        assert item.event is not None  # or it were not in the queue
        if self._open.get((item.number, item.event.sample)) is item:
            del self._open[item.number, item.event.sample]
        return item.number, item.event._replace(text=item.text.decode())


class _Backlog:
    """Pieces of a text that wait together: their text, and the last of them."""

    def __init__(self, number: int) -> None:
        self.number, self.text = number, bytearray()  # UTF-8, and no string for each piece
        self.event: Event | None = None


class Feed:
    """Where the events of one request go: a queue of a coroutine's, each beside the number that it gave the request.

    Args:
        arrivals: the queue.
        number: of the request there.
        request: what is to be run.
    """

    def __init__(self, arrivals: Arrivals, number: int, request: Request) -> None:
        self.arrivals, self.number, self.request = arrivals, number, request
        self.left = request.samples  # that have not ended
        self.id = -1  # the engine's, once it has it


class EngineThread:
    """Owns an engine: all that is done with it is done in one thread, between its steps.

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
            except Exception as error:
                self._post(_fail, future, error)
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
            self._work_off()
            if self._stopping:
                return
            if not self._engine.busy:
                continue
            try:
                events = self._engine.step()
                self._failures = 0
            except Exception:
                _log.exception("a step of the engine failed")
                self._failures += 1
                events = []
                if self._failures >= _MOST_FAILURES:
                    self.error = "the engine fails at every step; the log says why"
                    for number in list(self._feeds):
                        self._engine.cancel(number)
            self._deliver(events)

    def _work_off(self) -> None:
        """All that has been asked for; waits for something where there is nothing else to do."""
        try:
            while True:
                self._inbox.get(block=not self._engine.busy and not self._stopping)()
        except Empty:
            return

    def _deliver(self, events: Sequence[Event]) -> None:
        batch = []
        for event in events:
            feed = self._feeds.get(event.request)
            if feed is None:
                continue
            batch.append((feed, event))
            if event.completion is not None:
                feed.left -= 1
                if not feed.left:
                    del self._feeds[event.request]
        if batch:
            self._post(_hand_out, batch)

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:  # noqa: ANN401
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop has been closed: nobody waits any more
            return


def _hand_out(batch: Sequence[tuple[Feed, Event]]) -> None:
    for feed, event in batch:
        feed.arrivals.put_nowait((feed.number, event))


def _succeed(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
