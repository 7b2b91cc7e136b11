"""The measure ``decoding``: RetNet against a Transformer with a KV cache, both of one size, token by token.

Both are measured in one process, in interleaved rounds; the Transformer is this library's own, the same block around
softmax attention. Contexts are of real length (see `retnet.measure.contexts`). Memory is that of weights and states,
from their tensors, and beside it what a process of its own really holds.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import torch

from retnet.host import choose_device, fast_dtype, keep_freed_memory
from retnet.measure.clock import Contender, interleave
from retnet.measure.contexts import Contexts
from retnet.measure.memory import GIB, Watch, free_memory, in_bytes
from retnet.measure.sizes import require_retention, transformer
from retnet.measure.summary import Summary
from retnet.model import LanguageModel, ModelConfig
from retnet.model.cost import Cost, cost
from retnet.settings import At, Checked, Count, Items, UserError
from retnet.studies.decoding_summary import OURS, PEER, summarise
from retnet.studies.protocols import Job, Measure, Result, Results, Tell

SPEED = "speed"
Rising = Annotated[tuple[int, ...], Items(rising_from=1)]


@dataclass(frozen=True)
class DecodingGrid(Checked):
    """What is decoded.

    Attributes:
        model: RetNet, with a vocabulary.
        head_width: of the Transformer beside it, which has the same width, depth and, to 2 %, size.
        lengths: tokens of context.
        batches: sequences at once.
        batch: one of them, for which memory and throughput are shown over length.
        budget_gib: memory that weights and states of one model may take; what is larger is left out, and said to be.
        rounds: in each of which everything is measured.
        seconds: of one length and batch in one round.
        device: ``"auto"`` is a GPU if there is one; numbers are bf16 there, fp32 on a CPU.
    """

    model: ModelConfig
    head_width: Count = 64
    lengths: Rising = (1024, 2048, 4096, 8192, 16384, 32768)
    batches: Rising = (1, 2, 4, 8)
    batch: Count = 2
    budget_gib: Annotated[float, At(above=0)] = 2.0
    rounds: Count = 5
    seconds: Annotated[float, At(above=0)] = 0.2
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.vocab_size is None:
            raise UserError("model.vocab_size is not set; a step reads a row of it, so give it")
        require_retention(self.model)
        if self.batch not in self.batches:
            raise UserError(f"batch is {self.batch}; it must be one of the batches {self.batches}")

    def models(self) -> dict[str, ModelConfig]:
        """Name → configuration of both."""
        return {OURS: self.model, PEER: transformer(self.model, self.head_width)}

    def bytes(self, name: str, length: int, batch: int, device: torch.device) -> int:
        """Weights and states as the cost model counts them. RetNet's state is fp32 whatever the weights are."""
        counted, size = _cost(self.models()[name], length), fast_dtype(device).itemsize
        state = counted.state_bytes if name == OURS else counted.state_bytes * size // 4
        return counted.total * size + batch * state

    def fits(self, name: str, length: int, batch: int, device: torch.device) -> bool:
        """Whether that is within the budget."""
        return self.bytes(name, length, batch, device) <= self.budget_gib * GIB


@dataclass(frozen=True)
class DecodingJob(Job):
    """Either the speed of both models, or (`model` says of which) the memory of one.

    Result: see `speed` and `memory`.
    """

    name: Literal["decoding"]
    grid: DecodingGrid
    model: str = ""

    def run(self, folder: Path, tell: Tell) -> Result | None:
        """One measurement, begun anew if it was interrupted: its rounds belong together."""
        torch.manual_seed(0)
        return memory(self.grid, self.model, tell) if self.model else speed(self.grid, tell)


