"""The measure ``training``: whole training steps of a Transformer, with plain attention and with FlashAttention, and RetNet.

Every step learns from the same number of tokens, cut into sequences of one length or another. Speed is measured in one
process a size, in interleaved rounds; memory in a process of its own for each model and length, as the most it ever held, or
on a GPU, whose allocator counts it, in the same process. What cannot fit is found out before, from the model on the meta
device, and left out with its reason.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal

import torch

from retnet.host import choose_device, keep_freed_memory, map_large_tensors
from retnet.measure.clock import Contender, interleave
from retnet.measure.memory import Watch, free_memory, in_bytes
from retnet.measure.sizes import require_retention, transformer
from retnet.measure.summary import Summary
from retnet.measure.training_step import Learner
from retnet.mixers import SoftmaxAttention, SoftmaxConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.settings import Checked, Count, Items, UserError
from retnet.studies.estimate import plan
from retnet.studies.protocols import Job, Measure, Result, Results, Tell, part_of
from retnet.studies.training_summary import FLASH, OURS, PLAIN, summarise
from retnet.train.blocks import change_blocks, recompute_blocks
from retnet.train.config import RunConfig, TrainConfig

KINDS = {"transformer": PLAIN, "flash": FLASH, "retnet": OURS}  # in names of jobs → in tables
SHORT = 64  # tokens whose scores weigh nothing, from which memory that is linear in the length is reckoned
SHARE = 0.85  # of the free memory that may be planned with: estimates do not know scratch memory


@dataclass(frozen=True)
class ModelSize(Checked):
    """One size of model.

    Attributes:
        label: in tables and names of jobs; those of the paper (such as ``"1.3B"``) stand beside its numbers.
        model: RetNet, with a vocabulary.
    """

    label: str
    model: ModelConfig


@dataclass(frozen=True)
class TrainingGrid(Checked):
    """What is trained.

    Attributes:
        sizes: of models.
        lengths: of sequences; each must divide `tokens`.
        tokens: of a step, whatever the length.
        head_width: of the Transformer beside RetNet, which has the same width, depth and, to 2 %, size.
        rounds: in each of which every model and length is measured once.
        device: ``"auto"`` is a GPU if there is one; products are bf16 there, fp32 on a CPU; weights are fp32.
        memory: ``"process"`` measures it in processes of their own; ``"step"`` beside the time, for a GPU. Then models for
            which there is not enough memory at once are measured one after the other.
        activation_checkpointing: recompute blocks in the backward pass.
        compile: blocks, with torch.compile.
    """

    sizes: tuple[ModelSize, ...]
    lengths: Annotated[tuple[int, ...], Items(rising_from=1)] = (1024, 2048, 4096, 8192)
    tokens: Count = 8192
    head_width: Count = 128
    rounds: Count = 3
    device: str = "auto"
    memory: Literal["process", "step"] = "process"
    activation_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sizes or len({size.label for size in self.sizes}) < len(self.sizes):
            raise UserError("sizes must be at least one, each with a label of its own")
        for size in self.sizes:
            require_retention(size.model, size.label)
            if size.model.vocab_size is None:
                raise UserError(f"{size.label}: model.vocab_size is not set; logits are as wide, so give it")
        if uneven := [n for n in self.lengths if self.tokens % n]:
            raise UserError(f"length {uneven[0]} does not divide tokens = {self.tokens}; change one")

    def config(self, size: ModelSize, kind: str) -> ModelConfig:
        """Of the model of a kind (a key of `KINDS`)."""
        if kind == "retnet":
            return size.model
        model = transformer(size.model, self.head_width)
        sdpa: Literal["math", "flash"] = "math" if kind == "transformer" else "flash"
        return replace(model, mixer=SoftmaxConfig(num_heads=size.model.d_model // self.head_width, sdpa=sdpa))

    @property
    def models(self) -> int:
        """That must fit beside each other at least, with their gradients and moments."""
        return 1 if self.memory == "step" else 2

    def size(self, label: str) -> ModelSize:
        """The size of this label."""
        return next(size for size in self.sizes if size.label == label)


@dataclass(frozen=True)
class TrainingJob(Job):
    """The speed of all models of a size, or the memory of one (`kind`) at one length."""

    name: Literal["training"]
    steps: TrainingGrid
    size: str
    kind: str = ""
    length: int = 0

    def run(self, folder: Path, tell: Tell) -> Result | None:
        """One measurement, begun anew if it was interrupted: its rounds belong together."""
        torch.manual_seed(0)
        size = self.steps.size(self.size)
        return (
            memory(self.steps, size, self.kind, self.length, tell)
            if self.kind
            else speed(self.steps, size, tell)
        )


@dataclass(frozen=True)
class TrainingMeasure(Measure):
    """Training cost (paper §5): memory and throughput of a Transformer, with and without FlashAttention, and RetNet."""

    name: Literal["training"]
    steps: TrainingGrid

    def check(self) -> None:
        """Refuses sizes of which not even the cheapest model fits.

        Raises:
            UserError: with the numbers.
        """
        c, device = self.steps, choose_device(self.steps.device)
        have, models = SHARE * free_memory(device), c.models
        for size in c.sizes:
            fixed, step = need(c, size, "retnet", c.lengths[0], device)
            if models * fixed + step > have:
                raise UserError(
                    f"a step of {size.label} takes about {in_bytes(step)} beside {in_bytes(fixed)} of weights, gradients "
                    f"and moments of each of {models}, {in_bytes(models * fixed + step)} in all; {in_bytes(have)} can be "
                    f"had on {device}. Take a smaller --scale, or this size out of a copy of the study's .toml"
                )

    def count(self) -> int:
        """Speed once a size; memory of each kind at each length, where processes of their own measure it."""
        apart = self.steps.memory == "process"
        return len(self.steps.sizes) * (1 + apart * len(KINDS) * len(self.steps.lengths))

    def jobs(self, out: Path, results: Results, failed: Collection[str]) -> dict[str, Job]:
        """All, at once."""
        jobs: dict[str, Job] = {}
        for size in self.steps.sizes:
            jobs[_speed_job(size)] = TrainingJob("training", self.steps, size.label)
            for kind in KINDS if self.steps.memory == "process" else ():
                for length in self.steps.lengths:
                    jobs[_memory_job(size, kind, length)] = TrainingJob(
                        "training", self.steps, size.label, kind, length
                    )
        return jobs

    def summarise(self, results: Results) -> Summary:
        """A table and a pair of panels a size; the paper's table."""
        c = self.steps
        speeds = {s.label: results[job] for s in c.sizes if (job := _speed_job(s)) in results}
        memories = {
            (s.label, KINDS[kind], length): results[job]
            for s in c.sizes
            for kind in KINDS
            for length in c.lengths
            if (job := _memory_job(s, kind, length)) in results
        }
        return summarise([size.label for size in c.sizes], c.lengths, c.tokens, speeds, memories)


