"""`retnet bench train`: training steps beside a Llama of equal size and beside the machine's matrix products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

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
from retnet.measure.limits import matrix_products
from retnet.measure.sizes import require_retention
from retnet.measure.training_step import Learner
from retnet.model import LanguageModel, ModelConfig
from retnet.model.cost import cost, with_bytes
from retnet.ops import log_decays, retention
from retnet.progress import Say
from retnet.settings import At, Checked, Count, UserError

OURS, PEER, BF16, PACKED = "retnet", "llama", "retnet, bf16 autocast", "retnet, one packed row"
OP = {
    "ours": "retnet.ops.retention",
    "indexed 64": "autograd, chunks of 64, indexed",
    "indexed 128": "autograd, chunks of 128, indexed",
    "parallel": "autograd, parallel form",
    "split 64": "autograd, chunks of 64, split once",
    "split 128": "autograd, chunks of 128, split once",
}
NOTES = (
    "one step: forward, cross entropy, backward, fused AdamW, on random tokens; fp32 unless a row says otherwise",
    "model flops of a step: 3 × those of a forward pass; a chunk of retention counted as a full square, causal attention "
    "as half of one, norms, activations and the optimiser not at all",
    "of_torch_mm: model flops per second ÷ rate of fp32 matrix products by torch.mm, measured right before and after in the "
    "same process; of_limit: ÷ that of the fastest library torch has, which our linear layers use where it is another",
    "op: first with the system's allocator as it comes, as in anyone's script (targets are judged there), then with freed "
    "memory kept by the process, as in `retnet train`; 'indexed' is how the form is usually written, torchscale's included",
    "bf16 and packed rows are extra: no target concerns them",
)


@dataclass(frozen=True)
class TrainingBench(Checked):
    """What `measure_training` measures.

    Attributes:
        model: that is trained.
        lengths: tokens of a row; those above `tokens` are left out.
        tokens: of every step, whatever the length.
        rounds: of measurements.
        minutes: that it may take: fewer rounds beyond, but at least 3; None is all rounds.
        op_length: of the op alone, one row.
        extra: also steps in bf16, and on packed rows, as the trainer makes them, at 2048 tokens.
        product_size: of the matrices that give the limit.
    """

    model: ModelConfig
    lengths: tuple[Count, ...] = (512, 2048, 8192, 16384)
    tokens: Count = 16384
    rounds: Count = 3
    minutes: Annotated[float, At(above=0)] | None = None
    op_length: Count = 2048
    extra: bool = False
    product_size: Count = 1536

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.used_lengths or any(self.tokens % length for length in self.used_lengths):
            raise UserError(
                f"--tokens is {self.tokens}; it must be a multiple of every sequence length up to it: "
                f"{', '.join(map(str, self.lengths))}"
            )
        require_retention(self.model)

    @property
    def used_lengths(self) -> tuple[int, ...]:
        """The lengths of which a step holds at least one row."""
        return tuple(length for length in self.lengths if length <= self.tokens)


@dataclass
class TrainingRow:
    """One line of the result."""

    name: str
    length: int  # tokens of a row
    batch: int  # rows of a step
    flops: float  # model flops of a step, forward and backward
    samples: list[Sample] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> Spread:
        """Tokens learned from in a second."""
        return spread(self.length * self.batch / s.seconds for s in self.samples)

    @property
    def of_limit(self) -> Spread:
        """Model flops per second as a fraction of the machine's fp32 matrix products, by the fastest library."""
        return spread(self.flops / s.seconds / max(s.limits.values()) for s in self.samples)

    @property
    def of_torch_mm(self) -> Spread:
        """Model flops per second as a fraction of the rate of `torch.mm`."""
        return spread(self.flops / s.seconds / s.limits["torch_mm"] for s in self.samples)

    def record(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {
            "name": self.name,
            "length": self.length,
            "batch": self.batch,
            "flops_per_step": self.flops,
            "tokens_per_s": vars(self.tokens_per_second),
            "of_limit": vars(self.of_limit),
            "of_torch_mm": vars(self.of_torch_mm),
            "rounds": [s._asdict() for s in self.samples],
        }


def measure_training(bench: TrainingBench, say: Say) -> dict[str, Any]:
    """Runs all contenders, interleaved; plain data for the record (see `retnet.bench.report`).

    Raises:
        UserError: transformers is missing, or no Llama fits beside the model.
    """
    peers.need("transformers")
    budget = Budget(bench.minutes)
    torch.manual_seed(0)
    bench = replace(bench, model=with_bytes(bench.model))
    op, limits = _op_contenders(bench), matrix_products(bench.product_size)
    # first as in anyone's script, with the allocator as it comes
    fresh = interleave(op, limits, bench.rounds, say, budget.deadline(0.25))
    keep_freed_memory()  # as in `retnet train`
    rows, contenders = _steps(bench)
    samples = interleave([*contenders, *op], limits, bench.rounds, say, budget.deadline())
    for row, contender in zip(rows, contenders, strict=True):
        row.samples = samples[contender.name]
    kept = {name: samples[name] for name in OP.values()}
    every = [s for part in samples.values() for s in part]
    return {
        "notes": NOTES,
        "rounds": rounds_made({"op": fresh, "steps and op, memory kept": samples}),
        "limits": {
            f"fp32_{name}_flops_per_s": vars(spread(s.limits[name] for s in every)) for name in limits
        },
        "rows": [row.record() for row in rows],
        "op": {
            "shape": dict(zip("BTHKV", _op_shape(bench), strict=True)),
            "rows": _op_record(fresh),
            "rows_with_kept_memory": _op_record(kept),
        },
        "targets": [target.record() for target in [*step_targets(rows), op_target(fresh, bench.op_length)]],
    }


def _op_record(samples: Mapping[str, list[Sample]]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "seconds": vars(spread(s.seconds for s in part)),
            "times_ours": vars(times_faster(samples[OP["ours"]], part)),
            "rounds": [s._asdict() for s in part],
        }
        for name, part in samples.items()
    ]


