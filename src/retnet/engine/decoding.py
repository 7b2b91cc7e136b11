"""Continuing prompts with a recurrent model: constant time and memory a token, however long the text."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retnet.engine.cpu_decoder import Stepper
from retnet.engine.sampling import Sampling, sample
from retnet.engine.stops import StopScanner
from retnet.mixers.states import join_rows, select_rows
from retnet.settings import UserError

if TYPE_CHECKING:
    from retnet.data import Tokenizer
    from retnet.model import LanguageModel

Finish = Literal["stop", "end", "length", "interrupted"]


class Completion(NamedTuple):
    """What one sample of one prompt became.

    Attributes:
        text: the continuation, without the prompt and without a stop string.
        tokens: the ids generated, without the end-of-text token. With a stop string they reach to its end
            or beyond.
        finish: why it ended: a stop string, the model's end of text, `max_tokens`, or not yet.
        prompt_tokens: tokens of the prompt, the leading BOS among them.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    prompt_tokens: int


class Piece(NamedTuple):
    """A few more characters of one completion.

    Attributes:
        prompt: which prompt, from 0.
        sample: which sample of it, from 0.
        text: whole characters, certain to belong to the text; may be empty.
        completion: all of it, with its last piece; None before.
    """

    prompt: int
    sample: int
    text: str
    completion: Completion | None


@dataclass
class Stats:
    """What the work took. Decoding counts what steps made; a first token comes with its prompt."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


class Decoding:
    """Iterates the pieces of `samples` continuations of each prompt as they are made.

    Each prompt starts with BOS, as every training document does, and a generated BOS is the end of a text.
    A prompt is read once, alone, `prefill_size` tokens at a time; its state is then copied to its samples.
    Completions that end leave the batch and waiting ones take their places.

    Sample i of a prompt depends on the prompt, `seed` and i; not on `samples`, on other prompts, or on the
    batch (but for rounding: a matrix product may differ in its last bits with the number of rows).

    Leaving the loop early, or an exception such as Ctrl-C in it, loses nothing: `completions` has what was
    made.

    Args:
        model: any `LanguageModel`, in evaluation mode, on any device; it must stay as it is until the last piece.
        tokenizer: of the same vocabulary; ids beyond it are never chosen.
        prompts: the texts to continue; an empty one is a text from its beginning.
        max_tokens: the most tokens to generate for each completion.
        sampling: how tokens are chosen.
        stop: strings that end a text, and are not part of it.
        seed: where all chance comes from.
        samples: completions of each prompt.
        batch_size: the most completions made at once.
        prefill_size: the most tokens of a prompt read at once.

    Attributes:
        stats: tokens and seconds so far.

    Raises:
        UserError: a value outside its range.
        ValueError: a model in training mode.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stop: Sequence[str] = (),
        seed: int = 0,
        samples: int = 1,
        batch_size: int = 64,
        prefill_size: int = 1024,
    ) -> None:
        for name, value, least in (
            ("max_tokens", max_tokens, 1),
            ("seed", seed, 0),
            ("samples", samples, 1),
            ("batch_size", batch_size, 1),
            ("prefill_size", prefill_size, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name} must be a whole number of {least} or more, got {value!r}")
        if isinstance(prompts, str) or isinstance(stop, str):
            raise UserError("prompts and stop must be lists of strings, got one string")
        if model.training:
            raise ValueError(
                "the model is in training mode, where dropout is active; call model.eval() first"
            )
        vocab_size = model.config.vocab_size
        assert vocab_size is not None  # no model is built without
        self.stats = Stats()
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._batch_size, self._prefill_size = batch_size, prefill_size
        self._vocab_size = min(vocab_size, tokenizer.vocab_size)
        self._prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
        self._rows = [
            [
                _Row(
                    p, s, len(ids), tokenizer, StopScanner(stop), max_tokens, np.random.default_rng([seed, s])
                )
                for s in range(samples)
            ]
            for p, ids in enumerate(self._prompts)
        ]
        self._waiting = deque(row for rows in self._rows for row in rows)
        self._read: tuple[int, _Batch] | None = None  # the prompt read last, while samples of it wait
        self._live: list[_Row] = []
        self._batch: _Batch | None = None  # of the live rows
        self._stepper: Stepper | None = None  # of that batch

    def __iter__(self) -> Iterator[Piece]:
        """Yields pieces until every completion has ended; each token of each text gives one, in turn."""
        while self._waiting or self._live:
            yield from self._advance()

    def completions(self) -> list[list[Completion]]:
        """For each prompt its samples, as far as they are; those still under way say "interrupted"."""
        return [[row.completion() for row in rows] for rows in self._rows]

    @torch.inference_mode()
    def _advance(self) -> list[Piece]:
        """One more token for every live row, after letting waiting ones in."""
        began, prefill = time.perf_counter(), self.stats.prefill_seconds
        if self._batch is not None:
            batch = self._batch
            if self._stepper is None or self._stepper.state is not batch.state:  # rows came or went
                self._stepper = Stepper(self._model, batch.state)
            logits = self._stepper.step(batch.tokens)
            self._batch = batch._replace(logits=logits[:, : self._vocab_size], state=self._stepper.state)
            self.stats.decode_tokens += len(self._live)
        self._admit()
        assert self._batch is not None  # there was a live or a waiting row
        draws = torch.tensor([row.chance.random() for row in self._live], dtype=torch.float64)
        batch = self._batch
        tokens = sample(batch.logits, self._sampling, draws.to(batch.logits.device), batch.seen)
        if batch.seen is not None:
            batch.seen.scatter_(1, tokens[:, None], True)
        pieces = [row.push(token) for row, token in zip(self._live, tokens.tolist(), strict=True)]
        self._drop_finished(batch._replace(tokens=tokens))
        self.stats.decode_seconds += time.perf_counter() - began - (self.stats.prefill_seconds - prefill)
        return pieces

    def _admit(self) -> None:
        """Fills the batch with waiting rows."""
        parts = [] if self._batch is None else [self._batch]
        while self._waiting and (free := self._batch_size - len(self._live)) > 0:
            prompt = self._waiting[0].prompt
            if self._read is None or self._read[0] != prompt:
                self._read = prompt, self._read_prompt(self._prompts[prompt])
            rows = [row for row in islice(self._waiting, free) if row.prompt == prompt]
            for row in rows:
                self._live.append(row)
                self._waiting.popleft()
            parts.append(select_rows(self._read[1], [0] * len(rows)))
        if not self._waiting:
            self._read = None
        self._batch = join_rows(parts)

    def _read_prompt(self, ids: list[int]) -> _Batch:
        """A prompt's state and the logits after it, one row."""
        began = time.perf_counter()
        model, weight = self._model, next(self._model.parameters())
        device = weight.device
        tokens = torch.tensor([ids], dtype=torch.long, device=device)
        state = model.init_state(1, device=device, dtype=weight.dtype)
        for start in range(0, len(ids), self._prefill_size):
            logits, state = model.prefill(tokens[:, start : start + self._prefill_size], state)
        seen = None
        if self._sampling.repetition_penalty != 1:
            seen = torch.zeros(1, self._vocab_size, dtype=torch.bool, device=device)
            seen[0, tokens[0, 1:]] = True  # not BOS: a text's beginning says nothing against its end
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.stats.prefill_tokens += len(ids)
        self.stats.prefill_seconds += time.perf_counter() - began
        return _Batch(tokens[:, -1], logits[:, -1, : self._vocab_size], state, seen)

    def _drop_finished(self, batch: _Batch) -> None:
        keep = [i for i, row in enumerate(self._live) if row.finish is None]
        if len(keep) < len(self._live):
            self._live = [self._live[i] for i in keep]
            self._batch = select_rows(batch, keep) if keep else None
        else:
            self._batch = batch


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stop: Sequence[str] = (),
    seed: int = 0,
    samples: int = 1,
    on_text: Callable[[Piece], None] | None = None,
) -> list[list[Completion]]:
    """Continues prompts and returns, for each, its completions; `on_text` sees every piece as it is made.

    Args and errors are those of `Decoding`, which is for those who would rather loop.
    """
    decoding = Decoding(
        model,
        tokenizer,
        prompts,
        max_tokens=max_tokens,
        sampling=sampling,
        stop=stop,
        seed=seed,
        samples=samples,
    )
    for piece in decoding:
        if on_text is not None:
            on_text(piece)
    return decoding.completions()


