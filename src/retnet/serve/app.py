"""The application: routes, access, errors, and what happens at start and end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retnet import __version__
from retnet.engine import Decoder, Engine, Run
from retnet.engine.slots import room_for
from retnet.engine.storage import open_storage
from retnet.serve import (
    completion_routes,
    embedding_routes,
    message_routes,
    plain_routes,
    response_routes,
    session_routes,
)
from retnet.serve.access import AccessMiddleware, ApiKeys
from retnet.serve.chat_template import ChatTemplate
from retnet.serve.documents import install_openapi
from retnet.serve.engine_thread import EngineThread
from retnet.serve.errors import as_api_error, install_handlers
from retnet.serve.gate import Gate
from retnet.serve.grammar_check import GrammarCheck
from retnet.serve.metrics import ServerMetrics
from retnet.serve.response_store import ResponseStore
from retnet.serve.service import Service
from retnet.serve.session_store import STATES, SessionStore
from retnet.serve.settings import ServerSettings
from retnet.settings import UserError

STOP_SECONDS = 10.0  # for the step that the engine is in
KEEP_SECONDS = 5.0  # for sessions to keep what readers that stand still have not taken
_log = logging.getLogger("retnet.serve")


def make_app(
    run: Run,
    name: str,
    settings: ServerSettings = ServerSettings(),  # noqa: B008 (frozen)
    *,
    keys: ApiKeys | None = None,
    sessions: str | Path | None = None,
    decoder: Decoder | None = None,
) -> FastAPI:
    """The server's application.

    Args:
        run: model and tokenizer.
        name: of the model, as clients call it.
        settings: slots, memory, limits.
        keys: who may use it; None is everybody.
        sessions: a directory or a URL of fsspec for sessions, which several servers may share; None keeps none.
        decoder: of the model, that generates; None is the fastest there is.

    Raises:
        UserError: a value outside its range, files of a chat template that cannot be read, a directory that cannot be
            made, a URL that cannot be opened.
    """
    app = FastAPI(
        title="retnet",
        version=__version__,
        description="Text of a retentive network: OpenAI's API, and sessions that can be forked and rewound.",
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = _service(run, name, settings, sessions, decoder)
    for routes in (
        plain_routes,
        completion_routes,
        embedding_routes,
        message_routes,
        response_routes,
        session_routes,
    ):
        app.include_router(routes.router)
    install_handlers(app)
    install_openapi(app)
    app.add_middleware(AccessMiddleware, keys=keys or ApiKeys(), files=plain_routes.FILES)
    app.add_middleware(CountingMiddleware, metrics=app.state.service.metrics)
    return app


def _service(
    run: Run, name: str, settings: ServerSettings, sessions: str | Path | None, decoder: Decoder | None
) -> Service:
    storage = None if sessions is None else open_storage(sessions)
    engine = Engine(
        decoder or run.model,
        run.tokenizer,
        slots=settings.slots,
        max_state_bytes=settings.max_state_bytes,
        exact=settings.exact,
        cache_bytes=settings.cache_bytes,
        state_directory=None if sessions is None else f"{str(sessions).rstrip('/')}/{STATES}",
    )
    least = engine.state_bytes(room_for(2))
    if settings.max_state_bytes is not None and settings.max_state_bytes < least:
        raise UserError(
            f"max_state_bytes is {settings.max_state_bytes:,}, but one state takes {least:,}; allow at least that"
        )
    thread, gate = EngineThread(engine), Gate(settings.slots, settings.queue)
    return Service(
        name=name,
        model=run.model,
        tokenizer=run.tokenizer,
        engine=thread,
        settings=settings,
        gate=gate,
        metrics=ServerMetrics(gate),
        template=ChatTemplate(run.tokenizer, run.checkpoint),
        grammars=GrammarCheck(),
        sessions=SessionStore(thread, storage, settings.max_sessions),
        responses=ResponseStore(settings.max_sessions),
        state_bytes=engine.state_bytes(1),
        state_grows=engine.state_bytes(1) != engine.state_bytes(2),
        created=int(time.time()),
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    service.engine.start()
    await service.sessions.load()
    warming = asyncio.ensure_future(_warm_up(service))
    yield  # a second signal cancels this here, and nothing of what follows is done
    service.gate.close()
    stuck = not warming.done()  # kernels may be compiled for a minute yet; there is nothing to keep
    warming.cancel()
    with suppress(asyncio.CancelledError):
        await warming
    await service.template.close()
    if stuck:
        service.engine.stop(0)
        return
    await service.gate.wait_until_empty(KEEP_SECONDS)
    await service.sessions.flush()
    if not await asyncio.to_thread(service.engine.stop, STOP_SECONDS):
        _log.warning("the engine did not end within %g seconds", STOP_SECONDS)


async def _warm_up(service: Service) -> None:
    try:
        await service.warm_up()
    except Exception:
        _log.exception("the model cannot generate; the server will not be ready")


class CountingMiddleware:
    """Counts answers by path and status; what goes wrong before one has begun is answered with OpenAI's envelope.

    Args:
        app: whose answers.
        metrics: where.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if status:
                raise
            await as_api_error(error).response()(scope, receive, watched)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", None) or "other"
            self._metrics.requests.labels(path, str(status)).inc()
