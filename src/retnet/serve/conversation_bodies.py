"""Requests of Anthropic's messages and OpenAI's responses, as strict as those of completions."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import Field

from retnet.engine import Sampling
from retnet.serve.bodies import ContentParts, SeveralStops, StrictBody, Whole


class AnthropicMessage(StrictBody):
    """A message of a conversation in Anthropic's API."""

    role: Literal["user", "assistant"]
    content: str | ContentParts = Field(description="a string, or a list of parts {type: text, text}")

    @property
    def text(self) -> str:
        """All of it."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class CountBody(StrictBody):
    """POST /v1/messages/count_tokens."""

    NOT_SUPPORTED = frozenset(
        {"cache_control", "mcp_servers", "output_config", "thinking", "tool_choice", "tools"}
    )
    model: str | None = None
    messages: Annotated[list[AnthropicMessage], Field(fail_fast=True)] = Field(
        min_length=1, max_length=10_000
    )
    system: str | ContentParts | None = Field(
        None, description="a string, or a list of parts {type: text, text}"
    )


class MessagesBody(CountBody):
    """POST /v1/messages."""

    NOT_SUPPORTED = CountBody.NOT_SUPPORTED | {
        "container",
        "context_management",
        "inference_geo",
        "metadata",
        "service_tier",
    }
    max_tokens: Whole
    temperature: float = Field(1.0, ge=0, le=1)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=1 << 31)
    stop_sequences: SeveralStops = Field([])
    stream: bool = False

    def options(self) -> dict[str, Any]:
        """The arguments of an engine's request that these fields say."""
        sampling = Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)
        return {
            "sampling": sampling,
            "stop": self.stop_sequences,
            "stop_tokens": (),
            "seed": secrets.randbits(31),
        }


class ResponsesPart(StrictBody):
    """A part of an input of the responses API: text alone."""

    NOT_SUPPORTED = frozenset({"annotations", "logprobs"})
    type: Literal["input_text", "output_text"]
    text: str


class ResponsesItem(StrictBody):
    """An item of an input of the responses API: a message."""

    NOT_SUPPORTED = frozenset({"id", "status", "phase"})
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ResponsesPart], Field(fail_fast=True)] = Field(
        description="a string, or a list of parts {type: input_text, text}"
    )


class ResponsesBody(StrictBody):
    """POST /v1/responses."""

    NOT_SUPPORTED = frozenset(
        {
            "background",
            "context_management",
            "conversation",
            "include",
            "max_tool_calls",
            "metadata",
            "parallel_tool_calls",
            "prompt",
            "prompt_cache_key",
            "prompt_cache_retention",
            "reasoning",
            "safety_identifier",
            "service_tier",
            "stream_options",
            "text",
            "tool_choice",
            "tools",
            "top_logprobs",
            "truncation",
        }
    )
    model: str | None = None
    input: str | Annotated[list[ResponsesItem], Field(fail_fast=True)] = Field(
        [], description="a string, or a list of messages"
    )
    instructions: str | None = Field(None, description="the system's word, for this response alone")
    previous_response_id: str | None = Field(None, max_length=128)
    max_output_tokens: Whole | None = None
    temperature: float = Field(1.0, ge=0, le=1000)
    top_p: float = Field(1.0, gt=0, le=1)
    store: bool = Field(True, description="whether others may go on from it")
    stream: bool = False
    user: str | None = Field(None, description="is not used")

    def options(self) -> dict[str, Any]:
        """The arguments of an engine's request that these fields say."""
        sampling = Sampling(temperature=self.temperature, top_p=self.top_p)
        return {"sampling": sampling, "stop": (), "stop_tokens": (), "seed": secrets.randbits(31)}

    def turns(self) -> list[tuple[str, str]]:
        """Role and text of each message of the input."""
        if isinstance(self.input, str):
            return [("user", self.input)]
        return [
            (
                item.role,
                item.content if isinstance(item.content, str) else "".join(p.text for p in item.content),
            )
            for item in self.input
        ]
