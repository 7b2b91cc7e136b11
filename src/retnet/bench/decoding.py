"""`retnet bench decode`: time per generated token against context length, memory traffic and a Llama's KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from retnet.bench.decoding_batches import BatchBench, measure_batches
from retnet.bench.long_generation import FIRST, generate_long, long_targets
from retnet.bench.throughput import ThroughputBench, measure_throughput
from retnet.engine import decode_from, quantise
from retnet.host import keep_freed_memory
from retnet.measure import peers
from retnet.measure.clock import (
    Budget,
    Contender,
    Sample,
    Spread,
    Target,
    interleave,
    median_seconds,
    rounds_made,
    spread,
    times_faster,
)
from retnet.measure.contexts import Contexts
from retnet.measure.limits import memory_bandwidth
from retnet.model import LanguageModel, ModelConfig, ModelState
from retnet.model.cost import with_bytes
from retnet.nn import Int8Linear
from retnet.progress import Say
from retnet.settings import At, Checked, Count, UserError

OURS, INT8, PEER = "retnet", "retnet int8", "llama"
WARMUP = 3  # steps before the timed ones: the measured limits have emptied the caches
SHORT = 10  # rounds of single sequences of ours for each of the others, with so many times fewer steps, at least 4
NOTES = (
    "one step: one token a sequence through the whole model, fp32, inference mode; seconds are medians over steps",
    "the speed of a shared memory changes within seconds, so single sequences of ours, whose ratios are judged, take turns "
    f"in many short rounds ({SHORT} for each round of the rest); a ratio is formed inside a round, and its median reported",
    "retnet int8: the same model with int8 weights and an fp32 scale for each of their rows; all else is fp32",
    "contexts of the retnet rows are real: random tokens were prefilled, and every sample starts from a copy of that state",
    "the Llama's caches hold random keys and values (DynamicCache, which concatenates: what generate() does by default); "
    "every sample starts from a cache of the stated length, which then grows by one token a step",
    "floor: bytes that a step must read ÷ read bandwidth + bytes it must read and write ÷ update bandwidth",
    "read: all weights but an untied embedding, of which a step needs one row; for the Llama also its cache. Updated: the "
    "state, counted twice, once in and once out",
    "bandwidths are measured right before and after every sample, on all threads of torch, each the best of three passes; "
    "read: the fastest of four readers over a buffer as large as the fp32 weights, which has the same share of it in the "
    "caches; update: over a buffer that no cache holds. Smaller weights (int8) can be faster than this floor",
)


@dataclass(frozen=True)
class DecodingBench(Checked):
    """What `measure_decoding` measures.

    Attributes:
        model: that decodes.
        contexts: tokens seen before those that are written.
        peer_contexts: of the Llama.
        batch: also so many sequences at once, at two contexts; 1 is no.
        rounds: of measurements.
        steps: tokens of one sample, fewer where they are slow.
        long: also one generation of so many tokens, such as 100000; 0 is none.
        long_model: that generates them.
        minutes: that it may take: fewer rounds beyond, but at least 3, and fewer contexts of peers; None is all.
        batches: many numbers of rows; None is the model and one of 100 M parameters like it.
        throughput: what is measured beside llama.cpp.
        buffer_megabytes: that bandwidth is measured with.
    """

    model: ModelConfig
    contexts: tuple[Count, ...] = (1024, 4096, 16384, 65536)
    peer_contexts: tuple[Count, ...] = (1024, 8192, 32768)
    batch: Count = 8
    rounds: Count = 7
    steps: Count = 48
    long: Annotated[int, At(least=0)] = 0
    long_model: ModelConfig | None = None
    minutes: Annotated[float, At(above=0)] | None = None
    batches: BatchBench | None = None
    throughput: ThroughputBench = field(default_factory=ThroughputBench)
    buffer_megabytes: Count = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.long and self.long < 2 * FIRST:
            raise UserError(f"--long is {self.long}; it must be at least {2 * FIRST}, or 0 for none")


@dataclass
class DecodingRow:
    """One line of the result."""

    name: str
    batch: int
    context: int  # tokens seen before the first timed step
    read: int  # bytes a step reads
    updated: int  # bytes a step reads and writes, counted once
    samples: list[Sample] = field(default_factory=list)

    @property
    def short(self) -> bool:
        """Whether it takes part in the many short rounds."""
        return self.name != PEER and self.batch == 1

    @property
    def floor(self) -> Spread:
        """Seconds that the memory traffic of a step takes at the measured bandwidths."""
        return spread(self.floor_of(s) for s in self.samples)

    @property
    def over_floor(self) -> Spread:
        """Time ÷ floor, round by round."""
        return spread(s.seconds / self.floor_of(s) for s in self.samples)

    def floor_of(self, sample: Sample) -> float:
        """Seconds that the memory traffic of a step takes at the bandwidths measured beside one sample."""
        return self.read / sample.limits["read"] + 2 * self.updated / sample.limits["update"]

    def record(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {
            "name": self.name,
            "batch": self.batch,
            "context": self.context,
            "read_bytes": self.read,
            "updated_bytes": self.updated,
            "seconds_per_step": vars(spread(s.seconds for s in self.samples)),
            "floor_seconds": vars(self.floor),
            "over_floor": vars(self.over_floor),
            "rounds": [s._asdict() for s in self.samples],
        }


def measure_decoding(bench: DecodingBench, say: Say) -> dict[str, Any]:
    """Runs all contenders, interleaved; plain data for the record (see `retnet.bench.report`).

    Raises:
        UserError: transformers is missing, or no Llama fits beside the model.
    """
    peers.need("transformers")
    budget = Budget(bench.minutes)
    keep_freed_memory()
    torch.manual_seed(0)
    config = with_bytes(bench.model)
    long = None
    if bench.long:  # first, while the process is small
        long = generate_long(with_bytes(bench.long_model or config), bench.long, say)
    model = LanguageModel(config).eval()
    rows, contenders = _contenders(bench, model, say)
    limits = memory_bandwidth(bench.buffer_megabytes, rows[0].read)
    short = [contender for row, contender in zip(rows, contenders, strict=True) if row.short]
    slow = [contender for row, contender in zip(rows, contenders, strict=True) if not row.short]
    ours = interleave(short, limits, SHORT * bench.rounds, say, budget.deadline(0.25))
    others = interleave(slow, limits, bench.rounds, say, budget.deadline(0.4))
    samples = ours | others
    for row, contender in zip(rows, contenders, strict=True):
        row.samples = samples[contender.name]
    every = [s for part in samples.values() for s in part]
    del contenders, short, slow  # and the memory of their caches
    large = replace(config, d_model=1024, num_layers=8)  # 100 M parameters
    many = bench.batches or BatchBench((config, large))
    many = replace(many, models=tuple(map(with_bytes, many.models)))
    batches = measure_batches(many, say, budget)
    throughput = measure_throughput(model, weight_bytes(model) // 4, bench.throughput, say, budget)
    return {
        "notes": NOTES,
        "rounds": {
            **rounds_made({"one sequence of ours": ours, "the rest": others}),
            "many rows": batches["rounds"],
            "many rows, in short rounds": batches["short_rounds"],
            "beside llama.cpp": throughput["rounds"],
        },
        "limits": {
            f"{name}_bytes_per_s": vars(spread(s.limits[name] for s in every)) for name in ("read", "update")
        },
        "rows": [row.record() for row in rows],
        "batches": batches,
        "throughput": throughput,
        "long": long,
        "targets": [
            *(target.record() for target in [*targets(rows), *long_targets(long)]),
            *batches["targets"],
            *throughput["targets"],
        ],
    }


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that a step reads: all, tied ones once; of an untied embedding a row, which is not counted."""
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    looked_up = sum(w.nbytes for w in embeddings if id(w) not in heads)
    int8 = sum(m.codes.nbytes + m.scale.nbytes for m in model.modules() if isinstance(m, Int8Linear))
    return sum(p.nbytes for p in model.parameters()) + int8 - looked_up


