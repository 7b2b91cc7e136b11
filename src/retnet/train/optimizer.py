"""Optimisers: AdamW as in the paper (§4), Muon beside it; the learning-rate schedule; their memory in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from retnet.model import LanguageModel
from retnet.train.config import TrainConfig

MUON_MOMENTUM = 0.95
FP32 = 4  # bytes of a number


class BytesPerParameter(NamedTuple):
    """What training keeps of a parameter in fp32, whatever the precision of products."""

    weight: int
    gradient: int
    moments: int  # of Muon, that of matrices, which are nearly all
    average: int  # if one is kept

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def bytes_per_parameter(config: TrainConfig) -> BytesPerParameter:
    """Bytes that a parameter takes beside what passes need: two moments of AdamW, or one momentum of Muon."""
    moments = {"adamw": 2, "muon": 1}[config.optimizer]
    return BytesPerParameter(FP32, FP32, moments * FP32, FP32 if config.ema else 0)


def optimizers(model: LanguageModel, config: TrainConfig) -> tuple[torch.optim.Optimizer, ...]:
    """The optimisers of a model, which together have all its parameters: AdamW, or Muon and AdamW.

    Muon (momentum, Nesterov, update made orthogonal by five Newton-Schulz iterations in bf16) has the weights of the linear
    layers inside blocks, and AdamW all else: embedding, head, norms, and what mixers learn beside their products. Muon's
    updates are scaled by 0.2 · √max(rows, columns) to the size that AdamW's have (Liu et al. 2025, "Muon is scalable for
    LLM training", §2.2), so both take one learning rate and one weight decay.
    """
    if config.optimizer == "adamw":
        return (adamw(model, config),)
    products = [
        module.weight for block in model.blocks for module in block.modules() if isinstance(module, nn.Linear)
    ]
    matrices = list(dict.fromkeys(products))
    muon = torch.optim.Muon(
        matrices,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=MUON_MOMENTUM if config.momentum is None else config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return muon, adamw(model, config, without=matrices)


def adamw(model: nn.Module, config: TrainConfig, without: Sequence[Tensor] = ()) -> torch.optim.AdamW:
    """AdamW over all parameters but some; weight decay on matrices alone, not on norms."""
    left_out = set(without)
    parameters = [p for p in model.parameters() if p not in left_out]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=1e-8, fused=True
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of step 0 … steps − 1: a linear rise over `warmup_steps`, then the schedule down to its final fraction.

    ``linear`` and ``cosine`` fall over all that remains, ``wsd`` over the last `decay_fraction` of the steps,
    ``constant`` never.
    """
    warmup = min(config.warmup_steps, config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    begin = warmup
    if config.schedule == "wsd":
        begin = max(warmup, config.steps - round(config.steps * config.decay_fraction))
    if config.schedule == "constant" or step < begin:
        return config.learning_rate
    past = (step - begin + 1) / (config.steps - begin)  # in (0, 1], 1 at the last step
    left = (1 + math.cos(math.pi * past)) / 2 if config.schedule == "cosine" else 1 - past
    floor = config.final_lr_fraction
    return config.learning_rate * (floor + (1 - floor) * left)


def optimizer_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimisers' memory by parameter and kind, such as ``"blocks.0.ffn.fc1.weight/exp_avg"``."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for optimizer in optimizers
        for parameter, memory in optimizer.state.items()
        for key, value in memory.items()
    }


def empty_memory(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], names: Iterable[str]
) -> dict[str, Tensor]:
    """Gives optimisers memory for what `optimizer_tensors` named: zeros, for saved numbers to be copied into."""
    parameters = dict(model.named_parameters())
    owners = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    memory = {}
    for name in names:
        parameter, _, key = name.rpartition("/")
        own = parameters[parameter]
        # the step is a number beside its parameter; moments are shaped, typed and shared among ranks as it is
        memory[name] = torch.zeros((), device=own.device) if key == "step" else torch.zeros_like(own.detach())
        owners[own].state[own][key] = memory[name]
    return memory
