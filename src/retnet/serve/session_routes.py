"""/v1/sessions: texts that go on, and can be forked, rewound, edited, saved, taken away and brought back."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from retnet.engine import Engine, Session
from retnet.serve.access import read_body
from retnet.serve.arrivals import Delta
from retnet.serve.bodies import AppendBody, EditBody, EmptyBody, RewindBody, SessionBody, SessionGenerateBody
from retnet.serve.completion_routes import Done, respond
from retnet.serve.documents import BYTES, documented, read
from retnet.serve.errors import ApiError
from retnet.serve.events import Reply, TextChoice, reason
from retnet.serve.service import Service, owner_of, service_of
from retnet.serve.session_records import SessionEntry, described
from retnet.settings import UserError

router = APIRouter(prefix="/v1/sessions")
KEPT_STATES = 64  # that an import may bring, beside its tokens


@router.post("", **documented(SessionBody, "Create a session", status=201))
async def create(request: HttpRequest) -> Response:
    """A session with nothing but a document's beginning, with a text after it, or with these token ids."""
    service, owner = service_of(request), owner_of(request)
    body = await read(request, SessionBody)
    if body.text is not None and body.tokens is not None:
        raise ApiError(400, "give text or tokens, not both", param="text")
    more = await service.encode(body.text or "")

    def make(engine: Engine, name: str) -> Session:
        session = Session(engine, body.tokens, name=name, cache_salt=owner)
        session.append(more)
        service.check_tokens(len(session.tokens), 1)
        return session

    entry = await service.sessions.add(owner, make)
    return _shown(service, entry, status=201)


@router.get("", summary="List sessions", response_model=None)
async def list_all(request: HttpRequest) -> Response:
    """The sessions of this key, the oldest first."""
    service = service_of(request)
    entries = await service.sessions.list_of(owner_of(request))
    data = [described(entry, service.name, service.state_bytes) for entry in entries]
    return _json({"object": "list", "data": data})


@router.post("/import", **documented(None, "Import a session", status=201))
async def bring(request: HttpRequest) -> Response:
    """The session that an export is of, under a new id; it belongs to the key that brings it."""
    service, owner = service_of(request), owner_of(request)
    most = service.settings.max_body_bytes + KEPT_STATES * service.state_bytes
    content = await read_body(request, most, BYTES)

    def make(engine: Engine, name: str) -> Session:
        try:
            session = Session.from_bytes(engine, content, name=name, cache_salt=owner)
        except UserError:
            raise
        except Exception as error:  # what nobody thought of, in bytes that anybody may send
            raise UserError(f"this is no session, or a damaged one: {type(error).__name__}") from error
        service.check_tokens(len(session.tokens), 1)
        return session

    return _shown(service, await service.sessions.add(owner, make), status=201)


@router.get("/{session}", summary="Show a session", response_model=None)
async def show(request: HttpRequest, session: str) -> Response:
    """Its text and tokens, beside position and marks."""
    service = service_of(request)
    entry = await service.sessions.find(owner_of(request), session)
    tokens = await service.engine.call(lambda engine: list(entry.session.tokens))
    text = await service.decode(tokens)
    return _json(described(entry, service.name, service.state_bytes) | {"text": text, "tokens": tokens})


@router.delete("/{session}", summary="Delete a session", response_model=None)
async def delete(request: HttpRequest, session: str) -> Response:
    """Forgets it, in memory and on disk."""
    sessions = service_of(request).sessions
    async with sessions.use(owner_of(request), session) as entry:
        await sessions.delete(entry)
    return _json({"id": session, "object": "session.deleted", "deleted": True})


@router.post("/{session}/append", **documented(AppendBody, "Append text or tokens"))
async def append(request: HttpRequest, session: str) -> Response:
    """Adds a text or token ids; they are read when something is generated."""
    body = await read(request, AppendBody)
    return await _change(request, session, lambda kept, more: kept.append(more), body)


@router.post("/{session}/rewind", **documented(RewindBody, "Rewind to a position"))
async def rewind(request: HttpRequest, session: str) -> Response:
    """Takes back all tokens after a position."""
    body = await read(request, RewindBody)
    return await _change(request, session, lambda kept, _: kept.rewind(body.position))


@router.post("/{session}/edit", **documented(EditBody, "Replace all tokens after a position"))
async def edit(request: HttpRequest, session: str) -> Response:
    """Puts something else in the place of all tokens after a position."""
    body = await read(request, EditBody)
    return await _change(request, session, lambda kept, more: kept.edit(body.position, more), body)


