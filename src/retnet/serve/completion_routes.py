"""POST /v1/completions and /v1/chat/completions, whole and streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from retnet.engine import Completion, Request, TokenLogprobs
from retnet.serve.arrivals import Delta
from retnet.serve.bodies import ChatBody, CompletionBody, SamplingBody
from retnet.serve.chat_template import ChatTurn
from retnet.serve.documents import documented, read
from retnet.serve.errors import ApiError
from retnet.serve.events import (
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    ChatReply,
    Reply,
    TextChoice,
    chat_logprobs,
    reason,
    sse,
    text_logprobs,
    usage,
)
from retnet.serve.service import Service, owner_of, running, service_of
from retnet.serve.streaming import EventStream, answer

router = APIRouter()
Done = dict[tuple[int, int], Completion]
Choices = Callable[[int, Delta], list[Any]]


@router.post("/v1/completions", **documented(CompletionBody, "Continue a text"))
async def completions(request: HttpRequest) -> Response:
    """Continues a prompt, or each of several; OpenAI's completions, and more ways to sample."""
    service = service_of(request)
    body = await read(request, CompletionBody)
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo with logprobs is not supported; ask for one of them", param="logprobs")
    prompts = await _prompts(service, body)
    options = body.options(body.max_tokens) | {
        "max_tokens": body.max_tokens,
        "samples": body.n,
        "logprobs": body.logprobs,
        "cache_salt": owner_of(request),
    }
    requests = [Request(ids, echo=text, **options) for ids, text in prompts]
    offsets: dict[int, int] = {}

    def index(number: int, sample: int) -> int:
        return number * body.n + sample

    def choices(number: int, piece: Delta) -> list[Any]:
        place = index(number, piece.sample)
        logprobs = None
        if piece.logprobs:
            logprobs = text_logprobs(service.tokenizer, piece.logprobs, offsets.get(place, 0))
            last = service.tokenizer.decode([piece.logprobs[-1].token])
            offsets[place] = logprobs["text_offset"][-1] + len(last)
        return [TextChoice(place, piece.text, logprobs, reason(piece.completion))]

    def whole(done: Done) -> list[Any]:
        return [
            TextChoice(
                index(*where),
                completion.text,
                None if body.logprobs is None else text_logprobs(service.tokenizer, completion.logprobs),
                reason(completion),
            )
            for where, completion in sorted(done.items())
        ]

    head = Reply(f"cmpl-{uuid.uuid4().hex}", "text_completion", int(time.time()), service.name, [])
    return await respond(request, service, body, requests, head, head, choices, whole)


