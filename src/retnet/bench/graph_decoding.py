"""Whole models decoding as CUDA graphs, from one sequence to hundreds, beside transformers' Llama with its KV cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from retnet.bench.decoding import DecodingRow, weight_bytes
from retnet.measure import peers
from retnet.measure.clock import (
    Contender,
    Spread,
    interleave,
    rounds_made,
    spread,
    times_faster,
    wait,
)
from retnet.measure.graphs import captured
from retnet.measure.limits import memory_bandwidth, recent
from retnet.measure.memory import free_memory, in_bytes
from retnet.measure.records import Record, lines_of, measured, said, table_of
from retnet.measure.summary import Panel
from retnet.model import LanguageModel, ModelConfig
from retnet.model.cost import cost
from retnet.progress import Say
from retnet.settings import Checked, Count, UserError
from retnet.tables import MISSING, Table

Model = TypeVar("Model", bound=nn.Module)

OURS, EAGER = "retnet", "retnet, without a graph"
STATIC, DYNAMIC = "llama, static cache", "llama, dynamic cache, without a graph"
ROOM = 8  # tokens beyond its context that a static cache is made for; steps overwrite its first rows
SHARE = 0.75  # of the free memory that caches of one batch may fill; graphs and logits need some, too
NOTES = (
    "one step: a token a sequence through the whole model, its logits, and the likeliest token as the next one's input; "
    "weights bf16, random; states of RetNet fp32",
    "as CUDA graphs, so that no time of Python is in it; on a CPU there are none. The Llama of equal size (heads of 64, "
    "tied embeddings, torch's SDPA) has a StaticCache as large as its context, as transformers' own graphs have; beside it "
    "a DynamicCache, which generate() takes by default and which cannot be captured",
    "floor: bytes of weights and cache ÷ bandwidth of reading, and of states, in and out, ÷ bandwidth of an update",
    "batches are measured one after the other, all contenders of one interleaved",
)


@dataclass(frozen=True)
class GraphBench(Checked):
    """What `measure_graphs` measures.

    Attributes:
        model: RetNet, with a vocabulary.
        batches: sequences at once.
        contexts: tokens in the Llama's cache.
        peer_most: sequences of the Llama at most.
        rounds: of measurements.
        steps: tokens of one sample.
        device: that decodes.
        buffer_megabytes: that bandwidth is measured with.
    """

    model: ModelConfig
    batches: tuple[Count, ...] = (1, 8, 64, 256)
    contexts: tuple[Count, ...] = (2048, 8192, 32768)
    peer_most: Count = 64
    rounds: Count = 5
    steps: Count = 16
    device: str = "cuda"
    buffer_megabytes: Count = 1024


class GraphRow(DecodingRow):
    """One line of the result; its context is that of a cache, 0 where there is none."""

    @property
    def label(self) -> str:
        """Of the contender."""
        return f"{self.name}, B {self.batch}" + (f", context {self.context}" if self.context else "")

    @property
    def of_bandwidth(self) -> Spread:
        """Seconds that the memory takes by itself ÷ seconds of a step."""
        return spread(self.floor_of(s) / s.seconds for s in self.samples)

    def record_beside(self, ours: GraphRow) -> dict[str, Any]:
        """Plain data for a JSON file; `ours` is our row of the same batch."""
        return {
            **self.record(),
            "tokens_per_s": vars(spread(self.batch / s.seconds for s in self.samples)),
            "of_bandwidth": vars(self.of_bandwidth),
            "times_ours": vars(times_faster(ours.samples, self.samples)),
        }


def measure_graphs(
    bench: GraphBench,
    say: Say,
    until: float = float("inf"),
    note: Callable[[Record], None] = lambda found: None,
) -> Record:
    """All batches, one after the other; plain data.

    Args:
        bench: what is measured.
        say: where progress goes.
        until: on the clock of `time.monotonic`; no batch begins after it.
        note: told after each batch what there is so far.

    Raises:
        UserError: no Llama fits beside the model.
    """
    torch.manual_seed(0)
    device = torch.device(bench.device)
    ours = _placed(lambda: LanguageModel(bench.model), device)
    found: Record = {"notes": NOTES, "parameters": _count(ours), "rows": [], "skipped": [], "rounds": {}}
    peer = _peer(bench, ours, device, found["skipped"])
    bandwidth = recent(memory_bandwidth(bench.buffer_megabytes, weight_bytes(ours), device))
    for batch in bench.batches:
        if time.monotonic() > until and found["rows"]:
            found["skipped"].append(f"batches from {batch} on: the time was over")
            break
        rows, contenders = _contenders(bench, batch, ours, peer, device, found["skipped"])
        samples = interleave(contenders, bandwidth, bench.rounds, say, until)
        for row in rows:
            row.samples = samples[row.label]
        first = next(row for row in rows if row.name == OURS)
        found["rows"] += [row.record_beside(first) for row in rows]
        found["rounds"] |= rounds_made({f"batch {batch}": samples})
        note(found)
        del rows, contenders, samples, first
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _placed(make: Callable[[], Model], device: torch.device) -> Model:
    """A model with bf16 weights, made where it stays."""
    with torch.device(device):
        model = make()
    return model.to(torch.bfloat16).eval()


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _peer(
    bench: GraphBench, ours: LanguageModel, device: torch.device, skipped: list[str]
) -> nn.Module | None:
    config = bench.model
    assert config.vocab_size is not None
    try:
        model: nn.Module = _placed(
            lambda: peers.llama(config.vocab_size or 1, config.d_model, config.num_layers, _count(ours)),
            device,
        )
    except UserError as error:
        skipped.append(f"the Llama: {error}")
        return None
    return model


def _contenders(
    bench: GraphBench,
    batch: int,
    ours: LanguageModel,
    peer: nn.Module | None,
    device: torch.device,
    skipped: list[str],
) -> tuple[list[GraphRow], list[Contender]]:
    """Of one batch: ours, and of the Llama every context whose cache fits."""
    rows: list[GraphRow] = []
    contenders: list[Contender] = []

    def add(row: GraphRow, make: Callable[[], Callable[[], object]]) -> None:
        try:
            with torch.no_grad():
                run = make()
        except (
            Exception
        ) as error:  # a peer that cannot be captured, or memory: said, and the rest is measured
            if row.name == OURS:
                raise
            skipped.append(f"{row.label}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            return
        rows.append(row)
        contenders.append(Contender(row.label, lambda: _seconds(run, bench.steps, device)))

    states = cost(ours.config).state_bytes * batch
    add(
        GraphRow(OURS, batch, 0, weight_bytes(ours), states),
        partial(_captured, partial(_stepper, ours, batch, device), device),
    )
    if device.type == "cuda" and batch == bench.batches[0]:
        add(GraphRow(EAGER, batch, 0, weight_bytes(ours), states), partial(_stepper, ours, batch, device))
    if peer is None:
        return rows, contenders
    if batch > bench.peer_most:
        skipped.append(
            f"{STATIC}, batch {batch}: not measured, only up to {bench.peer_most} sequences at once"
        )
        return rows, contenders
    room = SHARE * free_memory(device)
    for context in bench.contexts:
        cache = _cache_bytes(peer, batch, context)
        row = GraphRow(STATIC, batch, context, weight_bytes(peer) + cache, 0)
        if cache > room:
            skipped.append(
                f"{row.label}: its cache takes {in_bytes(cache)}; {in_bytes(max(room, 0))} can be had"
            )
            continue
        room -= cache
        add(row, partial(_captured, partial(_static_stepper, peer, batch, context, device), device))
        if batch == bench.batches[0]:
            dynamic = GraphRow(DYNAMIC, batch, context, row.read, 0)
            add(dynamic, partial(_dynamic_stepper, peer, batch, context, device))
    return rows, contenders


def _captured(make: Callable[[], Callable[[], object]], device: torch.device) -> Callable[[], object]:
    return captured(make(), device)


def _seconds(run: Callable[[], object], steps: int, device: torch.device) -> float:
    with torch.no_grad():
        run()
        wait(device)
        begin = time.perf_counter()
        for _ in range(steps):
            run()
        wait(device)
        return (time.perf_counter() - begin) / steps


def _stepper(model: LanguageModel, batch: int, device: torch.device) -> Callable[[], object]:
    token, state = torch.zeros(batch, dtype=torch.int64, device=device), model.init_state(batch)

    def step() -> None:
        logits, after = model.step(token, state)
        for old, new in zip(state, after, strict=True):
            for a, b in zip(old, new, strict=True):
                if a.data_ptr() != b.data_ptr():  # retention's states change in place
                    a.copy_(b)
        token.copy_(logits.argmax(-1))

    return step


def _static_stepper(peer: nn.Module, batch: int, context: int, device: torch.device) -> Callable[[], object]:
    """Every step attends to all rows of the cache, whatever they hold, so it need not be filled or set back."""
    (transformers,) = peers.need("transformers")
    cache = transformers.StaticCache(config=peer.config, max_cache_len=context + ROOM)
    return _llama_stepper(peer, cache, batch, device)


def _dynamic_stepper(peer: nn.Module, batch: int, context: int, device: torch.device) -> Callable[[], object]:
    cache = peers.dynamic_cache(peers.random_cache(peer, batch, context))
    return _llama_stepper(peer, cache, batch, device)


def _llama_stepper(peer: nn.Module, cache: object, batch: int, device: torch.device) -> Callable[[], object]:
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)

    def step() -> None:
        logits = peer(input_ids=token, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))

    return step


def _cache_bytes(peer: nn.Module, batch: int, context: int) -> int:
    config: Any = peer.config
    width = config.num_key_value_heads * peers.HEAD_WIDTH
    size = next(peer.parameters()).dtype.itemsize
    return 2 * int(config.num_hidden_layers) * batch * context * int(width) * size


def parts(record: Record, label: str) -> tuple[list[Table], list[Panel]]:
    """A table of all rows, and tokens per second over the batch."""
    cells = {
        "contender": said("name"),
        "batch": said("batch"),
        "context": lambda row: f"{row['context']:,}" if row["context"] else MISSING,
        "ms per step": measured("seconds_per_step", 1e3, 3),
        "tokens/s": measured("tokens_per_s", digits=0),
        "time ÷ ours": measured("times_ours"),
        "floor ÷ time": measured("of_bandwidth"),
    }
    skipped = [f"Not measured: {reason}." for reason in record["skipped"]]
    title = f"Decoding, {label}: {record['parameters'] / 1e6:,.0f} M parameters"
    graphs = [
        {**row, "label": row["name"] + (f", {row['context']:,} tokens" if row["context"] else "")}
        for row in record["rows"]
        if row["name"] in (OURS, STATIC)
    ]
    lines = lines_of(graphs, ["label"], "batch", "tokens_per_s")
    panel = Panel(f"Decoding, {label}", "sequences", "tokens per second", lines, log_x=True, log_y=True)
    return [table_of(title, record["rows"], cells, (*record["notes"], *skipped))], [panel]
