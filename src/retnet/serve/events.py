"""Answers of the API, encoded by msgspec: completions, chat completions, their chunks, usage, server-sent events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from retnet.data import Tokenizer
from retnet.engine import Completion, TokenLogprobs

DONE = b"data: [DONE]\n\n"
Reason = Literal["stop", "length", "interrupted"]


class CachedTokens(msgspec.Struct):
    """How many tokens of a prompt did not have to be read."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens of a request; the prompt's are counted once, however many texts continue it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TextChoice(msgspec.Struct):
    """A text, or a piece of it."""

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: Reason | None = None


class ChatReply(msgspec.Struct):
    """The answer of a conversation."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatDelta(msgspec.Struct, omit_defaults=True):
    """A piece of it."""

    role: str | None = None
    content: str | None = None


class ChatChoice(msgspec.Struct):
    """One of the answers."""

    index: int
    message: ChatReply
    logprobs: dict[str, Any] | None = None
    finish_reason: Reason | None = None


class ChatChunkChoice(msgspec.Struct):
    """A piece of one of the answers."""

    index: int
    delta: ChatDelta
    logprobs: dict[str, Any] | None = None
    finish_reason: Reason | None = None


class Reply(msgspec.Struct):
    """What is answered, whole or in pieces."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    session: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


def sse(value: Any) -> bytes:  # noqa: ANN401
    """A server-sent event."""
    return b"data: " + (value if isinstance(value, bytes) else msgspec.json.encode(value)) + b"\n\n"


def usage(done: dict[tuple[int, int], Completion]) -> Usage:
    """Of completions by number of prompt and sample."""
    first = [completion for (_, sample), completion in done.items() if sample == 0]
    prompt, made = sum(c.prompt_tokens for c in first), sum(len(c.tokens) for c in done.values())
    return Usage(prompt, made, prompt + made, CachedTokens(sum(c.cached_tokens for c in first)))


def reason(completion: Completion | None) -> Reason | None:
    """Why a text ended, in OpenAI's words, and "interrupted" where a shutdown ended it; None while it goes on."""
    if completion is None:
        return None
    return completion.finish if completion.finish in ("length", "interrupted") else "stop"


def text_logprobs(tokenizer: Tokenizer, places: Sequence[TokenLogprobs], offset: int = 0) -> dict[str, Any]:
    """Log-probabilities as completions have them; `offset` is where the first token begins, in characters."""
    offsets = []
    for place in places:
        offsets.append(offset)
        offset += len(tokenizer.decode([place.token]))
    top = [{_named(tokenizer, token): logprob for token, logprob in reversed(place.top)} for place in places]
    return {
        "tokens": [_named(tokenizer, place.token) for place in places],
        "token_logprobs": [place.logprob for place in places],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def _named(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; where it is part of a character its bytes, as OpenAI writes them, so that no two are the same."""
    content = tokenizer.decode_bytes([token])
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def chat_logprobs(tokenizer: Tokenizer, places: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Log-probabilities as chats have them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        exact = tokenizer.decode_bytes([token])
        return {"token": exact.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(exact)}

    content = [
        {**entry(place.token, place.logprob), "top_logprobs": [entry(*pair) for pair in place.top]}
        for place in places
    ]
    return {"content": content, "refusal": None}
