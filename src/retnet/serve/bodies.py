"""Requests of the API as strict pydantic models: a wrong type, range or name is refused by the name of its field."""

from __future__ import annotations

import reprlib
import secrets
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from retnet.engine import Grammar, Sampling
from retnet.serve.errors import ApiError
from retnet.settings import nearest

# Lists end at their first fault: of a body with millions of them each would be an object.
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
SeveralStops = Annotated[list[Stop], Field(max_length=16, fail_fast=True)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
AnyTokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
TokenIds = Annotated[AnyTokenIds, Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=2048, fail_fast=True)]
SeveralTokenIds = Annotated[list[TokenIds], Field(min_length=1, max_length=2048, fail_fast=True)]
MOST_BIASES = 1024
MOST_FIELDS = 100  # of an object whose fields have names
Whole = Annotated[int, Field(ge=1, lt=1 << 31)]
SEED_END = 1 << 63
MOST_LOGPROBS = 20
PROMPT = "a string, a list of strings, a list of token ids, or a list of such lists, of at most 2,048 texts"


def _few(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict) and len(value) > MOST_BIASES:
        raise PydanticCustomError("too_many", f"must have at most {MOST_BIASES:,} ids")
    return value


Biases = Annotated[dict[str, Annotated[float, Field(ge=-1000, le=1000)]], BeforeValidator(_few)]


class StrictBody(BaseModel):
    """A body whose fields are all known; those of OpenAI's that are not supported say so, and may be null.

    Attributes:
        NOT_SUPPORTED: fields of OpenAI's API that this server has nothing for.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    NOT_SUPPORTED: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:  # noqa: ANN401
        """A field that is null is one that is not given."""
        if not isinstance(value, dict):
            return value
        if len(value) > MOST_FIELDS:
            raise PydanticCustomError("too_many_fields", f"must have at most {MOST_FIELDS} fields")
        return {name: item for name, item in value.items() if item is not None}


class StreamOptions(StrictBody):
    """How a stream is sent."""

    NOT_SUPPORTED = frozenset({"include_obfuscation"})
    include_usage: bool = False
    continuous_usage_stats: bool = Field(
        False, description="is not used; usage comes once, in the last event"
    )


class SamplingBody(StrictBody):
    """What requests for text have in common."""

    model: str | None = Field(None, description="the name that /v1/models gives; may be left out")
    temperature: float = Field(1.0, ge=0, le=1000, description="0 is the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=1 << 31, description="0 keeps all tokens")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-1000, le=1000)
    frequency_penalty: float = Field(0.0, ge=-1000, le=1000)
    repetition_penalty: float = Field(1.0, ge=1e-6, le=1000)
    logit_bias: Biases = Field({}, max_length=MOST_BIASES, description="token id → number added to its logit")
    stop: Stop | SeveralStops = Field([], description="a string, or up to 16, each of 1 to 1,024 characters")
    stop_token_ids: AnyTokenIds = Field([], max_length=64)
    min_tokens: int = Field(0, ge=0, lt=1 << 31)
    ignore_eos: bool = Field(False, description="nothing but max_tokens ends a text, as load tests ask")
    seed: int | None = Field(None, ge=0, lt=SEED_END, description="the same seed, the same text")
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="is not used")
    cache: bool = Field(True, description="whether kept states may be used for it, and left by it")
    json_schema: dict[str, Any] | None = Field(None, description="the text is JSON of this schema")
    regex: str | None = Field(None, max_length=4096, description="the text matches it")
    choice: Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, min_length=1, max_length=1024, description="the text is one of them"
    )

    def options(self, max_tokens: int) -> dict[str, Any]:
        """The arguments of an engine's request that these fields say, of one for so many tokens."""
        bias = []
        for name, value in self.logit_bias.items():
            if not (name.isascii() and name.isdecimal() and len(name) < 12):
                raise ApiError(
                    400,
                    f"logit_bias has {name[:40]!r} for a token id; ids are whole numbers",
                    param="logit_bias",
                )
            bias.append((int(name), value))
        names = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        )
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if "" in stop:
            raise ApiError(400, "stop must be a string of at least one character, got ''", param="stop")
        if self.ignore_eos and (stop or self.stop_token_ids or self.grammar() is not None):
            raise ApiError(
                400,
                "ignore_eos writes to the last token, which stop and a grammar may forbid; give one of them",
                param="ignore_eos",
            )
        return {
            "sampling": Sampling(**{name: getattr(self, name) for name in names}, logit_bias=tuple(bias)),
            "stop": stop,
            "stop_tokens": self.stop_token_ids,
            "min_tokens": max_tokens if self.ignore_eos else self.min_tokens,
            "seed": secrets.randbits(31) if self.seed is None else self.seed,
            "cache": self.cache,
            "grammar": self.grammar(),
        }

    def grammar(self) -> Grammar | None:
        """What the text has to be."""
        given = {name: getattr(self, name) for name in ("json_schema", "regex", "choice")}
        given = {name: value for name, value in given.items() if value is not None}
        return Grammar(**given) if given else None


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    NOT_SUPPORTED = frozenset({"best_of", "suffix"})
    prompt: str | TokenIds | Texts | SeveralTokenIds = Field("", description=PROMPT)
    max_tokens: Whole = 16
    n: int = Field(1, ge=1, le=128)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False