@router.post("/v1/chat/completions", **documented(ChatBody, "Answer a conversation"))
async def chat(request: HttpRequest) -> Response:
    """Answers a conversation; its prompt is made by the model's chat template, or by a plain one."""
    service = service_of(request)
    body = await read(request, ChatBody)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(
            400, "max_tokens and max_completion_tokens mean the same; give one", param="max_tokens"
        )
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    wanted = body.max_tokens or body.max_completion_tokens or service.settings.max_tokens
    named_tokens = body.top_logprobs if body.logprobs else None
    options = body.options(wanted) | {"samples": body.n, "logprobs": named_tokens}
    turns = [ChatTurn(each.role, each.text) for each in body.messages]
    engine_request = await chat_request(service, owner_of(request), turns, options, wanted)
    begun: set[int] = set()

    def named(places: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        return chat_logprobs(service.tokenizer, places) if places else None

    def choices(number: int, piece: Delta) -> list[Any]:
        role = None if piece.sample in begun else "assistant"
        begun.add(piece.sample)
        delta = ChatDelta(role, piece.text if piece.text or role else None)
        return [ChatChunkChoice(piece.sample, delta, named(piece.logprobs), reason(piece.completion))]

    def whole(done: Done) -> list[Any]:
        return [
            ChatChoice(sample, ChatReply(completion.text), named(completion.logprobs), reason(completion))
            for (_, sample), completion in sorted(done.items())
        ]

    made = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
    head = Reply(made[0], "chat.completion", made[1], service.name, [])
    chunk = Reply(made[0], "chat.completion.chunk", made[1], service.name, [])
    return await respond(request, service, body, [engine_request], head, chunk, choices, whole)


async def chat_request(
    service: Service, owner: str, turns: Sequence[ChatTurn], options: dict[str, Any], max_tokens: int
) -> Request:
    """The engine's request for an answer to a conversation.

    Args:
        service: whose template.
        owner: whose request it is.
        turns: the conversation.
        options: of the request; the template's own stops are added.
        max_tokens: of the answer.

    Raises:
        ApiError: the template refuses the conversation, or it is too long.
    """
    rendered = await service.template.render(turns)
    service.check_tokens(len(rendered.tokens), max_tokens)
    stops = {
        "stop": (*options["stop"], *rendered.stop),
        "stop_tokens": (*options["stop_tokens"], *rendered.stop_tokens),
    }
    more = options | stops | {"max_tokens": max_tokens, "cache_salt": owner}
    return Request(rendered.tokens, marks=rendered.marks, **more)


async def respond(
    request: HttpRequest,
    service: Service,
    body: SamplingBody,
    requests: Sequence[Request],
    head: Reply,
    chunk: Reply,
    choices: Choices,
    whole: Callable[[Done], list[Any]],
    stack: AsyncExitStack | None = None,
    on_done: Callable[[Reply, Done], Any] | None = None,
) -> Response:
    """Runs requests, and answers with a stream or with everything at the end.

    Args:
        request: of HTTP.
        service: what is served.
        body: says whether to stream, and with which usage.
        requests: for the engine.
        head: the answer without choices.
        chunk: a piece of a stream without choices.
        choices: of a piece, of the number of its request.
        whole: choices of everything.
        stack: what is to be closed at the end.
        on_done: a coroutine function that is awaited with the last answer before it is sent.

    Raises:
        ApiError: nothing was begun.
        UserError: as `Engine.submit`.
    """
    stack = stack or AsyncExitStack()
    options = body.stream_options
    if options is not None and not body.stream:
        await stack.aclose()
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
    try:
        partial = on_done is not None  # what has come is kept, and may be gone on from
        pieces = await stack.enter_async_context(running(service, requests, partial=partial))
    except BaseException:
        await stack.aclose()
        raise
    done: Done = {}
    counted = options is not None and options.include_usage

    def keep(number: int, piece: Delta) -> None:
        if piece.completion is not None:
            done[number, piece.sample] = piece.completion

    async def stream() -> AsyncIterator[bytes]:
        last = msgspec.structs.replace(chunk, choices=[], usage=None if counted else msgspec.UNSET)
        kept = on_done is None
        try:
            async for number, piece in pieces:
                keep(number, piece)
                if piece.text or piece.logprobs or piece.completion is not None:
                    yield sse(msgspec.structs.replace(last, choices=choices(number, piece)))
            if on_done is not None:
                kept = True
                await on_done(last, done)
            if counted or on_done is not None:
                last.usage = usage(done)
                yield sse(last)
        finally:
            if (
                not kept and on_done is not None and service.gate.ended
            ):  # the reader stood still until the end
                async for number, piece in pieces:
                    keep(number, piece)
                if done:  # not where it failed
                    await on_done(last, done)

    async def all_of_it() -> bytes:
        async with stack:
            async for number, piece in pieces:
                keep(number, piece)
            full = msgspec.structs.replace(head, choices=whole(done), usage=usage(done))
            if on_done is not None:
                await on_done(full, done)
            return msgspec.json.encode(full)

    if body.stream:
        return EventStream(stream(), stack, service.metrics, service.settings.timeout + 5)
    return await answer(request, service.metrics, all_of_it())


async def _prompts(service: Service, body: CompletionBody) -> list[tuple[list[int], str | bool]]:
    """The prompts of a body: ids, with BOS where it has texts; and whether or which text is echoed."""
    given: Any = body.prompt
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    prompts: list[tuple[list[int], str | bool]] = []
    for each in several:
        ids = each if isinstance(each, list) else [service.tokenizer.bos_id, *await service.encode(each)]
        service.check_tokens(len(ids), body.max_tokens)
        prompts.append((ids, each if body.echo and isinstance(each, str) else body.echo))
    return prompts
