"""Structured output: tokens are masked so that a text follows a JSON schema, a regular expression, or is one of several."""

# ruff: noqa: ANN401 (llguidance has no types)

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from retnet.settings import UserError

if TYPE_CHECKING:
    from retnet.data import Tokenizer


@dataclass(frozen=True)
class Grammar:
    """What a generated text must be. Exactly one of the fields is given.

    Attributes:
        json_schema: a JSON schema, as a mapping or as JSON; the text is a JSON value that it allows.
        regex: a regular expression (of Rust's regex crate, without look-around) that the whole text matches.
        choice: strings, of which the text is one.

    Raises:
        UserError: none or several are given, or one of the wrong type.
    """

    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("json_schema", "regex", "choice") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(
                f"a grammar is one of json_schema, regex and choice, got {', '.join(given) or 'none of them'}"
            )
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _as_json(self.json_schema))
        if self.regex is not None and not isinstance(self.regex, str):
            raise UserError(f"regex must be a string, got {self.regex!r}")
        if self.choice is not None:
            strings = not isinstance(self.choice, str) and all(isinstance(text, str) for text in self.choice)
            if not strings or not self.choice or "" in self.choice:
                raise UserError(
                    f"choice must be a list of strings that are not empty, got {str(self.choice)[:80]!r}"
                )
            object.__setattr__(self, "choice", tuple(self.choice))

    def compile(self, tokenizer: Tokenizer) -> Constraint:
        """The constraint at the beginning of a text.

        Raises:
            UserError: a schema or expression that means nothing or allows nothing; llguidance is missing.
        """
        return Constraint(_library().LLMatcher(_tokens_of(tokenizer), self.source, log_level=0))

    @property
    def source(self) -> str:
        """It as llguidance has it, not compiled.

        Raises:
            UserError: llguidance is missing.
        """
        matcher = _library().LLMatcher
        if self.regex is not None:
            return str(matcher.grammar_from_regex(self.regex))
        if self.choice is not None:
            return str(matcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, self.choice))))
        return str(matcher.grammar_from_json_schema(self.json_schema))


class Constraint:
    """A grammar at a place of a text: which tokens may come next.

    Raises:
        UserError: the grammar is in error.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self._require_sound()

    def copy(self) -> Constraint:
        """The same place, from which another text goes on."""
        return Constraint(self._matcher.deep_copy())

    def forbidden(self, vocab_size: int) -> Tensor:
        """Which tokens may not come next, bool [V]. BOS may, where the text may end.

        Raises:
            UserError: the grammar takes too much work here.
        """
        bits = np.unpackbits(
            np.frombuffer(self._matcher.compute_bitmask(), np.uint8), count=vocab_size, bitorder="little"
        )
        self._require_sound()
        return torch.from_numpy(bits == 0)

    def push(self, token: int) -> None:
        """Takes the next token, one that is not forbidden."""
        self._matcher.consume_token(token)
        self._require_sound()

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may come."""
        return bool(self._matcher.is_stopped())

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            message = " ".join(self._matcher.get_error().split())
            raise UserError(f"the grammar cannot be followed: {message[:300]}")


def _as_json(schema: Mapping[str, Any] | str) -> str:
    try:
        value = json.loads(schema) if isinstance(schema, str) else dict(schema)
        return json.dumps(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"json_schema is not JSON: {error}") from None


@lru_cache(maxsize=8)
def _tokens_of(tokenizer: Tokenizer) -> Any:
    """The vocabulary as llguidance knows it; BOS is what ends a text."""
    content = tokenizer.content.decode()
    return _library().LLTokenizer(content, n_vocab=tokenizer.vocab_size, eos_token=tokenizer.bos_id)


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError("structured output needs llguidance: pip install 'retnet[grammar]'") from None
    return llguidance