class _Batch(NamedTuple):
    """The live rows on the device: last token [B], logits after it [B, V], state, tokens seen [B, V]."""

    tokens: Tensor
    logits: Tensor
    state: Any
    seen: Tensor | None


class _Row:
    """One completion in the making."""

    def __init__(
        self,
        prompt: int,
        sample: int,
        prompt_tokens: int,
        tokenizer: Tokenizer,
        scanner: StopScanner,
        max_tokens: int,
        chance: np.random.Generator,
    ) -> None:
        self.prompt, self.sample, self.chance = prompt, sample, chance
        self.finish: Finish | None = None
        self._prompt_tokens, self._max_tokens, self._end = prompt_tokens, max_tokens, tokenizer.bos_id
        self._stream, self._scanner = tokenizer.stream(), scanner
        self._tokens: list[int] = []
        self._parts: list[str] = []

    def push(self, token: int) -> Piece:
        """Takes the next token; sets `finish` when it is the last."""
        text = ""
        if token == self._end:
            self.finish = "end"
        else:
            self._tokens.append(token)
            text = self._scanner.push(self._stream.push(token))
            if len(self._tokens) == self._max_tokens:
                self.finish = "length"
        if self.finish is not None:  # what the stream and the scanner waited with comes out
            text += self._scanner.push(self._stream.finish())
            text += self._scanner.finish()
        if self._scanner.stopped:
            self.finish = "stop"
        self._parts.append(text)
        return Piece(self.prompt, self.sample, text, None if self.finish is None else self.completion())

    def completion(self) -> Completion:
        """The completion so far; what waits to become a stop string is part of it."""
        text = "".join(self._parts) + ("" if self.finish else self._scanner.held)
        return Completion(text, tuple(self._tokens), self.finish or "interrupted", self._prompt_tokens)
