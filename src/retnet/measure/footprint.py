"""What training takes of each process of a mesh, before it starts: memory by part, bytes on the wire by kind, operations.

What blocks keep for the backward pass is counted from the model itself, run on the meta device; all else from its sizes.
Counted are tensors. What kernels, collectives and the allocator need beside them is not, nor what a process has before it
trains (on a CPU some hundred MB of libraries, on a GPU its context).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, cast

import torch

from retnet.convert import read
from retnet.data import Tokenizer
from retnet.measure.memory import kept_for_backward, most_alive
from retnet.model import Block, LanguageModel, ModelConfig
from retnet.model.cost import cost
from retnet.nn import Positions
from retnet.tables import Table
from retnet.train.config import DistillConfig, ParallelConfig, RunConfig, TrainConfig
from retnet.train.optimizer import FP32, bytes_per_parameter
from retnet.train.start import check_cut, check_shares
from retnet.train.tensor_parallel import check_heads, cut, cut_block

WIDE = FP32  # bytes of weights, states, logits
LOGITS = 3  # numbers a token and entry of the vocabulary at the worst: log-probabilities, their gradient, that of logits
LOGITS_OF_Z_LOSS = 5  # the logits too, and their part of the gradient
LOGITS_OF_PART = 2  # of the vocabulary: the logits and their gradient
SUMS = 6 * 8  # bytes that a step agrees on: loss, targets, norm, two signals, a mistake, in fp64


class RankMemory(NamedTuple):
    """Bytes that one process holds, by part."""

    weights: int  # its part of them, fp32
    gradients: int
    optimiser: int  # moments
    average: int  # of weights, if one is kept
    gathered: (
        int  # whole weights that compute, and gradients on their way: those outside blocks, and of two blocks
    )
    activations: int  # that a pass keeps for its backward pass
    work: int  # tensors that pass while one block is differentiated
    states: int  # that enter a stretch in all layers and are exchanged, under context parallelism
    logits: int  # of a pass, with what their gradient needs
    teacher: int  # weights of a model that is learned from, and what it says of a pass
    copies: int  # that several processes write checkpoints from, kept from the first on
    accumulates: (
        bool  # whether a step has several passes, so that gradients are there while the next one computes
    )
    on_cpu: bool  # so that copies are in the same memory; those of a GPU's tensors are in that of the machine

    @property
    def peak(self) -> int:
        """At most: logits go before blocks are differentiated, and activations as gradients come."""
        lasting = self.weights + self.optimiser + self.average + self.gathered + self.teacher
        lasting += self.copies if self.on_cpu else 0
        passing = self.activations + self.states + max(self.logits, self.work)
        if self.accumulates:
            return lasting + self.gradients + passing
        return lasting + max(self.gradients, passing)


class Traffic(NamedTuple):
    """Bytes that one process receives from others in a step, by kind."""

    weights: int  # all-gather, in each forward and each backward pass
    gradients: int  # reduce-scatter
    replicas: int  # all-reduce of gradients between replicas
    activations: int  # all-reduce of what parts of heads, widths and vocabulary make, in each block both ways
    states: int  # all-gather of states between stretches, where a document crosses a cut
    sums: int  # all-reduce of what a step agrees on


class Footprint(NamedTuple):
    """A run on a mesh."""

    axes: ParallelConfig
    parameters: int
    memory: RankMemory
    traffic: Traffic
    flops: float  # of the whole run, on all processes; blocks that are recomputed count once more

    def hours(self, flops_per_second: float) -> float:
        """Of the run, at a rate that all processes together really reach."""
        return self.flops / flops_per_second / 3600

    def tables(self) -> tuple[Table, Table]:
        """Memory and traffic of one process, to be printed."""
        parts = self.memory._asdict()
        del parts["accumulates"], parts["on_cpu"]
        copies = {} if self.memory.on_cpu else {"copies, on the CPU": parts.pop("copies")}
        parts |= {"at most at once": self.memory.peak, **copies}
        kept = Table("memory of a process", ("part", "GB"), _rows(parts))
        sent = Table("received by a process in a step", ("kind", "GB"), _rows(self.traffic._asdict()))
        return kept, sent


def _rows(sizes: dict[str, int]) -> tuple[tuple[str, str], ...]:
    return tuple((name, f"{size / 1e9:,.3f}") for name, size in sizes.items() if size)


def footprint(config: RunConfig, processes: int) -> Footprint:
    """Counts a run on so many processes. Where its device is "auto", it is taken for a GPU.

    Raises:
        UserError: processes that cannot share the run so, as `retnet train` has it; or an unreadable tokenizer.
    """
    axes = config.parallel.of(processes)
    check_cut(config)
    check_shares(config.train, axes)
    model, c = with_vocabulary(config), config.train
    check_heads(model, axes.tp)
    counted = _cost(model, c.seq_len)
    passes = c.accumulate // axes.readers
    recomputed = counted.flops_per_token - _products_of_head(model) if c.activation_checkpointing else 0
    flops = float(3 * counted.flops_per_token + recomputed) * c.tokens_before(c.steps)
    memory, traffic = _memory(model, c, axes, passes), _traffic(model, c, axes, passes)
    if config.distill is not None:
        held, received = _of_teacher(config.distill, c, axes)
        memory = memory._replace(teacher=held)
        traffic = traffic._replace(weights=traffic.weights + passes * received)
    return Footprint(axes, counted.total, memory, traffic, flops)


def with_vocabulary(config: RunConfig) -> ModelConfig:
    """The model with a vocabulary: its own, that to be learned, that of the tokenizer's file, or where none is, of bytes.

    Raises:
        UserError: the file is there and no tokenizer.
    """
    size, tokenizer = config.model.vocab_size or config.data.learned_vocab, config.data.tokenizer
    if size is None:
        size = Tokenizer.load(tokenizer if Path(tokenizer).exists() else "bytes").vocab_size
    return replace(config.model, vocab_size=size)


def _memory(model: ModelConfig, c: TrainConfig, axes: ParallelConfig, passes: int) -> RankMemory:
    parts, (left, blocks) = axes.parts, _parameters(model, axes.tp)
    own, each = -(-left // parts), bytes_per_parameter(c)
    states = _state_numbers(model, axes.tp) if axes.cp > 1 else [0]
    several = parts * axes.replicate * axes.tp > 1
    return RankMemory(
        weights=each.weight * own,
        gradients=each.gradient * own,
        optimiser=each.moments * own,
        average=each.average * own,
        gathered=2 * WIDE * _whole(left, blocks, model, axes),
        activations=kept_activations(model, c, axes.tp) // axes.cp,
        work=working_bytes(model, c, axes.tp) // axes.cp,
        states=WIDE * (sum(states) + max(states) * axes.cp),
        logits=logit_bytes(model, c, axes.tp) // axes.cp,
        teacher=0,
        copies=(each.total - each.gradient) * own // axes.replicate if several else 0,
        accumulates=passes > 1,
        on_cpu=c.device == "cpu",
    )


def _whole(left: int, blocks: int, model: ModelConfig, axes: ParallelConfig) -> int:
    """Parameters that a process has as a whole while a block of a model computes, beside its part of all."""
    alone = axes.parts == axes.replicate == 1
    return 0 if alone else left - blocks + 2 * blocks // model.num_layers


def kept_activations(model: ModelConfig, c: TrainConfig, tp: int = 1) -> int:
    """Bytes that one pass keeps in all blocks for its backward pass; whole sequences, `vocab_size` not looked at.

    With `tp`, of one of so many parts of heads and widths; what blocks and norms read is whole in each.
    """
    tokens = c.batch_size * c.seq_len
    layers = _by_layer(model, c, tp)
    residual = tokens * model.d_model * WIDE
    blocks = [
        residual if c.activation_checkpointing else _block_bytes(each, model, c) for each, _, _ in layers
    ]
    # layers of one kind of mixer share
    shared = sum(
        dict(zip(model.mixer_kinds_by_layer, (shared for _, shared, _ in layers), strict=True)).values()
    )
    return sum(blocks) + shared * c.batch_size + 2 * residual  # what the last norm and the head read


def working_bytes(model: ModelConfig, c: TrainConfig, tp: int = 1) -> int:
    """Bytes that the backward pass of one block makes beside what was kept; all of the block, if it is recomputed."""
    return max(
        work * c.batch_size // (2 if c.precision == "bf16" else 1)
        + (_block_bytes(each, model, c) if c.activation_checkpointing else 0)
        for each, _, work in _by_layer(model, c, tp)
    )


def _by_layer(model: ModelConfig, c: TrainConfig, tp: int) -> list[tuple[int, int, int]]:
    """See `kept_bytes`."""
    kinds = (replace(model.of_layer(number), vocab_size=1) for number in range(model.num_layers))
    return [kept_bytes(kind, c.seq_len, tp) for kind in kinds]


def _block_bytes(each: int, model: ModelConfig, c: TrainConfig) -> int:
    """Of what one block keeps of all sequences of a pass; in bf16 half, but norms read the residual stream in fp32."""
    if c.precision != "bf16":
        return each * c.batch_size
    return (each // 2 + c.seq_len * model.d_model * WIDE) * c.batch_size


def logit_bytes(model: ModelConfig, c: TrainConfig, tp: int = 1) -> int:
    """Bytes of a pass's logits in fp32, of their logarithms and gradients."""
    assert model.vocab_size is not None
    kinds = LOGITS_OF_PART if tp > 1 else LOGITS_OF_Z_LOSS if c.z_loss else LOGITS
    return kinds * c.batch_size * c.seq_len * -(-model.vocab_size // tp) * WIDE


def _of_teacher(distill: DistillConfig, c: TrainConfig, axes: ParallelConfig) -> tuple[int, int]:
    """Bytes that a process holds of a teacher, and those of its weights that it receives in a pass.

    They are its part of the weights, in the type of products, and those that are whole while a block computes; what the
    teacher says (logits, or by mixer); and what that block makes.

    Raises:
        UserError: it cannot be read.
    """
    teacher = _teacher(distill.teacher)
    size, blocks = _parameters(teacher, 1)
    narrow, tokens = 2 if c.precision == "bf16" else WIDE, c.batch_size * c.seq_len
    said = narrow * 2 * teacher.num_layers * teacher.d_model
    if distill.match == "logits":
        assert teacher.vocab_size is not None
        said = WIDE * teacher.vocab_size
    kinds = {replace(teacher.of_layer(number), vocab_size=1) for number in range(teacher.num_layers)}
    computing = max(inference_bytes(kind, c.seq_len) for kind in kinds) * narrow // WIDE
    own = -(-size // axes.parts) + _whole(size, blocks, teacher, axes)
    held = narrow * own + tokens * said + c.batch_size * computing
    return held, narrow * size * (axes.parts - 1) // axes.parts


@lru_cache
def _teacher(source: str) -> ModelConfig:
    """The configuration of a model that lies somewhere."""
    return read(source, weights=False).config


@lru_cache
def kept_bytes(model: ModelConfig, length: int, tp: int = 1) -> tuple[int, int, int]:
    """What each block keeps of a sequence for its backward pass, what all share (cos, sin), and what passes in between.

    In fp32, weights and their gradients left out.
    """
    with torch.device("meta"):
        block = cast(Block, LanguageModel(model).blocks[0])
        if tp > 1:
            cut_block(block, 0, tp)
        x = torch.empty(1, length, model.d_model, requires_grad=True)
        positions: Positions | None = block.mixer.positions(x)
    shared = sum(y.nbytes for y in positions or () if y is not None and y.is_floating_point())
    kept = kept_for_backward(lambda: block(x, None, positions), block.parameters()) - shared

    def differentiated() -> None:
        y = block(x, None, positions)
        torch.autograd.backward(y, torch.empty_like(y))

    most = most_alive(differentiated)
    return kept, shared, max(most - kept - sum(p.nbytes for p in block.parameters()), 0)


@lru_cache
def inference_bytes(model: ModelConfig, length: int) -> int:
    """What is alive at most while a block computes a sequence and keeps nothing, in fp32, weights left out."""
    with torch.device("meta"):
        block = cast(Block, LanguageModel(model).blocks[0])
        x = torch.empty(1, length, model.d_model)
        positions: Positions | None = block.mixer.positions(x)
    with torch.no_grad():
        return most_alive(lambda: block(x, None, positions))


def _traffic(model: ModelConfig, c: TrainConfig, axes: ParallelConfig, passes: int) -> Traffic:
    parts, world = axes.parts, axes.parts * axes.replicate * axes.tp
    left, _ = _parameters(model, axes.tp)
    others = WIDE * left * (parts - 1) // parts  # all that this process has no part of
    own = WIDE * left // parts
    summed = _summed_activations(model, c) // axes.cp + WIDE * _shared_norms(model, axes.tp)
    directions = 3 if c.activation_checkpointing else 2  # recomputed blocks exchange once more
    exchanged = WIDE * sum(_state_numbers(model, axes.tp)) * (axes.cp - 1) if axes.cp > 1 else 0
    return Traffic(
        weights=2 * passes * others,
        gradients=passes * others,
        replicas=passes * _all_reduced(own, axes.replicate),
        activations=passes * _all_reduced(summed, axes.tp),
        states=passes * directions * exchanged,
        sums=_all_reduced(SUMS, world),
    )


def _all_reduced(size: int, ranks: int) -> int:
    """Bytes received in an all-reduce that is a reduce-scatter and an all-gather."""
    return 2 * size * (ranks - 1) // ranks


def _summed_activations(model: ModelConfig, c: TrainConfig) -> int:
    """Bytes of a pass that parts of heads, widths and vocabulary sum up, of whole sequences.

    Blocks twice forwards, in the type of products, and twice backwards; the embedding forwards, the head backwards; three
    numbers a token for the loss. Recomputed blocks sum no further than something is kept for their backward pass.
    """
    tokens = c.batch_size * c.seq_len
    narrow = 2 if c.precision == "bf16" else WIDE
    again = (2 if model.dropout else 1) if c.activation_checkpointing else 0
    in_blocks = model.num_layers * ((2 + again) * narrow + 2 * WIDE)
    return tokens * (model.d_model * (in_blocks + 2 * WIDE) + 3 * WIDE)


@lru_cache
def _part(model: ModelConfig, tp: int) -> LanguageModel:
    """What the first rank has of a model that is cut by heads; on the meta device."""
    with torch.device("meta"):
        made = LanguageModel(model)
        if tp > 1:
            cut(made, 0, tp)
    return made


def _parameters(model: ModelConfig, tp: int) -> tuple[int, int]:
    """Of one of so many parts of heads, and those inside its blocks."""
    made = _part(model, tp)
    every, inside = (sum(p.numel() for p in module.parameters()) for module in (made, made.blocks))
    return every, inside


def _shared_norms(model: ModelConfig, tp: int) -> int:
    """Weights of norms that parts of heads share, whose gradients they sum."""
    mixers = [cast(Block, block).mixer for block in _part(model, tp).blocks]
    norms = [getattr(mixer, name) for mixer in mixers for name in mixer.shared_norms]
    return sum(x.numel() for norm in norms if norm is not None for x in norm.parameters())


def _state_numbers(model: ModelConfig, tp: int) -> list[int]:
    """Of one sequence, by layer: those that travel between stretches."""
    with torch.device("meta"):
        states = _part(model, tp).init_state(1)
    return [sum(x.numel() for x in state if torch.is_floating_point(x)) for state in states]


def _products_of_head(model: ModelConfig) -> int:
    assert model.vocab_size is not None
    return 2 * model.d_model * model.vocab_size


_cost = lru_cache(cost)