def targets(rows: list[DecodingRow]) -> list[Target]:
    """What decoding one sequence should reach: flat in the context, near the floor everywhere, faster with int8 weights."""
    ours = [row for row in rows if row.name == OURS and row.batch == 1]
    first = ours[0]
    found = [
        Target(
            f"time per token at {row.context:,} ÷ at {first.context:,} tokens of context",
            times_faster(first.samples, row.samples),
            least=0.95,
            most=1.05,
        )
        for row in ours[1:]
    ]
    worst = max((row.over_floor for row in ours), key=lambda s: s.median)
    found.append(Target("time per token ÷ floor, the worst context", worst, most=1.5))
    by_context = {row.context: row for row in ours}
    return found + [
        Target(
            f"tokens/s with int8 weights ÷ with fp32, {row.context:,} tokens of context",
            times_faster(row.samples, by_context[row.context].samples),
            least=1.8,
        )
        for row in rows
        if row.name == INT8
    ]


def _contenders(
    bench: DecodingBench, ours: LanguageModel, say: Say
) -> tuple[list[DecodingRow], list[Contender]]:
    config, size = ours.config, sum(p.numel() for p in ours.parameters())
    assert config.vocab_size is not None
    peer = peers.llama(config.vocab_size, config.d_model, config.num_layers, size).eval()
    contexts = Contexts(ours, config.d_model)
    contexts.read(bench.contexts, lambda seen: say(f"prefilling: {seen:,} of {max(bench.contexts):,} tokens"))
    rows, contenders = [], []

    def add(row: DecodingRow, start: Callable[[], Callable[[], object]]) -> None:
        steps = min(bench.steps, max(4, bench.steps // SHORT)) if row.short else bench.steps

        def measure() -> float:
            with torch.inference_mode():
                return median_seconds(start(), steps, warmup=WARMUP)

        rows.append(row)
        contenders.append(Contender(f"{row.name}, B {row.batch}, context {row.context}", measure))

    def add_ours(batch: int, context: int, name: str = OURS, model: LanguageModel = ours) -> None:
        row = DecodingRow(name, batch, context, weight_bytes(model), contexts.state_bytes(context, batch))
        add(row, lambda: _stepper(model, contexts.state(context, batch)))

    def add_peer(batch: int, context: int) -> None:
        layers = peers.random_cache(peer, batch, context)
        cached = sum(x.nbytes for layer in layers for x in layer)
        add(
            DecodingRow(PEER, batch, context, weight_bytes(peer) + cached, 0),
            lambda: _llama_stepper(peer, layers),
        )

    for context in bench.contexts:
        add_ours(1, context)
    add_ours(1, bench.contexts[0], INT8, quantise(ours))
    for context in bench.peer_contexts:
        add_peer(1, context)
    if bench.batch > 1:
        for context in (bench.contexts[0], bench.contexts[-1]):
            add_ours(bench.batch, context)
        for context in bench.peer_contexts[:2]:
            add_peer(bench.batch, context)
    return rows, contenders


def _stepper(model: LanguageModel, state: ModelState) -> Callable[[], object]:
    """As `retnet generate` steps."""
    decoder, slots = decode_from(model, state)
    return partial(decoder.step, torch.zeros_like(slots), slots)


def _llama_stepper(model: nn.Module, layers: list[tuple[Tensor, Tensor]]) -> Callable[[], object]:
    cache = peers.dynamic_cache(layers)
    tokens = torch.zeros(len(layers[0][0]), 1, dtype=torch.long)
    return lambda: model(input_ids=tokens, past_key_values=cache, use_cache=True)
