"""Continuous batching: requests come and go between steps, and every running one gets a token at each step."""

from __future__ import annotations

import bisect
import heapq
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retnet.engine.decoder import Decoder
from retnet.engine.decoder_choice import choose_decoder
from retnet.engine.intake import Intake
from retnet.engine.prompts import Prefill, Prompt, Snapshot, index
from retnet.engine.requests import Completion, Event, Finish, Request, Stats, require_whole
from retnet.engine.speculation import Speculation
from retnet.engine.store import StateStore
from retnet.engine.streams import Stream
from retnet.engine.token_choice import TokenChooser
from retnet.settings import UserError

if TYPE_CHECKING:
    from retnet.data import Tokenizer
    from retnet.model import LanguageModel

SLOTS = 64
PREFILL_TOKENS = 256  # at most, in a step that also decodes


class Engine:
    """Runs many requests on one model at once: submit, step, cancel; synchronous, for one thread.

    A step gives one token to every running stream, after reading at most `prefill_tokens` tokens of waiting prompts in one
    packed call. So a prompt of any length holds the running streams up for no more than one such piece a step.

    Fairness: requests get slots strictly in the order they came; whoever does not fit yet is never overtaken. Of the
    prompts that have a slot, the oldest gets half of what a step reads, the others share the other half, those with the
    least left first. So nobody starves, and a short prompt behind a long one is read within a few steps.

    A stream that ends leaves its slot to the next in the queue, without copying others. The samples of a request share one
    reading of the prompt. A request's outcome depends on the request alone, but for rounding: a matrix product may differ
    in its last bits with the number of rows. With `exact`, on a CPU, not even that: prompts are read alone, in blocks that
    begin at multiples of `BLOCK` tokens, and rows that a decoder does not compute alone are stepped alone. The bits are then
    the same in any company, at any arrival, and with whatever the cache knows.

    Args:
        model: a `LanguageModel` in evaluation mode that stays as it is, or a decoder of one.
        tokenizer: of the same vocabulary; ids beyond it are never chosen.
        slots: the most streams at once; of a decoder, all it has.
        prefill_tokens: the most tokens of prompts read in a step while streams run.
        max_state_bytes: what the states of running streams may take; None is what `slots` come to. A stream with a growing
            cache counts as long as it may become, and holds no more; what it held is given back when it ends.
        exact: whether the bits of an outcome must not depend on other requests.
        cache_bytes: what states kept for later requests may take in memory; 0 keeps none. See `StateStore`.
        state_directory: where states go that sessions hold and memory has no room for; a directory, or a URL of fsspec.
        draft_tokens: the most tokens of a text that are guessed from what it repeats, and verified at once, while it runs
            alone and is greedy; the tokens are the same, they come faster. 0 guesses nothing. Not together with `exact`.

    Attributes:
        stats: tokens and seconds so far.
        slots: the most streams at once.
        tokenizer: as given.
        store: the cache; None without.
        fingerprint: of the model, by which states of different models are told apart; empty without a cache.

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
        exact: bool = False,
        cache_bytes: int = 0,
        state_directory: str | Path | None = None,
        draft_tokens: int = 0,
    ) -> None:
        require_whole("slots", SLOTS if slots is None else slots, 1)
        require_whole("prefill_tokens", prefill_tokens, 1)
        require_whole("cache_bytes", cache_bytes, 0)
        require_whole("draft_tokens", draft_tokens, 0)
        require_whole("max_state_bytes", 1 if max_state_bytes is None else max_state_bytes, 1)
        if exact and draft_tokens:
            raise UserError(
                "draft_tokens is not for exact engines: a pass over a draft rounds as no step does"
            )
        self._decoder = model if isinstance(model, Decoder) else choose_decoder(model, slots or SLOTS)
        self.slots = min(slots or self._decoder.slots, self._decoder.slots)
        self.stats, self.tokenizer, self._exact = Stats(), tokenizer, exact
        self._max_bytes = math.inf if max_state_bytes is None else max_state_bytes
        self.store: StateStore | None = None
        self.fingerprint = ""
        if cache_bytes:
            self.fingerprint = self._decoder.fingerprint()
            self._decoder.reset(index(0))
            template = self._decoder.read(index(0))
            self.store = StateStore(template, cache_bytes, state_directory)
        self._prefill = Prefill(
            self._decoder, self.stats, prefill_tokens, exact, self.store, self.fingerprint
        )
        self._intake = Intake(self._decoder, tokenizer, max_state_bytes)
        vocab_size = self._intake.vocab_size
        self._chooser = TokenChooser(self._decoder, vocab_size, tokenizer.bos_id)
        self._speculation = Speculation(self._decoder, vocab_size, draft_tokens) if draft_tokens else None
        self._free = list(range(self.slots))  # a heap: the lowest first, so that the used ones lie together
        self._bytes = 0  # that streams with a slot may come to
        self._submitted = 0
        self._queue: list[Prompt] = []  # in the order they came: unread ones, and read ones with samples left
        self._live: list[Stream] = []
        self._slots = index()  # of the live streams, int64 [B]
        self._tokens = torch.empty(0)  # the last ones of the live streams, [B]
        self._logits: list[Tensor] = []  # of this step: rows after those, then of streams that have come
        self._outbox: deque[Event] = deque()

    # -- the interface ------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id; ids rise by one from 0.

        Raises:
            UserError: token ids outside the vocabulary, a grammar that means nothing, or a state larger than all that may be
                used.
        """
        self._queue.append(self._intake.prompt(self._submitted, request))
        self._submitted += 1
        return self._submitted - 1

    def step(self) -> list[Event]:
        """One token for every running stream, after letting waiting ones in; what came of it, in no set order.

        Where something goes wrong inside, or Ctrl-C is pressed, all streams that had a slot end; the next step says so.
        """
        self._run()
        events, self._outbox = [*self._outbox], deque()
        return events

    def cancel(self, request: int) -> bool:
        """Ends a request; its streams' last events, "interrupted", come with the next step. False if it had ended."""
        before = len(self._outbox)
        for prompt in [p for p in (*self._queue, *self._prefill.prompts) if p.id == request]:
            self._remove(prompt, "interrupted")
        for stream in [stream for stream in self._live if stream.request == request]:
            self._outbox.append(stream.end("interrupted"))
        self._sweep()
        return len(self._outbox) > before

    def state_bytes(self, tokens: int) -> int:
        """Bytes of one text's state after so many tokens; see `Decoder.state_bytes`."""
        return self._decoder.state_bytes(tokens)

    def check_ids(self, name: str, tokens: Sequence[int]) -> None:
        """Refuses ids outside the vocabulary; see `Intake.check_ids`."""
        self._intake.check_ids(name, tokens)

    @property
    def busy(self) -> bool:
        """Whether a step would do or say anything."""
        return bool(self._queue or self._prefill.prompts or self._live or self._outbox)

    def events(self) -> Iterator[Event]:
        """Steps until nothing is left to do; whoever leaves the loop early finds the rest with the next step.

        Raises:
            UserError: a stream failed, for the reason that its completion names.
        """
        while self.busy:
            if not self._outbox:
                self._run()
            while self._outbox:
                event = self._outbox.popleft()
                if event.completion is not None and event.completion.finish == "failed":
                    raise UserError(event.completion.error)
                yield event

    def complete(self, request: Request) -> list[Completion]:
        """Steps until this request has ended: its completions, by sample. Events of others come with the next step.

        Raises:
            UserError: as `submit`; a stream failed, for the reason that its completion names.
        """
        number = self.submit(request)
        done: dict[int, Completion] = {}
        others: deque[Event] = deque()
        try:
            while len(done) < request.samples:
                if not self._outbox:
                    self._run()
                    continue
                event = self._outbox.popleft()
                if event.request != number:
                    others.append(event)
                elif event.completion is not None:
                    done[event.sample] = event.completion
        finally:
            self._outbox.extendleft(reversed(others))
        if failed := [completion.error for completion in done.values() if completion.finish == "failed"]:
            raise UserError(failed[0])
        return [done[sample] for sample in range(request.samples)]

    def _run(self) -> None:
        if self._queue or self._prefill.prompts or self._live:
            try:
                self._advance()
            except BaseException as error:
                failed = isinstance(error, Exception)
                self._abandon("failed" if failed else "interrupted", f"the engine failed: {error}" * failed)
                raise

    # -- a step -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _advance(self) -> None:
        began, prefill = time.perf_counter(), self.stats.prefill_seconds
        self._logits = []
        if self._live and not self._speculate():
            self._logits.append(self._step())
            self.stats.decode_tokens += len(self._live)
        self._admit()
        if self._prefill.prompts:
            for prompt, logits in self._prefill.read(self._live != []):
                self._fan_out(prompt, logits)
            self._admit()  # samples of prompts that have been read
        if self._logits:
            self._choose()
        self._sweep()
        self.stats.decode_seconds += time.perf_counter() - began - (self.stats.prefill_seconds - prefill)

    def _step(self) -> Tensor:
        """Logits of the live streams after their last tokens."""
        if self._exact and not self._decoder.rows_are_exact:
            rows = zip(self._tokens.split(1), self._slots.split(1), strict=True)
            return torch.cat([self._decoder.step(*row) for row in rows])
        logits = self._decoder.step(self._tokens, self._slots)
        self._prefill.keep(self._live)
        return logits

    def _speculate(self) -> bool:
        """Several tokens at once for a stream that runs alone; whether there were any."""
        if self._speculation is None or len(self._live) > 1 or self._queue or self._prefill.prompts:
            return False
        events, tokens = self._speculation.advance(self._live[0])
        if events:
            self._outbox += events
            self._tokens = tokens
            self.stats.decode_tokens += len(events)
        return events != []

    def _admit(self) -> None:
        """Gives free slots to those who wait, in the order they came."""
        while self._queue and self._free:
            prompt = self._queue[0]
            if self._bytes + prompt.bytes > self._max_bytes:
                return
            slot = self._take(prompt)
            if prompt.snapshot is None:
                prompt.slot = slot
                self._prefill.begin(prompt)
            else:
                self._decoder.write(index(slot), prompt.snapshot.state)
                self._join(prompt, [slot], prompt.snapshot.logits)
            if prompt.snapshot is None or not prompt.streams:
                self._queue.pop(0)

    def _fan_out(self, prompt: Prompt, logits: Tensor) -> None:
        """Starts the samples of a prompt that has been read: its own slot, copies where there is room, the rest later."""
        slots = [prompt.slot]
        while self._free and len(slots) < len(prompt.streams):
            if self._bytes + prompt.bytes > self._max_bytes:
                break
            slots.append(self._take(prompt))
        if slots[1:]:
            self._decoder.copy(index(*[prompt.slot] * len(slots[1:])), index(*slots[1:]))
        if len(slots) < len(prompt.streams):
            prompt.snapshot = Snapshot(self._decoder.read(index(prompt.slot)), logits)
            bisect.insort(self._queue, prompt, key=lambda p: p.id)
        self._prefill.prompts.remove(prompt)
        self._join(prompt, slots, logits)

    def _join(self, prompt: Prompt, slots: Sequence[int], logits: Tensor) -> None:
        """Lets the next samples of a prompt run, one for each slot, from logits [1,V]."""
        for slot in slots:
            stream = prompt.streams.popleft()
            prompt.start(stream, slot)
            self._chooser.start(slot, prompt.ids, stream.asked.sampling)
            self._live.append(stream)
        self._logits.append(logits.expand(len(slots), -1))
        self._slots = torch.cat([self._slots, index(*slots)])

    def _choose(self) -> None:
        """A token for every live stream."""
        logits = torch.cat(self._logits) if len(self._logits) > 1 else self._logits[0]
        self._tokens, ids, faults = self._chooser.choose(logits, self._live)
        for row, (stream, token) in enumerate(zip(self._live, ids, strict=True)):
            count = stream.asked.logprobs
            try:
                if row in faults:
                    raise faults[row]
                logprobs = None if count is None else self._chooser.logprobs(logits[row], token, count)
                self._outbox.append(stream.push(token, logprobs))
            except UserError as error:
                self._outbox.append(stream.end("failed", str(error)))

    # -- coming and going ---------------------------------------------------------------------------------------

    def _take(self, prompt: Prompt) -> int:
        self._bytes += prompt.bytes
        return heapq.heappop(self._free)

    def _give_back(self, slot: int, size: int) -> None:
        self._decoder.free(index(slot))
        self._bytes -= size
        heapq.heappush(self._free, slot)

    def _remove(self, prompt: Prompt, finish: Finish, error: str = "") -> None:
        """Ends the samples of a prompt that have not started."""
        if prompt in self._queue:
            self._queue.remove(prompt)
        else:
            self._prefill.prompts.remove(prompt)
            self._give_back(prompt.slot, prompt.bytes)
        for stream in prompt.streams:
            stream.prompt = prompt.ids
            self._outbox.append(stream.end(finish, error))

    def _sweep(self) -> None:
        """Takes the streams that have ended out of the batch."""
        keep = [row for row, stream in enumerate(self._live) if stream.finish is None]
        if len(keep) == len(self._live):
            return
        for stream in self._live:
            if stream.finish is not None:
                self._give_back(stream.slot, stream.bytes)
        self._live = [self._live[row] for row in keep]
        self._tokens, self._slots = self._tokens[keep], self._slots[keep]

    def _abandon(self, finish: Finish, error: str) -> None:
        """Ends everything that had a slot, whose states nobody knows any more."""
        for prompt in [*self._prefill.prompts]:
            self._remove(prompt, finish, error)
        self._outbox += [stream.end(finish, error) for stream in self._live if stream.finish is None]
        self._live, self._slots = [], index()
        self._decoder.free(torch.arange(self.slots))
        self._free, self._bytes = list(range(self.slots)), 0
