"""/v1/responses: OpenAI's conversations that the server remembers, by `previous_response_id`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from retnet.engine import Completion
from retnet.serve.chat_template import ChatTurn
from retnet.serve.completion_routes import chat_request
from retnet.serve.conversation_bodies import ResponsesBody
from retnet.serve.documents import documented, read
from retnet.serve.errors import ApiError
from retnet.serve.response_store import StoredResponse
from retnet.serve.service import Service, completion_of, owner_of, running, service_of
from retnet.serve.streaming import EventStream, answer

router = APIRouter(prefix="/v1/responses")


@router.post("", **documented(ResponsesBody, "Answer a conversation that goes on"))
async def respond_to(request: HttpRequest) -> Response:
    """Answers an input, or goes on from an earlier response; what was read then is not read again."""
    service, owner = service_of(request), owner_of(request)
    body = await read(request, ResponsesBody)
    before = body.previous_response_id
    turns = list(service.responses.find(owner, before).turns) if before is not None else []
    turns += [ChatTurn(role, text) for role, text in body.turns()]
    if not turns:
        raise ApiError(400, "input is missing", param="input")
    said = [ChatTurn("system", body.instructions)] if body.instructions else []
    wanted = body.max_output_tokens or service.settings.max_tokens
    asked = await chat_request(service, owner, said + turns, body.options(), wanted)
    name, created = f"resp_{uuid.uuid4().hex}", int(time.time())
    stack = AsyncExitStack()
    pieces = await stack.enter_async_context(running(service, [asked]))

    def record(done: Completion | None) -> dict[str, Any]:
        return _record(service, body, name, created, done)

    def keep(done: Completion) -> dict[str, Any]:
        full = record(done)
        if body.store:
            service.responses.put(
                name, StoredResponse(owner, (*turns, ChatTurn("assistant", done.text)), full)
            )
        return full

    async def stream() -> AsyncIterator[bytes]:
        number = -1

        def event(kind: str, **fields: Any) -> bytes:  # noqa: ANN401
            nonlocal number
            number += 1
            content = msgspec.json.encode({"type": kind, "sequence_number": number, **fields})
            return b"event: %b\ndata: %b\n\n" % (kind.encode(), content)

        place = {"item_id": _item_id(name), "output_index": 0}
        part = {**place, "content_index": 0}
        yield event("response.created", response=record(None))
        yield event("response.in_progress", response=record(None))
        yield event("response.output_item.added", output_index=0, item=_item(name, None))
        yield event("response.content_part.added", **part, part=_part(""))
        done = None
        async for _, piece in pieces:
            done = piece.completion
            if piece.text:
                yield event("response.output_text.delta", **part, delta=piece.text, logprobs=[])
        assert done is not None
        full = keep(done)
        yield event("response.output_text.done", **part, text=done.text, logprobs=[])
        yield event("response.content_part.done", **part, part=_part(done.text))
        yield event("response.output_item.done", output_index=0, item=_item(name, done))
        yield event(f"response.{full['status']}", response=full)

    async def whole() -> bytes:
        async with stack:
            done = await completion_of(pieces)
            return msgspec.json.encode(keep(done))

    if body.stream:
        return EventStream(stream(), stack, service.metrics, service.settings.timeout + 5, done=b"")
    return await answer(request, service.metrics, whole())


@router.get("/{response}", summary="Show a response", response_model=None)
async def show(request: HttpRequest, response: str) -> Response:
    """As it was answered."""
    stored = service_of(request).responses.find(owner_of(request), response)
    return Response(msgspec.json.encode(stored.record), media_type="application/json")


@router.delete("/{response}", summary="Delete a response", response_model=None)
async def delete(request: HttpRequest, response: str) -> Response:
    """Forgets it; conversations that went on from it go on."""
    service_of(request).responses.delete(owner_of(request), response)
    gone = {"id": response, "object": "response", "deleted": True}
    return Response(msgspec.json.encode(gone), media_type="application/json")


def _record(
    service: Service, body: ResponsesBody, name: str, created: int, done: Completion | None
) -> dict[str, Any]:
    cut = done is not None and done.finish == "length"
    status = "in_progress" if done is None else "incomplete" if cut else "completed"
    return {
        "id": name,
        "object": "response",
        "created_at": created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": {},
        "model": service.name,
        "output": [] if done is None else [_item(name, done)],
        "parallel_tool_calls": False,
        "previous_response_id": body.previous_response_id,
        "store": body.store,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None if done is None else _usage(done),
    }


def _usage(done: Completion) -> dict[str, Any]:
    return {
        "input_tokens": done.prompt_tokens,
        "input_tokens_details": {"cached_tokens": done.cached_tokens},
        "output_tokens": len(done.tokens),
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": done.prompt_tokens + len(done.tokens),
    }


def _item_id(name: str) -> str:
    return name.replace("resp_", "msg_")


def _item(name: str, done: Completion | None) -> dict[str, Any]:
    status = "in_progress" if done is None else "incomplete" if done.finish == "length" else "completed"
    content = [] if done is None else [_part(done.text)]
    return {
        "id": _item_id(name),
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": content,
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
