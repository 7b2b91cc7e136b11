"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API for the same conversations."""

from __future__ import annotations

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
from retnet.serve.conversation_bodies import CountBody, MessagesBody
from retnet.serve.documents import documented, read
from retnet.serve.errors import ApiError
from retnet.serve.service import Service, completion_of, owner_of, running, service_of
from retnet.serve.streaming import EventStream, answer

router = APIRouter(prefix="/v1/messages")


@router.post("", **documented(MessagesBody, "Answer a conversation, as Anthropic's API has it"))
async def messages(request: HttpRequest) -> Response:
    """Answers a conversation; whole, or as a stream of Anthropic's events."""
    service = service_of(request)
    body = await read(request, MessagesBody)
    asked = await chat_request(service, owner_of(request), turns_of(body), body.options(), body.max_tokens)
    name = f"msg_{uuid.uuid4().hex}"
    stack = AsyncExitStack()
    pieces = await stack.enter_async_context(running(service, [asked]))

    async def stream() -> AsyncIterator[bytes]:
        usage = {"input_tokens": len(asked.prompt), "output_tokens": 0}
        start = _message(service, name, [], None, None, usage)
        yield _event("message_start", message=start)
        yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        async for _, piece in pieces:
            if piece.text:
                yield _event("content_block_delta", index=0, delta={"type": "text_delta", "text": piece.text})
            if (done := piece.completion) is not None:
                yield _event("content_block_stop", index=0)
                reason, stop = _reason(service, body, done)
                delta = {"stop_reason": reason, "stop_sequence": stop}
                yield _event("message_delta", delta=delta, usage=_usage(done))
                yield _event("message_stop")

    async def whole() -> bytes:
        async with stack:
            done = await completion_of(pieces)
            content = [{"type": "text", "text": done.text}]
            return msgspec.json.encode(
                _message(service, name, content, *_reason(service, body, done), _usage(done))
            )

    if body.stream:
        seconds = service.settings.timeout + 5
        return EventStream(stream(), stack, service.metrics, seconds, done=b"", failed=_failed)
    return await answer(request, service.metrics, whole())


@router.post("/count_tokens", **documented(CountBody, "Count the tokens of a conversation"))
async def count(request: HttpRequest) -> Response:
    """How many tokens its prompt has, by the model's own tokenizer."""
    service = service_of(request)
    body = await read(request, CountBody)
    rendered = await service.template.render(turns_of(body))
    return Response(
        msgspec.json.encode({"input_tokens": len(rendered.tokens)}), media_type="application/json"
    )


def turns_of(body: CountBody) -> list[ChatTurn]:
    """The conversation of a body, the system's word first."""
    system = body.system if isinstance(body.system, str) else "".join(part.text for part in body.system or [])
    turns = [ChatTurn("system", system)] if system else []
    return turns + [ChatTurn(each.role, each.text) for each in body.messages]


def _message(
    service: Service,
    name: str,
    content: list[Any],
    reason: str | None,
    stop: str | None,
    usage: dict[str, int],
) -> dict[str, Any]:
    return {
        "id": name,
        "type": "message",
        "role": "assistant",
        "model": service.name,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": stop,
        "usage": usage,
    }


def _usage(done: Completion) -> dict[str, int]:
    read_now = done.prompt_tokens - done.cached_tokens
    return {
        "input_tokens": read_now,
        "cache_read_input_tokens": done.cached_tokens,
        "output_tokens": len(done.tokens),
    }


def _reason(service: Service, body: MessagesBody, done: Completion) -> tuple[str, str | None]:
    """Why it ended in Anthropic's words, and which of the client's strings ended it."""
    if done.finish == "length":
        return "max_tokens", None
    text = service.tokenizer.decode(done.tokens)
    found = sorted((text.find(stop) + len(stop), stop) for stop in body.stop_sequences if stop in text)
    return ("stop_sequence", found[0][1]) if done.finish == "stop" and found else ("end_turn", None)


def _failed(error: ApiError) -> bytes:
    """What went wrong, in the words that Anthropic's clients raise as an error; others they pass over."""
    kind = {400: "invalid_request_error", 429: "rate_limit_error", 503: "overloaded_error"}.get(error.status)
    return _event("error", error={"type": kind or "api_error", "message": error.message})


def _event(kind: str, **fields: Any) -> bytes:  # noqa: ANN401
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind, **fields}))