class ContentPart(StrictBody):
    """A part of a message: text alone."""

    type: Literal["text"]
    text: str


ContentParts = Annotated[list[ContentPart], Field(fail_fast=True)]


class ChatMessage(StrictBody):
    """A message of a conversation."""

    NOT_SUPPORTED = frozenset(
        {"audio", "function_call", "refusal", "tool_call_id", "tool_calls", "annotations"}
    )
    role: Literal["system", "developer", "user", "assistant"]
    content: str | ContentParts = Field(description="a string, or a list of parts {type: text, text}")
    name: str | None = Field(None, max_length=256, description="is not used")

    @property
    def text(self) -> str:
        """All of it."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class JsonSchema(StrictBody):
    """The schema of a response format."""

    NOT_SUPPORTED = frozenset({"description"})
    name: str = "answer"
    strict: bool = True
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(StrictBody):
    """What the answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    NOT_SUPPORTED = frozenset(
        {
            "audio",
            "function_call",
            "functions",
            "metadata",
            "modalities",
            "moderation",
            "parallel_tool_calls",
            "prediction",
            "prompt_cache_key",
            "prompt_cache_retention",
            "reasoning_effort",
            "safety_identifier",
            "service_tier",
            "store",
            "tool_choice",
            "tools",
            "verbosity",
            "web_search_options",
        }
    )
    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] = Field(min_length=1, max_length=10_000)
    max_tokens: Whole | None = Field(None, description="none: what the server allows")
    max_completion_tokens: Whole | None = Field(None, description="another name of max_tokens")
    n: int = Field(1, ge=1, le=128)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_LOGPROBS)
    response_format: ResponseFormat | None = None

    def grammar(self) -> Grammar | None:
        """What the text has to be, by `response_format` or our own fields."""
        form = self.response_format
        if form is None or form.type == "text":
            return super().grammar()
        if super().grammar() is not None:
            raise ApiError(
                400,
                "response_format goes with none of json_schema, regex and choice",
                param="response_format",
            )
        if form.type == "json_object":
            return Grammar(json_schema={"type": "object"})
        if form.json_schema is None:
            raise ApiError(400, "response_format json_schema has no json_schema", param="response_format")
        return Grammar(json_schema=form.json_schema.schema_)


class EmbeddingBody(StrictBody):
    """POST /v1/embeddings."""

    NOT_SUPPORTED = frozenset({"dimensions"})
    model: str | None = Field(None, description="the name that /v1/models gives; may be left out")
    input: str | TokenIds | Texts | SeveralTokenIds = Field(description=PROMPT)
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = Field(None, description="is not used")


