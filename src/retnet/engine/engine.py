"""Continuous batching: requests come and go between steps, and every running one gets a token at each step."""

from __future__ import annotations

import bisect
import heapq
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from retnet.engine.decoder import Decoder, choose_decoder
from retnet.engine.requests import Event, Finish, Request, Stats, TokenLogprobs, require_whole
from retnet.engine.sampling import NOT_FINITE, SamplingBatch, finite
from retnet.engine.streams import Stream
from retnet.engine.tallies import Tallies
from retnet.settings import UserError

if TYPE_CHECKING:
    from retnet.data import Tokenizer
    from retnet.model import LanguageModel, ModelState

SLOTS = 64
PREFILL_TOKENS = 256  # at most, in a step that also decodes
IDLE_TOKENS = 1024  # at least, in a step that only reads: nobody waits for it


class Engine:
    """Runs many requests on one model at once: submit, step, cancel; synchronous, for one thread.

    A step gives one token to every running stream, after reading at most `prefill_tokens` tokens of waiting prompts in one
    packed call. So a prompt of any length holds the running streams up for no more than one such piece a step.

    Fairness: requests get slots strictly in the order they came; whoever does not fit yet is never overtaken. Of the
    prompts that have a slot, the oldest gets half of what a step reads, the others share the other half, those with the
    least left first. So nobody starves, and a short prompt behind a long one is read within a few steps.

    A stream that ends leaves its slot to the next in the queue, without copying others. The samples of a request share one
    reading of the prompt. A request's outcome depends on the request alone (but for rounding: a matrix product may differ
    in its last bits with the number of rows).

    Args:
        model: a `LanguageModel` in evaluation mode that stays as it is, or a decoder of one.
        tokenizer: of the same vocabulary; ids beyond it are never chosen.
        slots: the most streams at once; of a decoder, all it has.
        prefill_tokens: the most tokens of prompts read in a step while streams run.
        max_state_bytes: what the states of running streams may take; None is what `slots` come to. A stream with a growing
            cache counts as long as it may become.

    Attributes:
        stats: tokens and seconds so far.

    Raises:
        UserError: a value outside its range, or not even one state fits.
        ValueError: a model in training mode.
    """

    def __init__(
        self,
        model: LanguageModel | Decoder,
        tokenizer: Tokenizer,
        *,
        slots: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        max_state_bytes: int | None = None,
    ) -> None:
        require_whole("slots", SLOTS if slots is None else slots, 1)
        require_whole("prefill_tokens", prefill_tokens, 1)
        if max_state_bytes is not None:
            require_whole("max_state_bytes", max_state_bytes, 1)
        if isinstance(model, Decoder):
            self._decoder, slots = model, min(slots or model.slots, model.slots)
        else:
            slots = slots or SLOTS
            self._decoder = choose_decoder(model, slots)
        self.stats = Stats()
        self.slots = slots
        self._tokenizer, self._prefill_tokens, self._max_bytes = tokenizer, prefill_tokens, max_state_bytes
        self._vocab_size = min(self._decoder.vocab_size, tokenizer.vocab_size)
        self._tallies = Tallies(self._decoder.slots, self._vocab_size, tokenizer.bos_id, self._decoder.device)
        self._free = list(range(slots))  # a heap: the lowest first, so that the used ones lie together
        self._bytes = 0  # that streams with a slot may come to
        self._submitted = 0
        self._queue: list[
            _Prompt
        ] = []  # in the order they came: unread ones, and read ones with samples left
        self._reading: list[_Prompt] = []
        self._live: list[Stream] = []
        self._batch: _Batch | None = None  # of the live streams, while they stay the same
        self._tokens = torch.empty(0)  # the last ones of the live streams, [B]
        self._logits: list[Tensor] = []  # of this step: rows after those, then of streams that have come
        self._outbox: deque[Event] = deque()

    # -- the interface ------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id; ids rise by one from 0.

        Raises:
            UserError: token ids outside the vocabulary, or a state larger than all that may be used.
        """
        prompt = self._prompt(self._submitted, request)
        self._submitted += 1
        self._queue.append(prompt)
        return prompt.id

    def step(self) -> list[Event]:
        """One token for every running stream, after letting waiting ones in; what came of it, in no set order.

        Where something goes wrong inside, or Ctrl-C is pressed, all streams that had a slot end; the next step says so.
        """
        self._run()
        events = [*self._outbox]
        self._outbox.clear()
        return events

    def cancel(self, request: int) -> bool:
        """Ends a request; its streams' last events, "interrupted", come with the next step. False if it had ended."""
        before = len(self._outbox)
        place = bisect.bisect_left(self._queue, request, key=lambda p: p.id)
        for prompt in [p for p in (*self._queue[place : place + 1], *self._reading) if p.id == request]:
            self._remove(prompt, "interrupted")
        for stream in [stream for stream in self._live if stream.request == request]:
            self._outbox.append(stream.end("interrupted"))
        self._sweep()
        return len(self._outbox) > before

    @property
    def busy(self) -> bool:
        """Whether a step would do or say anything."""
        return bool(self._queue or self._reading or self._live or self._outbox)

    def events(self) -> Iterator[Event]:
        """Steps until nothing is left to do; whoever leaves the loop early finds the rest with the next step.

        Raises:
            UserError: a stream failed, since the model gave no finite logits.
        """
        while self.busy:
            if not self._outbox:
                self._run()
            while self._outbox:
                event = self._outbox.popleft()
                if event.completion is not None and event.completion.finish == "failed":
                    raise UserError(NOT_FINITE)
                yield event

    def _run(self) -> None:
        if self._queue or self._reading or self._live:
            try:
                self._advance()
            except BaseException as error:
                self._abandon("failed" if isinstance(error, Exception) else "interrupted")
                raise

    # -- a step -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _advance(self) -> None:
        began, prefill = time.perf_counter(), self.stats.prefill_seconds
        self._logits = []
        if self._live:
            self._logits.append(self._decoder.step(self._tokens, self._rows().slots))
            self.stats.decode_tokens += len(self._live)
        self._admit()
        if self._reading:
            self._read()
            self._admit()  # samples of prompts that have been read
        if self._live:
            self._choose()
            self._sweep()
        self.stats.decode_seconds += time.perf_counter() - began - (self.stats.prefill_seconds - prefill)

    def _admit(self) -> None:
        """Gives free slots to those who wait, in the order they came."""
        while self._queue and self._free:
            prompt = self._queue[0]
            if self._max_bytes is not None and self._bytes + prompt.bytes > self._max_bytes:
                return
            if prompt.snapshot is None:
                prompt.slot = self._take(prompt)
                self._decoder.reset(_index(prompt.slot))
                self._reading.append(prompt)
                self._queue.pop(0)
            else:
                slot = self._take(prompt)
                self._decoder.write(_index(slot), prompt.snapshot.state)
                self._join(prompt, [slot], prompt.snapshot.logits)
                if not prompt.streams:
                    self._queue.pop(0)

    def _read(self) -> None:
        """One packed piece of the prompts that have a slot."""
        began = time.perf_counter()
        budget = self._prefill_tokens if self._live else max(self._prefill_tokens, IDLE_TOKENS)
        shares = share([len(prompt.ids) - prompt.position for prompt in self._reading], budget)
        parts = [(prompt, count) for prompt, count in zip(self._reading, shares, strict=True) if count]
        tokens = [i for prompt, count in parts for i in prompt.ids[prompt.position :][:count]]
        bounds = torch.tensor([0, *(count for _, count in parts)]).cumsum(0)
        slots = _index(*(prompt.slot for prompt, _ in parts))
        device = self._decoder.device
        logits = self._decoder.prefill(torch.tensor(tokens, device=device), bounds, slots)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.stats.prefill_tokens += len(tokens)
        self.stats.prefill_seconds += time.perf_counter() - began
        for row, (prompt, count) in enumerate(parts):
            prompt.position += count
            if prompt.position == len(prompt.ids):
                self._fan_out(prompt, logits[row : row + 1])

    def _fan_out(self, prompt: _Prompt, logits: Tensor) -> None:
        """Starts the samples of a prompt that has been read: its own slot, copies where there is room, the rest later."""
        slots = [prompt.slot]
        while self._free and len(slots) < len(prompt.streams):
            if self._max_bytes is not None and self._bytes + prompt.bytes > self._max_bytes:
                break
            slots.append(self._take(prompt))
        if slots[1:]:
            self._decoder.copy(_index(*[prompt.slot] * len(slots[1:])), _index(*slots[1:]))
        if len(slots) < len(prompt.streams):
            prompt.snapshot = Snapshot(prompt.position, self._decoder.read(_index(prompt.slot)), logits)
            bisect.insort(self._queue, prompt, key=lambda p: p.id)
        self._reading.remove(prompt)
        self._join(prompt, slots, logits)

    def _join(self, prompt: _Prompt, slots: Sequence[int], logits: Tensor) -> None:
        """Lets the next samples of a prompt run, one for each slot, from logits [1,V]."""
        for slot in slots:
            stream = prompt.streams.popleft()
            stream.slot, stream.bytes, stream.prompt_tokens = slot, prompt.bytes, len(prompt.ids)
            self._tallies.start(slot, prompt.ids, stream.asked.sampling)
            self._live.append(stream)
        self._logits.append(logits.expand(len(slots), -1))
        self._batch = None

    def _choose(self) -> None:
        """A token for every live stream."""
        rows = self._rows()
        logits = torch.cat(self._logits) if len(self._logits) > 1 else self._logits[0]
        logits = logits[:, : self._vocab_size]
        sound = finite(logits).tolist()
        allowed = self._without_ends(logits)
        draws = torch.tensor([stream.chance.random() for stream in self._live], dtype=torch.float64)
        seen = self._tallies.rows(rows.slots, rows.sampling.penalised)
        self._tokens = rows.sampling.sample(allowed, draws.to(logits.device), *seen)
        tokens = self._tokens.tolist()
        if rows.sampling.penalised is not None:
            self._tallies.add(rows.slots, self._tokens)
        for row, (stream, token) in enumerate(zip(self._live, tokens, strict=True)):
            if sound[row]:
                logprobs = _logprobs(logits[row], token, stream.asked.logprobs)
                self._outbox.append(stream.push(token, logprobs))
            else:
                self._outbox.append(stream.end("failed"))

    def _without_ends(self, logits: Tensor) -> Tensor:
        """The logits, those that would end a text before `min_tokens` at −∞."""
        bound = [(row, stream) for row, stream in enumerate(self._live) if stream.must_go_on]
        if bound:
            logits = logits.clone()
            for row, stream in bound:
                logits[row, [token for token in stream.ends if token < self._vocab_size]] = -torch.inf
        return logits

    def _rows(self) -> _Batch:
        """What steps of the live streams need, made anew when some came or went."""
        if self._batch is None:
            self._batch = _Batch(
                _index(*(stream.slot for stream in self._live)),
                SamplingBatch(
                    [stream.asked.sampling for stream in self._live], self._vocab_size, self._decoder.device
                ),
            )
        return self._batch

    # -- coming and going ---------------------------------------------------------------------------------------

    def _prompt(self, number: int, request: Request) -> _Prompt:
        if isinstance(request.prompt, str):
            ids = (self._tokenizer.bos_id, *self._tokenizer.encode(request.prompt))
        else:
            ids = tuple(request.prompt)
        for name, tokens in (
            ("prompt", ids),
            ("stop_tokens", request.stop_tokens),
            ("logit_bias", [token for token, _ in request.sampling.logit_bias]),
        ):
            if tokens and max(tokens) >= self._vocab_size:
                raise UserError(
                    f"{name} has the token id {max(tokens)}, but the vocabulary ends with {self._vocab_size - 1}"
                )
        need = 0
        if self._max_bytes is not None:
            need = self._decoder.state_bytes(len(ids) + request.max_tokens)
            if need > self._max_bytes:
                raise UserError(
                    f"a state of {need:,} bytes for {len(ids)} + {request.max_tokens} tokens is more than the "
                    f"{self._max_bytes:,} bytes of max_state_bytes; ask for fewer tokens, or allow more"
                )
        streams = [Stream(number, request, sample, self._tokenizer) for sample in range(request.samples)]
        return _Prompt(number, ids, deque(streams), need)

    def _take(self, prompt: _Prompt) -> int:
        self._bytes += prompt.bytes
        return heapq.heappop(self._free)

    def _give_back(self, slot: int, size: int) -> None:
        self._bytes -= size
        heapq.heappush(self._free, slot)

    def _remove(self, prompt: _Prompt, finish: Finish) -> None:
        """Ends the samples of a prompt that have not started."""
        if prompt in self._queue:
            self._queue.remove(prompt)
        else:
            self._reading.remove(prompt)
            self._give_back(prompt.slot, prompt.bytes)
        for stream in prompt.streams:
            stream.prompt_tokens = len(prompt.ids)
            self._outbox.append(stream.end(finish))

    def _sweep(self) -> None:
        """Takes the streams that have ended out of the batch."""
        keep = [row for row, stream in enumerate(self._live) if stream.finish is None]
        if len(keep) == len(self._live):
            return
        for stream in self._live:
            if stream.finish is not None:
                self._give_back(stream.slot, stream.bytes)
        self._live = [self._live[row] for row in keep]
        self._tokens, self._batch = self._tokens[keep], None

    def _abandon(self, finish: Finish) -> None:
        """Ends everything that had a slot, whose states nobody knows any more."""
        for prompt in [*self._reading]:
            self._remove(prompt, finish)
        self._outbox += [stream.end(finish) for stream in self._live if stream.finish is None]
        self._live, self._batch = [], None
        self._free, self._bytes = list(range(self.slots)), 0