@router.post("/{session}/fork", **documented(EmptyBody, "Fork a session", status=201))
async def fork(request: HttpRequest, session: str) -> Response:
    """Another session with the same text, and its own id; from here on they know nothing of each other."""
    await read(request, EmptyBody)
    service, owner = service_of(request), owner_of(request)
    async with service.sessions.use(owner, session) as entry:
        made = await service.sessions.add(owner, lambda engine, name: entry.session.fork(name))
    return _shown(service, made, status=201)


@router.post("/{session}/save", **documented(EmptyBody, "Write a session's states to disk"))
async def save(request: HttpRequest, session: str) -> Response:
    """Writes states to the server's directory, so that after a restart nothing has to be read again."""
    await read(request, EmptyBody)
    service = service_of(request)
    async with service.sessions.use(owner_of(request), session) as entry:
        await service.sessions.save(entry)
    return _shown(service, entry)


@router.get(
    "/{session}/export",
    summary="Export a session as bytes",
    response_model=None,
    responses={200: {"content": {BYTES: {"schema": {"type": "string", "format": "binary"}}}}},
)
async def export(request: HttpRequest, session: str, every: bool = False) -> Response:
    """Tokens and the last state as a safetensors file; with `every`, all states that are kept along the text."""
    service = service_of(request)
    async with service.sessions.use(owner_of(request), session) as entry:
        content = await service.engine.call(lambda engine: entry.session.export(every=every))
    name = f'attachment; filename="{session}.safetensors"'
    return Response(
        content, media_type=BYTES, headers={"Content-Disposition": name, "Cache-Control": "no-store"}
    )


@router.post("/{session}/generate", **documented(SessionGenerateBody, "Continue a session"))
async def generate(request: HttpRequest, session: str) -> Response:
    """Continues a session and adds what was generated; a client that leaves leaves the session as it was.

    What a shutdown cuts short is added too, as far as it was sent; its `finish_reason` is "interrupted".
    """
    service = service_of(request)
    body = await read(request, SessionGenerateBody)
    stack = AsyncExitStack()
    entry = await stack.enter_async_context(service.sessions.use(owner_of(request), session))
    try:
        service.check_tokens(entry.position + body.max_tokens, body.max_tokens)
        options = body.options(body.max_tokens) | {"max_tokens": body.max_tokens}
        engine_request = await service.engine.call(lambda engine: entry.session.request(**options))
    except BaseException:
        await stack.aclose()
        raise

    def choices(number: int, piece: Delta) -> list[Any]:
        return [TextChoice(0, piece.text, None, reason(piece.completion))]

    def whole(done: Done) -> list[Any]:
        return [TextChoice(0, done[0, 0].text, None, reason(done[0, 0]))]

    async def on_done(reply: Reply, done: Done) -> None:
        await service.sessions.extend(entry, done[0, 0])
        reply.session = described(entry, service.name, service.state_bytes) | {"busy": False}

    head = Reply(f"cmpl-{uuid.uuid4().hex}", "text_completion", int(time.time()), service.name, [])
    return await respond(request, service, body, [engine_request], head, head, choices, whole, stack, on_done)


async def _change(
    request: HttpRequest,
    name: str,
    verb: Callable[[Session, list[int]], None],
    body: AppendBody | None = None,
) -> Response:
    """Changes a session by a verb, of it and of what a body adds."""
    service, more = service_of(request), list[int]()

    def checked(session: Session) -> None:
        before = len(session.tokens)
        verb(session, more)
        if len(session.tokens) > before:
            service.check_tokens(len(session.tokens), 1)

    async with service.sessions.use(owner_of(request), name) as entry:
        if body is not None:
            more = await _added(service, entry, body)
        await service.sessions.change(entry, checked)
        shown = described(entry, service.name, service.state_bytes) | {"busy": False}
    return _json(shown)


async def _added(service: Service, entry: SessionEntry, body: AppendBody) -> list[int]:
    """The ids of what a body adds to a session; a text becomes ids beside the engine, which goes on."""
    if (body.text is None) == (body.tokens is None):
        raise ApiError(400, "give text or tokens, one of the two", param="text")
    if body.text is None:
        return body.tokens or []
    position = body.position if isinstance(body, EditBody) else None
    return await service.encode(
        body.text, await service.engine.call(lambda engine: entry.session.before(position))
    )


def _shown(service: Service, entry: SessionEntry, status: int = 200) -> Response:
    return _json(described(entry, service.name, service.state_bytes) | {"busy": False}, status)


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
