"""Estimate of what training takes, before it starts: parameters, tokens, operations, memory, hours.

Memory counts what must be there at once: weights, gradients and the optimiser's moments in fp32 (shared out among the
processes of a run), what one pass keeps for its backward pass, and the logits with their gradient. What
blocks keep is counted from the model itself, run on the meta device; kernels' scratch memory and fragmentation are not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from retnet.host import product_rate
from retnet.measure.footprint import kept_activations, logit_bytes, with_vocabulary, working_bytes
from retnet.measure.memory import GIB, total_memory
from retnet.model.cost import cost
from retnet.settings import UserError
from retnet.train.config import RunConfig
from retnet.train.optimizer import bytes_per_parameter

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
    model, c = with_vocabulary(config), config.train
    counted = cost(model, c.seq_len)
    tokens = c.tokens_before(c.steps)
    return RunEstimate(
        name,
        runs,
        counted.total,
        tokens,
        3.0 * counted.flops_per_token * tokens,
        bytes_per_parameter(c).total * counted.total,
        kept_activations(model, c) + max(logit_bytes(model, c), working_bytes(model, c)),
    )


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