class Snapshot(NamedTuple):
    """A state that was read out of its slot: after how many tokens, of each layer a row, the logits [1,V] after it."""

    position: int
    state: ModelState
    logits: Tensor


class _Prompt:
    """A request until the last of its samples runs.

    Attributes:
        id: the request's.
        ids: its tokens.
        streams: samples that do not run yet.
        bytes: what the state of one may come to.
        slot: where it is read.
        position: tokens read so far.
        snapshot: the state after it, when it has been read and samples wait for a slot.
    """

    def __init__(self, number: int, ids: tuple[int, ...], streams: deque[Stream], size: int) -> None:
        self.id, self.ids, self.streams, self.bytes = number, ids, streams, size
        self.slot, self.position = -1, 0
        self.snapshot: Snapshot | None = None


class _Batch(NamedTuple):
    """The live streams' slots, int64 [B], and their sampling parameters."""

    slots: Tensor
    sampling: SamplingBatch


def share(left: Sequence[int], budget: int) -> list[int]:
    """How many tokens of each prompt are read in a step: half for the first, the rest for the shortest first.

    Args:
        left: tokens each has left to read, at least one, the oldest prompt first.
        budget: the most tokens in all.

    Returns:
        Tokens of each; the budget is used up while there is anything left to read.
    """
    shares = [0] * len(left)

    def give(prompt: int, most: int) -> int:
        given = min(left[prompt] - shares[prompt], most)
        shares[prompt] += given
        return given

    budget -= give(0, budget - budget // 2)
    for prompt in sorted(range(1, len(left)), key=left.__getitem__):
        budget -= give(prompt, budget)
    give(0, budget)
    return shares


def _index(*slots: int) -> Tensor:
    return torch.tensor(slots, dtype=torch.int64)


def _logprobs(logits: Tensor, token: int, count: int | None) -> TokenLogprobs | None:
    """Log-probabilities of the chosen token and of the likeliest, from logits [V]."""
    if count is None:
        return None
    logprobs = logits.double().log_softmax(-1)
    best = logprobs.topk(min(count, len(logprobs)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprobs(token, float(logprobs[token]), top)
