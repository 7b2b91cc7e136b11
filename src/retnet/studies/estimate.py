"""Estimate of what training takes, before it starts: parameters, tokens, operations, memory, hours.

Memory counts what must be there at once: weights, gradients and AdamW's two moments in fp32 (16 bytes a parameter, shared
out among the processes of a run), what one pass keeps for its backward pass, and the logits with their gradient. What
blocks keep is counted from the model itself, run on the meta device; kernels' scratch memory and fragmentation are not.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple, cast

import torch

from retnet.host import product_rate
from retnet.measure.memory import GIB, kept_for_backward, total_memory
from retnet.model import Block, LanguageModel, ModelConfig
from retnet.model.cost import cost
from retnet.nn import Positions
from retnet.settings import UserError
from retnet.train.config import RunConfig

BYTES_PER_PARAMETER = 16  # fp32: weight, gradient, two moments
UTILISATION = (
    0.35  # of the rate of matrix products, where nobody says another; small models on a CPU reach about that
)
ROUGH = 3.0  # how far off the guess of hours may be


class RunEstimate(NamedTuple):
    """One kind of run of a study."""

    name: str
    runs: int  # how many such, learning rates and seeds together
    parameters: int
    tokens: int  # of one run
    flops: float  # of one run: forward and backward, three times a forward pass
    model_bytes: int  # weights, gradients and moments, all processes together
    pass_bytes: int  # what one forward and backward pass keeps, in each process

    def hours(self, flops_per_second: float) -> float:
        """Of all its runs, one after the other, at a rate really reached."""
        return self.runs * self.flops / flops_per_second / 3600

    def bytes_per_process(self, processes: int) -> float:
        """Memory of each of so many processes that share a run."""
        return self.model_bytes / processes + self.pass_bytes


def plan(name: str, config: RunConfig, runs: int) -> RunEstimate:
    """Counts one kind of run. Where only a file knows the size of the vocabulary, that of bytes is taken."""
    model, c = config.model, config.train
    model = replace(model, vocab_size=model.vocab_size or config.data.learned_vocab or 257)
    counted = cost(model, c.seq_len)
    tokens = c.tokens_before(c.steps)
    return RunEstimate(
        name,
        runs,
        counted.total,
        tokens,
        3.0 * counted.flops_per_token * tokens,
        BYTES_PER_PARAMETER * counted.total,
        _pass_bytes(model, config),
    )


def _pass_bytes(model: ModelConfig, config: RunConfig) -> int:
    c = config.train
    rows = c.batch_size * c.seq_len
    assert model.vocab_size is not None
    layers = [_kept_bytes(model.of_layer(number), c.seq_len) for number in range(model.num_layers)]
    blocks = [each * c.batch_size // (2 if c.precision == "bf16" else 1) for each, _ in layers]
    shared = sum(dict(zip(model.mixers_by_layer, (shared for _, shared in layers), strict=True)).values())
    inputs = rows * model.d_model * 4
    kept = model.num_layers * inputs + max(blocks) if c.activation_checkpointing else sum(blocks)
    return (
        kept + shared * c.batch_size + 3 * rows * model.vocab_size * 4
    )  # logits in fp32, their logarithms, their gradient


@lru_cache
def _kept_bytes(model: ModelConfig, length: int) -> tuple[int, int]:
    """What each block keeps of a sequence for its backward pass, and what all share (cos, sin); fp32, weights left out."""
    with torch.device("meta"):
        block = LanguageModel(model).blocks[0]
        x = torch.empty(1, length, model.d_model, requires_grad=True)
        positions: Positions | None = cast(Block, block).mixer.positions(x)
    shared = sum(y.nbytes for y in positions or () if y is not None and y.is_floating_point())
    return kept_for_backward(lambda: block(x, None, positions), block.parameters()) - shared, shared


def rate() -> float:
    """Matrix products of this machine in operations per second: fp32 on a CPU, bf16 on a GPU, measured.

    On a CPU by the time that its cores worked for this process, which others at work beside it hardly change.
    """
    if not torch.cuda.is_available():
        return product_rate(torch.float32, rounds=20, busy=True)
    return product_rate(torch.bfloat16, 8192, rounds=4, device="cuda") * torch.cuda.device_count()


def require(plans: list[RunEstimate], hours: float, processes: int, at_once: int) -> float:
    """Refuses what this machine cannot do.

    Hours are a rough guess, on a busy machine a poor one: only what would take `ROUGH` times the budget is refused.

    Args:
        plans: what is to be run.
        hours: it may take.
        processes: that share one run.
        at_once: runs at the same time.

    Returns:
        the hours expected.

    Raises:
        UserError: it needs more memory, or far more hours; both with the numbers.
    """
    for each in plans:
        need = each.bytes_per_process(processes) * (1 if torch.cuda.is_available() else processes * at_once)
        if need > total_memory():
            raise UserError(
                f"{each.name} needs about {need / GIB:,.0f} GiB, this machine has {total_memory() / GIB:,.0f} GiB; take a "
                "smaller --scale, fewer --workers or more --processes; --dry-run tells what it takes where"
            )
    reached = UTILISATION * rate()
    need = sum(each.hours(reached) for each in plans)
    if need > ROUGH * hours:
        raise UserError(
            f"about {need:,.3g} hours of training would be needed here (at {reached / 1e12:.3g} Tflop/s, "
            f"{UTILISATION:.0%} of the measured matrix products), but the study may take {hours:g}; "
            "take a smaller --scale or fewer --seeds, or allow more --hours; --dry-run tells what it takes where"
        )
    return need
