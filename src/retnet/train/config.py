"""The configuration of a run: model, data, training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from retnet.data.config import DataConfig
from retnet.model.config import ModelConfig
from retnet.settings import UserError


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults of the optimiser are the paper's (§4): AdamW, β = (0.9, 0.98), decay 0.05, clip 2.

    One step reads ``batch_size · accumulate`` rows of `seq_len` tokens.
    """

    steps: int = 1000
    seq_len: int = 512
    batch_size: int = 16  # rows of one forward and backward pass
    accumulate: int = 1  # such passes in one step
    learning_rate: float = 6e-4  # at its peak
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    warmup_steps: int = 100
    final_lr_fraction: float = 0.0  # of the peak, at the last step
    decay_fraction: float = 0.2  # of the steps, at the end; wsd (warmup, stable, decay) alone
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.05  # of matrices; norms have none
    clip: float = 2.0  # of the gradient's norm; 0: none
    seed: int = 0
    start_from: str | None = (
        None  # a run, checkpoint or folder whose weights a new run begins with; None: fresh ones
    )
    precision: Literal["auto", "fp32", "bf16"] = (
        "auto"  # auto: bf16 products where the hardware is faster with them
    )
    activation_checkpointing: bool = (
        False  # recompute blocks in the backward pass: less memory, a third more time
    )
    compile: bool = False
    device: str = "auto"
    threads: int | None = None  # of the CPU; torch's choice
    log_every: int = 10
    eval_every: int = 200  # steps; 0: at the end alone
    eval_tokens: int | None = None  # None: all of the validation split
    checkpoint_every: int = 200  # steps; the last step is always saved
    keep: int = 2  # latest checkpoints on disk, beside the best
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "seq_len", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("threads", "eval_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "clip", "eval_every"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("final_lr_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; allowed: 0 to 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; allowed: 0 up to, not including, 1")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step learns from."""
        return self.batch_size * self.accumulate * self.seq_len


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is made from; ``config.toml`` of a run directory holds it complete."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
