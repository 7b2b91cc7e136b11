"""Requests to the engine, and the events and completions that come out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from retnet.engine.grammar import Grammar
from retnet.engine.sampling import Sampling
from retnet.engine.stops import StopScanner
from retnet.settings import UserError

Finish = Literal["stop", "end", "length", "interrupted", "failed"]


@dataclass(frozen=True)
class Request:
    """A prompt to continue, and how.

    Sample i of it depends on these fields and i alone: not on `samples`, on other requests, or on when it came.

    Attributes:
        prompt: a text, read as a document from its beginning (BOS is put before it, as in training), so that an empty one
            is a document from its first token; or token ids, at least one, read as they are.
        max_tokens: the most tokens to generate for each sample.
        sampling: how tokens are chosen.
        stop: strings that end a text, and are no part of it.
        stop_tokens: ids that end a text, as the tokenizer's `end_ids` always do, among them the beginning (BOS) of the next
            one; no part of it.
        min_tokens: before so many tokens are generated nothing but `max_tokens` ends a text: those ids are not chosen, stop
            strings not looked for.
        seed: where all chance comes from.
        samples: how many continuations. The prompt is read once for all.
        logprobs: None, or how many of the likeliest tokens to name beside each chosen one, with their log-probabilities in
            the model's own distribution, before bias, penalties, temperature and filters; 0 is the chosen one's alone.
        echo: whether the text given back begins with the prompt's; or the text that it begins with.
        cache: whether states along it may be kept for later requests, and kept ones used for it, where the engine has a
            cache.
        cache_salt: kept states are shared only by requests of the same one; empty is one too. Of whoever must not see, or
            may not be believed, what others keep.
        grammar: what the generated text must be; it ends where nothing may follow. Not together with `min_tokens`.
        marks: positions in the prompt, in tokens, where others may go on differently, such as ends of messages: the cache
            keeps states there.

    Raises:
        UserError: a value outside its range.
    """

    prompt: str | Sequence[int]
    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    min_tokens: int = 0
    seed: int = 0
    samples: int = 1
    logprobs: int | None = None
    echo: bool | str = False
    cache: bool = True
    cache_salt: str = ""
    marks: Sequence[int] = ()
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("min_tokens", 0), ("seed", 0), ("samples", 1)):
            require_whole(name, getattr(self, name), least)
        if self.logprobs is not None:
            require_whole("logprobs", self.logprobs, 0)
        if self.min_tokens > self.max_tokens:
            raise UserError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        if self.min_tokens and self.grammar is not None:
            raise UserError("min_tokens and grammar may ask for opposite things; give one of them")
        if isinstance(self.stop, str) or not all(isinstance(stop, str) for stop in self.stop):
            raise UserError(f"stop must be a list of strings, got {self.stop!r}")
        StopScanner(self.stop)  # refuses empty ones
        if not isinstance(self.prompt, str):
            object.__setattr__(self, "prompt", _ids("prompt", self.prompt))
            if not self.prompt:
                raise UserError("prompt has no tokens; give at least one, or a text")
        else:
            require_unicode("prompt", self.prompt)
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_tokens", _ids("stop_tokens", self.stop_tokens))
        object.__setattr__(self, "marks", _ids("marks", self.marks))


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one place of a text, in the model's own distribution.

    Attributes:
        token: the id that was chosen.
        logprob: its log-probability.
        top: the likeliest ids and theirs, best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Completion(NamedTuple):
    """What one sample of a request became.

    Attributes:
        text: the continuation, without a stop string, and without the prompt unless `Request.echo` asks for it.
        tokens: the ids generated, without the one that ended it. With a stop string they reach to its end or beyond.
        finish: why it ended: "stop" (a stop string or token), "end" (the model's end of text), "length" (`max_tokens`),
            "interrupted" (cancelled), "failed" (see `error`).
        prompt_tokens: tokens of the prompt, the leading BOS among them.
        cached_tokens: how many of these did not have to be read, since a kept state had seen them.
        logprobs: one for each of `tokens`, where `Request.logprobs` asks for them.
        error: why it failed.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    prompt_tokens: int
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    error: str = ""


class Event(NamedTuple):
    """A few more characters of one sample.

    Attributes:
        request: its id.
        sample: which of its samples, from 0.
        text: whole characters, certain to belong to the text; may be empty.
        token: the id that was added; None where none was, as with the token that ends a text.
        logprobs: of that token, where they were asked for.
        completion: all of it, with its last event; None before.
    """

    request: int
    sample: int
    text: str
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    completion: Completion | None = None


@dataclass
class Stats:
    """What the work took. Decoding counts what steps made; a first token comes with its prompt."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


def require_whole(name: str, value: Any, least: int) -> None:  # noqa: ANN401
    """Refuses what is not a whole number of `least` or more.

    Raises:
        UserError: naming it.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} must be a whole number of {least} or more, got {value!r}")


def require_unicode(name: str, text: str) -> None:
    """Refuses text with lone surrogates, which no encoding has bytes for.

    Raises:
        UserError: naming the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} is no text: character {error.start} is the lone surrogate {text[error.start]!r}"
        ) from None


def _ids(name: str, ids: Sequence[int]) -> tuple[int, ...]:
    if {*map(type, ids)} <= {int} and min(ids, default=0) >= 0:
        return tuple(ids)  # of a long conversation too in a fraction of a millisecond
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        wrong = next(i for i in ids if not isinstance(i, int) or isinstance(i, bool) or i < 0)
        raise UserError(f"{name} must be whole numbers of 0 or more, got {wrong!r}")
    return tuple(ids)