class TokenizeBody(StrictBody):
    """POST /tokenize."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = Field(
        True, description="whether the document's beginning (BOS) is put before it"
    )


class DetokenizeBody(StrictBody):
    """POST /detokenize."""

    model: str | None = None
    tokens: AnyTokenIds


class SessionBody(StrictBody):
    """POST /v1/sessions: what it begins with; nothing is an empty document."""

    text: str | None = None
    tokens: TokenIds | None = Field(None, description="read as they are, without BOS")


class AppendBody(StrictBody):
    """POST /v1/sessions/ID/append: a text, or token ids."""

    text: str | None = None
    tokens: TokenIds | None = None


class RewindBody(StrictBody):
    """POST /v1/sessions/ID/rewind."""

    position: Whole = Field(description="how many tokens stay")


class EditBody(AppendBody):
    """POST /v1/sessions/ID/edit: what comes in the place of all tokens after a position."""

    position: Whole = Field(description="how many tokens stay")


class EmptyBody(StrictBody):
    """A verb that needs nothing said."""


class SessionGenerateBody(SamplingBody):
    """POST /v1/sessions/ID/generate."""

    max_tokens: Whole = 256


Body = TypeVar("Body", bound=StrictBody)


def parse(kind: type[Body], content: bytes) -> Body:
    """The body that these bytes are.

    Raises:
        ApiError: naming the first field that is wrong, what it is, and what is allowed.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise _refusal(kind, error) from None


def _refusal(kind: type[StrictBody], error: ValidationError) -> ApiError:
    faults = error.errors(include_url=False, include_context=False)
    first = faults[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if first["type"] == "too_many_fields":
        return ApiError(400, f"{_path(place) or 'the body'} {first['msg']}, got {len(first['input']):,}")
    if not place:
        return ApiError(400, f"the body must be a JSON object, got {_shown(first['input'])}")
    name = place[0]
    if first["type"] == "extra_forbidden":
        inner = _inner(kind, place[:-1])
        if place[-1] in inner.NOT_SUPPORTED:
            return ApiError(
                400, f"{place[-1]} is not supported by this server; leave it out", param=place[-1]
            )
        known = nearest(place[-1], list(inner.model_fields))
        return ApiError(400, f"there is no field {place[-1][:80]!r}; {known}", param=place[-1][:80])
    if first["type"] == "missing":
        return ApiError(400, f"{_path(place)} is missing", param=name)
    branches = {str(fault["loc"][1:2]) for fault in faults if fault["loc"][0] == name}
    description = kind.model_fields[name].description
    if len(branches) > 1 and description:  # it is none of several kinds
        return ApiError(400, f"{name} must be {description}", param=name)
    what = first["msg"].replace("Input should be", "must be")
    return ApiError(400, f"{_path(place)} {what}, got {_shown(first['input'])}", param=name)


def _inner(kind: type[StrictBody], place: list[str]) -> type[StrictBody]:
    """The body at a place of another one."""
    for name in place:
        if name in kind.model_fields:
            kind = next(iter(_bodies_in(kind.model_fields[name].annotation)), kind)
    return kind


def _bodies_in(annotation: Any) -> list[type[StrictBody]]:  # noqa: ANN401
    if isinstance(annotation, type) and issubclass(annotation, StrictBody):
        return [annotation]
    return [body for part in get_args(annotation) for body in _bodies_in(part)]


def _path(place: list[str]) -> str:
    """Such as messages[0].role."""
    text = ""
    for part in place:
        if part != "str" and not part.startswith("list["):  # which of several kinds it was taken for
            text += f"[{part}]" if part.isdecimal() else f".{part}" if text else part
    return text[:200]


def _shown(value: Any) -> str:  # noqa: ANN401
    text = reprlib.repr(value) if isinstance(value, list | dict) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