def _speed_job(size: ModelSize) -> str:
    return f"speed-{size.label}"


def _memory_job(size: ModelSize, kind: str, length: int) -> str:
    return f"memory-{size.label}-{kind}-{length}"


def need(
    steps: TrainingGrid, size: ModelSize, kind: str, length: int, device: torch.device
) -> tuple[int, int]:
    """Bytes of weights, gradients and moments, and of what a step holds beside them, estimated without allocating any.

    Blocks are run on the meta device, where attention is always the plain formula; so that of FlashAttention is reckoned
    from short sequences.
    """
    at = SHORT if kind == "flash" and length > SHORT else length
    config, rows = steps.config(size, kind), steps.tokens // at
    return _plan(config, at, rows, device.type, steps.activation_checkpointing)


def why_not(
    steps: TrainingGrid, size: ModelSize, kind: str, length: int, device: torch.device, models: int
) -> str:
    """Why a step cannot be tried beside so many models' weights; empty where it can."""
    fixed, step = need(steps, size, kind, length, device)
    have = SHARE * free_memory(device)
    if models * fixed + step <= have:
        return ""
    why = "whose scores of all tokens against all are held, " if kind == "transformer" else ""
    return (
        f"{KINDS[kind]}, {size.label}, sequences of {length:,}: a step, {why}would need about "
        f"{in_bytes(models * fixed + step)}; {in_bytes(have)} can be had on {device}"
    )


def speed(steps: TrainingGrid, size: ModelSize, tell: Tell) -> Result:
    """Seconds of a step of each model at each length; both Transformers are one, computed in two ways."""
    keep_freed_memory()
    device = choose_device(steps.device)
    cells = [(kind, length) for kind in KINDS for length in steps.lengths]
    reasons = {cell: why_not(steps, size, *cell, device, models=steps.models) for cell in cells}
    able = [cell for cell in cells if not reasons[cell]]
    together = not any(why_not(steps, size, *cell, device, models=2) for cell in able)
    groups = (
        [able] if together else [[c for c in able if (c[0] == "retnet") == ours] for ours in (False, True)]
    )
    parameters: dict[str, int] = {}
    rows: list[Result] = []
    for number, group in enumerate(filter(None, groups)):
        counted, more = _race(steps, size, group, device, part_of(tell, number, len(groups)))
        parameters |= counted
        rows += more
    return {
        "device": device.type,
        "activation_checkpointing": steps.activation_checkpointing,
        "compile": steps.compile,
        "interleaved": together,
        "parameters": parameters,
        "rows": rows,
        "skipped": [reason for reason in reasons.values() if reason],
    }