@dataclass(frozen=True)
class DecodingMeasure(Measure):
    """Inference cost (paper §5): memory, throughput and latency of RetNet and of a Transformer with a KV cache."""

    name: Literal["decoding"]
    grid: DecodingGrid

    def check(self) -> None:
        """Refuses models that do not fit this machine or the budget.

        Raises:
            UserError: with the numbers.
        """
        g, device = self.grid, choose_device(self.grid.device)
        for name in g.models():
            if not g.fits(name, g.lengths[0], g.batch, device):
                least = in_bytes(g.bytes(name, g.lengths[0], g.batch, device))
                raise UserError(
                    f"weights and state of the {name} take {least} at {g.lengths[0]:,} tokens and batch {g.batch}, but "
                    f"budget_gib is {g.budget_gib:g}; raise it or take a smaller model"
                )
        # weights of the model that is not decoding
        other = max(g.bytes(name, 1, 0, device) for name in g.models())
        most, have = int(other + g.budget_gib * GIB), free_memory(device)
        if most > have:
            raise UserError(
                f"one model within budget_gib = {g.budget_gib:g} and the weights of the other, {in_bytes(other)}, take "
                f"{in_bytes(most)}, but {in_bytes(have)} are free on {device}; take a smaller --scale or budget, or a "
                "machine with more memory"
            )

    def count(self) -> int:
        """Speed, and the memory of each model."""
        return 1 + len(self.grid.models())

    def jobs(self, out: Path, results: Results, failed: Collection[str]) -> dict[str, Job]:
        """All, at once."""
        memories = {_memory_job(name): DecodingJob("decoding", self.grid, name) for name in (OURS, PEER)}
        return {SPEED: DecodingJob("decoding", self.grid), **memories}

    def summarise(self, results: Results) -> Summary:
        """Ratios beside the published ones, and three figures: memory, throughput, latency."""
        memories = {name: results[job] for name in (OURS, PEER) if (job := _memory_job(name)) in results}
        return summarise(results.get(SPEED), memories, self.grid.batch, self.grid.budget_gib)


def _memory_job(name: str) -> str:
    return f"memory-{name.lower()}"


def speed(grid: DecodingGrid, tell: Tell) -> Result:
    """Seconds of a step of both models at every length and batch that fits the budget."""
    keep_freed_memory()
    device = choose_device(grid.device)
    models = {name: _model(config, device) for name, config in grid.models().items()}
    contexts = {name: Contexts(model, grid.model.d_model) for name, model in models.items()}
    cells = [cell for cell in product(models, grid.lengths, grid.batches) if grid.fits(*cell, device)]
    for name in models:
        contexts[name].read(grid.lengths, lambda seen: tell(0.3 * seen / grid.lengths[-1]))
        largest = max((cell for cell in cells if cell[0] == name), key=lambda cell: cell[1] * cell[2])
        contexts[name].state(*largest[1:])  # the memory that caches of all cells share
    contenders = [
        Contender(str(cell), partial(contexts[cell[0]].seconds, *cell[1:], grid.seconds)) for cell in cells
    ]
    samples = interleave(contenders, {}, grid.rounds, lambda _, part=0.0: tell(0.3 + 0.7 * part))
    return {
        "device": device.type,
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "rows": [
            {
                "model": name,
                "length": length,
                "batch": batch,
                "seconds": [s.seconds for s in samples[str((name, length, batch))]],  # of a step, by round
            }
            for name, length, batch in cells
        ],
    }


def memory(grid: DecodingGrid, name: str, tell: Tell) -> Result:
    """Bytes of one model's weights and states over length, and what its process holds for them while it decodes."""
    device = choose_device(grid.device)
    config = grid.models()[name]
    _warm(config, device)
    watch = Watch(device)
    model = _model(config, device)
    contexts, rows = Contexts(model, config.d_model, room=8), []
    for length in grid.lengths:
        if grid.fits(name, length, grid.batch, device):
            contexts.read((length,))
            contexts.seconds(length, grid.batch, 1e-9)
            state = contexts.state(length, grid.batch)  # held, for the next line
            held, size = watch.held(), contexts.state_bytes(length, grid.batch)
            rows.append({"length": length, "state_bytes": size, "held_bytes": held})
            del state
        tell(length / grid.lengths[-1])
    return {"batch": grid.batch, "weight_bytes": sum(p.nbytes for p in model.parameters()), "rows": rows}


def _model(config: ModelConfig, device: torch.device) -> LanguageModel:
    with torch.device(device):
        return LanguageModel(config).to(fast_dtype(device)).eval()


def _warm(config: ModelConfig, device: torch.device) -> None:
    """Loads what a first step loads (kernels, libraries), with a model of one layer and the same widths."""
    model = _model(config.of_layer(0), device)
    contexts = Contexts(model, config.d_model, room=8)
    contexts.read((64,))
    contexts.seconds(64, 1, 1e-9)


@lru_cache
def _cost(model: ModelConfig, length: int) -> Cost:
    return cost(model, length)
