"""Throughput in tokens per second of one sequence, decoding and prefill, beside llama.cpp at equal parameters."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Annotated, Any

import torch

from retnet.bench import llama_cpp
from retnet.bench.gguf_models import FORMATS
from retnet.engine import choose_decoder, decode_from, quantise
from retnet.measure.clock import Budget, Contender, Sample, Target, interleave, spread, times_faster
from retnet.measure.contexts import Contexts
from retnet.model import LanguageModel
from retnet.progress import Say
from retnet.settings import At, Checked, Count

OURS = "retnet"
WRITE, READ = "write", "read"
SECONDS = 0.5  # of a sample that writes,
LEAST, MOST = 16, 64  # but never fewer or more tokens
NOTES = (
    "write: greedy generation of one sequence after a real context of random tokens. read: a new prompt of random tokens "
    "every time, up to the logits of its last. Tokens per second",
    f"{OURS}: in this process, as `retnet generate` runs. llama.cpp: its own server, a process for every model, as many "
    "threads; its defaults but for one slot and no copies of states and prompts. What counts is the time that it reports, "
    "so without HTTP, and without the first token, whose logits come out of reading",
    "equal parameters: weights that a step reads, within 2 %; the head counts once in every model, a table of embeddings "
    "beside it (RWKV-7 has one) does not. All weights are random",
    f"8 bits: {OURS} has int8 weights and an fp32 scale for each of their rows, llama.cpp Q8_0 (an fp16 scale for each "
    "32). The Llama's cache is fp16, llama.cpp's default, with weights of either kind",
    "contexts are read once by each family of llama.cpp; a sample starts from that state, restored",
)


@dataclass(frozen=True)
class ThroughputBench(Checked):
    """What `measure_throughput` measures."""

    contexts: tuple[Count, ...] = (128, 4096, 16384)  # tokens seen before those that are written
    prompt: Count = 1000  # tokens that are read
    rounds: Count = 5
    minutes: Annotated[float, At(above=0)] = 6.0  # fewer rounds and contexts of the peers beyond


@dataclass
class ThroughputRow:
    """One line of the result."""

    name: str
    weights: str  # one of `gguf_models.FORMATS`
    work: str  # WRITE or READ
    tokens: int  # of the context, or of the prompt
    measure: Callable[[], float] = field(repr=False)  # seconds per token
    samples: list[Sample] = field(default_factory=list)

    @property
    def task(self) -> tuple[str, str, int]:
        """What rows are compared in."""
        return self.weights, self.work, self.tokens

    def record(self, ours: ThroughputRow) -> dict[str, Any]:
        """Plain data for a JSON file; `ours` is our row of the same task."""
        return {
            "name": self.name,
            "weights": self.weights,
            "work": self.work,
            "tokens": self.tokens,
            "tokens_per_s": vars(spread(1 / s.seconds for s in self.samples)),
            "times_ours": vars(times_faster(ours.samples, self.samples)),
            "rounds": [s._asdict() for s in self.samples],
        }


def measure_throughput(
    model: LanguageModel, parameters: int, bench: ThroughputBench, say: Say, budget: Budget
) -> dict[str, Any]:
    """Runs ours and, where it is installed, llama.cpp, interleaved; plain data for the record.

    Args:
        model: ours, in evaluation mode, fp32.
        parameters: weights that a step of it reads; the peers get as many.
        bench: what to measure.
        say: where progress goes.
        budget: time that it may take, besides the minutes of `bench`.
    """
    budget = Budget(bench.minutes, within=budget)
    rows = _our_rows(model, bench, say)
    with llama_cpp.models(model.config, parameters, bench.contexts, say, budget.deadline(0.5)) as found:
        rows += [row for peer in found.models for row in _peer_rows(peer, bench)]
        contenders = [
            Contender(f"{row.name}, {row.weights}, {row.work} {row.tokens:,}", row.measure) for row in rows
        ]
        samples = interleave(contenders, {}, bench.rounds, say, budget.deadline())
    for row, contender in zip(rows, contenders, strict=True):
        row.samples = samples[contender.name]
    ours = {row.task: row for row in rows if row.name == OURS}
    return {
        "notes": NOTES,
        "parameters": parameters,
        "rounds": len(rows[0].samples),
        "llama_cpp": found.record(),
        "rows": [row.record(ours[row.task]) for row in rows],
        "targets": [target.record() for target in targets(rows)],
    }


def targets(rows: list[ThroughputRow]) -> list[Target]:
    """At least as fast as the fastest of the others with weights of the same kind, at the context where that is hardest."""
    ours = {row.task: row for row in rows if row.name == OURS}
    found = []
    for work, weights in product((WRITE, READ), FORMATS):
        others = [row for row in rows if row.name != OURS and (row.work, row.weights) == (work, weights)]
        ratios = [(times_faster(ours[row.task].samples, row.samples), row) for row in others]
        if ratios:
            ratio, row = min(ratios, key=lambda pair: pair[0].median)
            where = f"after {row.tokens:,}" if work == WRITE else f"of {row.tokens:,}"
            what = f"tokens/s, {weights}, {work} {where} ÷ those of the fastest there ({row.name})"
            found.append(Target(what, ratio, least=1.0))
    return found


def _our_rows(model: LanguageModel, bench: ThroughputBench, say: Say) -> list[ThroughputRow]:
    say(f"{OURS} reads contexts of up to {max(bench.contexts):,} tokens")
    contexts = Contexts(model, model.config.d_model)
    contexts.read(bench.contexts)
    rows = []
    for weights, ours in zip(FORMATS, (model, quantise(model)), strict=True):
        rows += [
            ThroughputRow(OURS, weights, WRITE, context, _adapted(partial(_write, ours, contexts, context)))
            for context in bench.contexts
        ]
        rows.append(ThroughputRow(OURS, weights, READ, bench.prompt, partial(_read, ours, bench.prompt)))
    return rows


def _peer_rows(peer: llama_cpp.LlamaCppModel, bench: ThroughputBench) -> list[ThroughputRow]:
    rows = [
        ThroughputRow(
            peer.name, peer.weights, WRITE, context, _adapted(partial(peer.seconds_to_write, context))
        )
        for context in peer.contexts
    ]
    return [
        *rows,
        ThroughputRow(
            peer.name, peer.weights, READ, bench.prompt, partial(peer.seconds_to_read, bench.prompt)
        ),
    ]


def _adapted(write: Callable[[int], float]) -> Callable[[], float]:
    """Writes as many tokens as `SECONDS` hold, within bounds; the first call, which does not count, finds out."""
    tokens = 0

    def measure() -> float:
        nonlocal tokens
        seconds = write(tokens or LEAST)
        tokens = tokens or max(LEAST, min(MOST, int(SECONDS / seconds)))
        return seconds

    return measure


def _write(model: LanguageModel, contexts: Contexts, context: int, tokens: int) -> float:
    """Seconds per token, greedy, after a context; one step before them does not count."""
    with torch.inference_mode():
        decoder, slots = decode_from(model, contexts.state(context, 1))
        token = decoder.step(contexts.token(1), slots).argmax(-1)
        begin = time.perf_counter()
        for _ in range(tokens):
            token = decoder.step(token, slots).argmax(-1)
        return (time.perf_counter() - begin) / tokens


def _read(model: LanguageModel, tokens: int) -> float:
    """Seconds per token of a prompt."""
    decoder, slots = choose_decoder(model, 1), torch.zeros(1, dtype=torch.long)
    prompt, bounds = torch.randint(decoder.vocab_size, (tokens,)), torch.tensor([0, tokens])
    decoder.reset(slots)
    with torch.inference_mode():
        begin = time.perf_counter()
        decoder.prefill(prompt, bounds, slots)
        return (time.perf_counter() - begin) / tokens