def _race(
    steps: TrainingGrid, size: ModelSize, cells: list[tuple[str, int]], device: torch.device, tell: Tell
) -> tuple[dict[str, int], list[Result]]:
    """Parameters of the models, and rows, of what is measured in interleaved rounds."""
    kinds = dict.fromkeys("retnet" if kind == "retnet" else "flash" for kind, _ in cells)
    models = {kind: _TrainedModel(steps.config(size, kind), steps, device) for kind in kinds}
    peaks: dict[tuple[str, int], int] = {}

    def seconds(kind: str, length: int) -> float:
        model = models["retnet" if kind == "retnet" else "flash"]
        if steps.memory == "process":
            return model.seconds(length, steps.config(size, kind))
        watch = Watch(device)
        found = model.seconds(length, steps.config(size, kind))
        # of the last round that counts: the moments are made in the first
        peaks[kind, length] = watch.peak() + model.held()
        return found

    contenders = [Contender(f"{kind}, {length}", partial(seconds, kind, length)) for kind, length in cells]
    samples = interleave(contenders, {}, steps.rounds, lambda _, part=0.0: tell(part))
    rows = [
        {
            "kind": KINDS[kind],
            "length": length,
            "seconds": [s.seconds for s in samples[f"{kind}, {length}"]],  # of a step, by round
            **({"peak_bytes": peaks[kind, length]} if (kind, length) in peaks else {}),
        }
        for kind, length in cells
    ]
    return {KINDS[k]: sum(p.numel() for p in x.model.parameters()) for k, x in models.items()}, rows


def memory(steps: TrainingGrid, size: ModelSize, kind: str, length: int, tell: Tell) -> Result:
    """The most bytes that this process held for a training step, beyond what it held before there was a model."""
    map_large_tensors()
    device = choose_device(steps.device)
    if reason := why_not(steps, size, kind, length, device, models=1):
        return {"skipped": reason}
    config = steps.config(size, kind)
    small = config.of_layer(0)
    short = replace(steps, tokens=SHORT, lengths=(SHORT,))
    _TrainedModel(small, short, device).seconds(SHORT, small)  # loads kernels and libraries
    tell(0.1)
    watch = Watch(device)
    model = _TrainedModel(config, steps, device)
    model.seconds(length, config, rows=1)  # the optimiser's moments exist from the first step on
    tell(0.4)
    model.seconds(length, config)
    return {"peak_bytes": watch.peak(), "estimated_bytes": sum(need(steps, size, kind, length, device))}


class _TrainedModel:
    """A model of this library that learns from random text."""

    def __init__(self, config: ModelConfig, steps: TrainingGrid, device: torch.device) -> None:
        with torch.device(device):
            self.model = LanguageModel(config)
            self.text = torch.randint(config.vocab_size or 1, (2, steps.tokens))
        if steps.compile:  # block by block: all of them are one graph, compiled once for each length
            change_blocks(self.model, torch.compile)
        if steps.activation_checkpointing:
            recompute_blocks(self.model)
        self.learner = Learner(self.model, bf16=device.type != "cpu")

    def seconds(self, length: int, config: ModelConfig, rows: int | None = None) -> float:
        """Of one step on sequences of this length, all or so many, computed as the configuration of the mixer says."""
        for module in self.model.modules():
            if isinstance(module, SoftmaxAttention):
                module.config = config.mixer  # type: ignore[assignment]  # of one mixer, computed in another form
        tokens, targets = self.text[:, : rows and rows * length].unflatten(1, (-1, length))
        return self.learner.seconds(tokens, targets)

    def held(self) -> int:
        """Bytes of weights and moments, which stay from step to step."""
        moments = [x for state in self.learner.optimizer.state.values() for x in state.values()]
        tensors = [*self.model.parameters(), *(x for x in moments if isinstance(x, torch.Tensor))]
        return sum(x.nbytes for x in tensors)


@lru_cache
def _plan(
    model: ModelConfig, length: int, rows: int, device: str, activation_checkpointing: bool
) -> tuple[int, int]:
    precision: Literal["fp32", "bf16"] = "fp32" if device == "cpu" else "bf16"
    train = TrainConfig(
        seq_len=length,
        batch_size=rows,
        precision=precision,
        activation_checkpointing=activation_checkpointing,
    )
    counted = plan("", RunConfig(model=model, train=train), 1)
    return counted.model_bytes, counted.pass_bytes
