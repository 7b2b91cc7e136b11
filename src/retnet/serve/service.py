"""What the routes share: model, tokenizer, engine, limits, sessions, metrics; and running requests for a client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import Request as HttpRequest

from retnet.data import Tokenizer
from retnet.engine import Completion, Request
from retnet.serve.arrivals import Arrivals, Delta
from retnet.serve.engine_thread import EngineThread, Feed
from retnet.serve.errors import ApiError
from retnet.serve.gate import Gate, shut_down
from retnet.serve.metrics import ServerMetrics
from retnet.serve.settings import ServerSettings

if TYPE_CHECKING:
    from retnet.model import LanguageModel
    from retnet.serve.chat_template import ChatTemplate
    from retnet.serve.grammar_check import GrammarCheck
    from retnet.serve.response_store import ResponseStore
    from retnet.serve.session_store import SessionStore

TIMEOUT = "the request took longer than the {:g} seconds that this server allows; ask for fewer tokens"


@dataclass
class Service:
    """A model that is served.

    Attributes:
        name: of the model, as clients call it.
        model: it; used in the engine's thread alone.
        tokenizer: its own.
        engine: its thread.
        settings: limits.
        gate: counts what is under way.
        metrics: of everything.
        template: makes a text of a conversation.
        grammars: refuses those that are too heavy.
        sessions: of all keys.
        responses: that may be gone on from, of all keys.
        state_bytes: of one text; of a growing cache, of one token.
        state_grows: whether it grows with the text.
        created: seconds since 1970.
        warm: whether it has generated something.
    """

    name: str
    model: LanguageModel
    tokenizer: Tokenizer
    engine: EngineThread
    settings: ServerSettings
    gate: Gate
    metrics: ServerMetrics
    template: ChatTemplate
    grammars: GrammarCheck
    sessions: SessionStore
    responses: ResponseStore
    state_bytes: int
    state_grows: bool
    created: int
    warm: bool = False

    def why_not_ready(self) -> str:
        """Why it cannot serve; empty when it can."""
        if self.gate.closed:
            return "the server is shutting down"
        return self.engine.error or ("" if self.warm else "the model has not said its first token yet")

    async def warm_up(self) -> None:
        """Generates two tokens, so that whatever is compiled at first use is compiled."""
        request = Request((self.tokenizer.bos_id,), max_tokens=2, cache=False)
        async with running(self, [request], count=False) as events:
            async for _ in events:
                pass
        self.warm = True

    def check_model(self, name: str | None) -> None:
        """Refuses the name of another model.

        Raises:
            ApiError: it is not this one's.
        """
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"there is no model {name[:80]!r} here; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def check_tokens(self, prompt: int, wanted: int, param: str = "prompt") -> None:
        """Refuses prompts and answers that are longer than allowed.

        Raises:
            ApiError: naming the length.
        """
        if prompt > self.settings.max_prompt_tokens:
            raise ApiError(
                400,
                f"the {param} has {prompt:,} tokens; this server takes {self.settings.max_prompt_tokens:,}",
                param=param,
                code="context_length_exceeded",
            )
        if wanted > self.settings.max_tokens:
            raise ApiError(
                400,
                f"max_tokens is {wanted:,}; this server generates at most {self.settings.max_tokens:,} for a request",
                param="max_tokens",
            )

    async def encode(self, text: str, before: str = "") -> list[int]:
        """The ids of a text, without BOS, see `Tokenizer.encode`; beside the event loop, and the engine."""
        if len(text) < 1000:
            return self.tokenizer.encode(text, before)
        return await asyncio.to_thread(self.tokenizer.encode, text, before)

    async def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids; beside the event loop."""
        if len(tokens) < 1000:
            return self.tokenizer.decode(tokens)
        return await asyncio.to_thread(self.tokenizer.decode, tokens)


def service_of(request: HttpRequest) -> Service:
    """What an application serves."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def owner_of(request: HttpRequest) -> str:
    """Whose key a request was sent with."""
    return str(request.state.owner)


@asynccontextmanager
async def running(
    service: Service, requests: Sequence[Request], *, count: bool = True, partial: bool = False
) -> AsyncIterator[AsyncIterator[tuple[int, Delta]]]:
    """Runs requests; whatever has not ended on leaving is cancelled at the engine's next step.

    Args:
        service: whose engine.
        requests: that belong together.
        count: whether they count in metrics.
        partial: whether texts that a shutdown cuts short end as they are, "interrupted", instead of with an error.

    Yields:
        Pieces of texts, each with the number of its request; whoever is cancelled while it waits for one may read on.

    Raises:
        ApiError: there is no room; while pieces are read, also: they took too long, one failed, the server shuts down.
        UserError: as `Engine.submit`.
    """
    arrivals = Arrivals()
    began = time.monotonic()
    timeout = service.settings.timeout
    too_long = ApiError(504, TIMEOUT.format(timeout), code="timeout")
    for grammar in {request.grammar for request in requests if request.grammar is not None}:
        await service.grammars.require_light(grammar)
    feeds = [Feed(arrivals, number, request) for number, request in enumerate(requests)]

    def look(number: int, piece: Delta, first: bool, last: bool) -> None:
        if first and count:
            service.metrics.first_token.observe(time.monotonic() - began)
        if piece.completion is not None:
            _require_whole(requests[number], piece.completion, partial and service.gate.ended)
            if count:
                _tally(service.metrics, piece.sample, piece.completion)
        if last and count:
            service.metrics.duration.observe(time.monotonic() - began)

    deltas = _Deltas(arrivals, sum(request.samples for request in requests), look)

    def end() -> None:
        if partial:
            for feed in feeds:
                service.engine.interrupt(feed)
        else:
            arrivals.fail(shut_down())

    with service.gate.enter(sum(request.samples for request in requests), end):
        timer = asyncio.get_running_loop().call_later(timeout, arrivals.fail, too_long)
        try:
            for feed in feeds:
                await service.engine.submit(feed)
            yield deltas
        finally:
            timer.cancel()
            if deltas.left:
                for feed in feeds:
                    service.engine.cancel(feed)


async def completion_of(pieces: AsyncIterator[tuple[int, Delta]]) -> Completion:
    """What a single text is at its end."""
    done = [piece.completion async for _, piece in pieces][-1]
    assert done is not None
    return done


class _Deltas:
    """What is new of texts until all have ended: no generator, which a cancelled wait would end with pieces unread.

    Attributes:
        left: texts that have not ended.
    """

    def __init__(
        self, arrivals: Arrivals, texts: int, look: Callable[[int, Delta, bool, bool], None]
    ) -> None:
        self.left = texts
        self._arrivals, self._look, self._first = arrivals, look, True

    def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        return self

    async def __anext__(self) -> tuple[int, Delta]:
        if not self.left:
            raise StopAsyncIteration
        number, piece = await self._arrivals.get()
        first, self._first = self._first, False
        self.left -= piece.completion is not None
        self._look(number, piece, first, not self.left)
        return number, piece


def _require_whole(request: Request, completion: Completion, partial: bool) -> None:
    if completion.finish == "failed":
        raise ApiError(500 if request.grammar is None else 400, completion.error)
    if completion.finish == "interrupted" and not partial:
        raise ApiError(500, "the engine stopped this text; its log says why")


def _tally(metrics: ServerMetrics, sample: int, completion: Completion) -> None:
    metrics.generated_tokens.inc(len(completion.tokens))
    if sample == 0:
        metrics.prompt_tokens.inc(completion.prompt_tokens)
        metrics.cached_tokens.inc(completion.cached_tokens)