def step_targets(rows: list[TrainingRow]) -> list[Target]:
    """What whole steps should reach, as far as the rows were measured."""
    at = {(row.name, row.length): row for row in rows}
    targets = []
    if row := at.get((OURS, 2048)):
        targets.append(Target("model flops ÷ rate of torch.mm in fp32, T 2048", row.of_torch_mm, least=0.80))
    if (long := at.get((OURS, 16384))) and (short := at.get((OURS, 2048))):
        ratio = times_faster(long.samples, short.samples)  # equal tokens a step
        targets.append(Target("tokens/s at T 16384 ÷ at T 2048", ratio, least=0.90))
    for length, least in ((2048, 1.0), (8192, 2.0)):
        if (ours := at.get((OURS, length))) and (peer := at.get((PEER, length))):
            ratio = times_faster(ours.samples, peer.samples)
            targets.append(Target(f"tokens/s ÷ those of the Llama, T {length}", ratio, least=least))
    return targets


def op_target(samples: Mapping[str, list[Sample]], length: int) -> Target:
    """Ours against the fastest of the others, chosen by its median."""
    ratios = [times_faster(samples[OP["ours"]], samples[name]) for name in OP.values() if name != OP["ours"]]
    best = min(ratios, key=lambda ratio: ratio.median)
    return Target(f"op, forward + backward: times faster than autograd, T {length}", best, least=1.5)


def _steps(bench: TrainingBench) -> tuple[list[TrainingRow], list[Contender]]:
    config = bench.model
    assert config.vocab_size is not None
    ours = LanguageModel(config)
    size = sum(p.numel() for p in ours.parameters())
    peer = peers.llama(config.vocab_size, config.d_model, config.num_layers, size)
    learner, peer_learner = (
        Learner(ours),
        Learner(peer, lambda tokens: peer(input_ids=tokens, use_cache=False).logits),
    )
    rows, contenders = [], []

    def add(name: str, length: int, flops_per_token: int, learner: Learner) -> None:
        batch = bench.tokens // length
        text = torch.randint(ours.config.vocab_size or 1, (batch, length + 1))
        tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        rows.append(TrainingRow(name, length, batch, 3.0 * flops_per_token * bench.tokens))
        contenders.append(Contender(f"{name}, T {length}", partial(learner.seconds, tokens, targets)))

    for length in bench.used_lengths:
        flops = cost(config, length).flops_per_token
        add(OURS, length, flops, learner)
        add(PEER, length, peers.llama_flops_per_token(peer, length), peer_learner)
        if bench.extra and length == min(bench.used_lengths, key=lambda n: abs(n - 2048)):
            add(BF16, length, flops, Learner(ours, optimizer=learner.optimizer, bf16=True))
            packed = Learner(ours, _packed_logits(ours), optimizer=learner.optimizer)
            add(PACKED, length, flops, packed)
    return rows, contenders


def _packed_logits(model: LanguageModel) -> Callable[[Tensor], Tensor]:
    """As the trainer lays a batch out: its rows end to end, each a document."""

    def logits(tokens: Tensor) -> Tensor:
        rows, length = tokens.shape
        bounds = torch.arange(rows + 1, dtype=torch.int32) * length
        packed: Tensor = model(tokens.reshape(1, -1), cu_seqlens=bounds)
        return packed

    return logits


def _op_shape(bench: TrainingBench) -> tuple[int, int, int, int, int]:
    mixer = require_retention(bench.model)
    return 1, bench.op_length, mixer.num_heads, *mixer.widths(bench.model.d_model)


def _op_contenders(bench: TrainingBench) -> list[Contender]:
    B, T, H, K, V = _op_shape(bench)
    q, k, v = (torch.randn(B, T, H, width, requires_grad=True) for width in (K, K, V))
    d_out = torch.randn(B, T, H, V)
    log_decay, scale = log_decays(require_retention(bench.model).decay, H), K**-0.5

    def contender(name: str, forward: Callable[[], Tensor]) -> Contender:
        def both() -> None:
            torch.autograd.grad(forward(), (q, k, v), d_out)

        return Contender(name, lambda: median_seconds(both, 7))

    return [
        contender(OP["ours"], lambda: retention(q, k, v, log_decay)[0]),
        contender(OP["indexed 64"], lambda: peers.indexed_states(q, k, v, log_decay, scale, 64)),
        contender(OP["indexed 128"], lambda: peers.indexed_states(q, k, v, log_decay, scale, 128)),
        contender(OP["parallel"], lambda: peers.parallel_form(q, k, v, log_decay, scale)),
        contender(OP["split 64"], lambda: peers.chunk_loop(q, k, v, log_decay, scale, 64)),
        contender(OP["split 128"], lambda: peers.chunk_loop(q, k, v, log_decay, scale, 128)),
    ]
