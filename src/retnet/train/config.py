"""The configuration of a run: model, data, training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from retnet.data.config import DataConfig
from retnet.model.config import ModelConfig
from retnet.settings import PATH, At, Checked, Count, UserError

Share = Annotated[float, At(least=0, most=1)]
Momentum = Annotated[float, At(least=0, below=1)]


@dataclass(frozen=True)
class TrainConfig(Checked):
    """How to train. The defaults of the optimiser are the paper's (§4): AdamW, β = (0.9, 0.98), decay 0.05, clip 2.

    One step reads ``batch_size · accumulate`` rows of `seq_len` tokens, or fewer while the batch ramps up.

    Attributes:
        steps: of the optimiser; with `minutes`, the most there may be.
        minutes: that a run may take, from the call to its end: data, validations and checkpoints are in it. The first
            steps are measured, then as many are chosen as fit, and the schedule ends with them. None: `steps` alone.
        seq_len: tokens of a row.
        batch_size: rows of one forward and backward pass.
        accumulate: such passes in one step.
        ramp_steps: over which the passes of a step rise evenly from `ramp_from` to `accumulate`; 0: there is no ramp.
        ramp_from: passes of the first step, of which `accumulate` is a multiple, and all between are.
        optimizer: adamw, or muon for the matrices of blocks beside AdamW for all else, with one learning rate.
        momentum: of muon; None is 0.95.
        learning_rate: at its peak.
        schedule: of the learning rate after its rise; wsd is warm-up, stable, decay.
        warmup_steps: over which the learning rate rises.
        final_lr_fraction: learning rate of the last step, as a share of the peak.
        decay_fraction: share of the steps, at the end, over which wsd falls.
        beta1: of AdamW, for the mean of the gradient.
        beta2: of AdamW, for its square.
        weight_decay: of matrices; norms have none.
        clip: of the gradient's norm; 0 is none.
        spike: skip a step whose gradient's norm is more than so many times the median of the last 100; 0 skips none.
        skip_limit: steps skipped in a row, as spikes or for numbers that are not finite, after which a run saves and ends.
        z_loss: weight of (log Z)² in what is learned, Z being the softmax's normaliser; 0 is none. The loss shown has none.
        ema: decay of the moving average of weights, which then is the model of a checkpoint; 0 is none.
        seed: of weights, order of the data, dropout.
        start_from: a run, checkpoint or folder whose weights a new run begins with; None is fresh ones.
        precision: of products; auto takes bf16 where the hardware is faster with it.
        activation_checkpointing: recompute blocks in the backward pass: less memory, a third more time.
        compile: with torch.compile.
        device: auto, cpu, cuda, cuda:1, …
        threads: of the CPU; None is torch's choice.
        log_every: steps between lines of metrics.
        eval_every: steps between validations; 0 validates at the end alone.
        eval_tokens: of one validation; None is all of the validation split.
        checkpoint_every: steps between checkpoints; the last step is always saved.
        keep: latest checkpoints on disk, beside the best.
        tensorboard: write TensorBoard files too.
        wandb: tell Weights & Biases too; WANDB_MODE=offline keeps it in the run.
        patience: seconds without any progress after which several processes end, and say which one they wait for.
    """

    steps: Count = 1000
    minutes: Annotated[float, At(above=0)] | None = None
    seq_len: Count = 512
    batch_size: Count = 16
    accumulate: Count = 1
    ramp_steps: Annotated[int, At(least=0)] = 0
    ramp_from: Count = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    momentum: Momentum | None = None
    learning_rate: Annotated[float, At(least=0, most=1e3)] = 6e-4
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    warmup_steps: Annotated[int, At(least=0)] = 100
    final_lr_fraction: Share = 0.0
    decay_fraction: Share = 0.2
    beta1: Momentum = 0.9
    beta2: Momentum = 0.98
    weight_decay: Annotated[float, At(least=0, most=1e3)] = 0.05
    clip: Annotated[float, At(least=0)] = 2.0
    spike: Annotated[float, At(least=0)] = 0.0
    skip_limit: Count = 3
    z_loss: Annotated[float, At(least=0, most=1)] = 0.0
    ema: Annotated[float, At(least=0, below=1)] = 0.0
    seed: int = 0
    start_from: Annotated[str, PATH] | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    device: str = "auto"
    threads: Annotated[int, At(least=1, most=1024)] | None = None
    log_every: Count = 10
    eval_every: Annotated[int, At(least=0)] = 200
    eval_tokens: Count | None = None
    checkpoint_every: Count = 200
    keep: Count = 2
    tensorboard: bool = False
    wandb: bool = False
    patience: Annotated[float, At(above=0)] = 1800.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum is not None and self.optimizer != "muon":
            raise UserError(
                f"momentum is of optimizer 'muon', and optimizer is {self.optimizer!r}; AdamW has beta1 for it"
            )
        if 0 < self.spike <= 1:
            raise UserError(f"spike is {self.spike}; it must be above 1, or 0 to skip none")
        if self.ramp_from != 1 and not self.ramp_steps:
            raise UserError(
                f"ramp_from is {self.ramp_from} and ramp_steps 0, so that there is no ramp; set both"
            )
        if self.accumulate % self.ramp_from:
            raise UserError(
                f"ramp_from is {self.ramp_from}; accumulate, which is {self.accumulate}, must be a multiple of it"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step learns from, after the ramp."""
        return self.batch_size * self.accumulate * self.seq_len

    def passes(self, step: int) -> int:
        """Forward and backward passes of step 0, 1, …: in a ramp every multiple of `ramp_from` for equally many steps."""
        if step >= self.ramp_steps:
            return self.accumulate
        multiples = self.accumulate // self.ramp_from
        return self.ramp_from * (1 + step * (multiples - 1) // self.ramp_steps)

    def passes_before(self, step: int) -> int:
        """Of all steps before this one together, which is where its first batch lies in the order of the data."""
        multiples = self.accumulate // self.ramp_from
        # the n-th multiple of `ramp_from` begins at the first step that has reached n − 1 of the ramp's equal parts
        begins = (-(-n * self.ramp_steps // max(multiples - 1, 1)) for n in range(multiples))
        return self.ramp_from * sum(max(0, step - begin) for begin in begins)

    def tokens_before(self, step: int) -> int:
        """That all steps before this one learn from."""
        return self.passes_before(step) * self.batch_size * self.seq_len


@dataclass(frozen=True)
class ParallelConfig(Checked):
    """How the processes of a run share it: their number is the product of these, the axes of a mesh of processes.

    What is learned does not depend on it, but for rounding and for the masks of dropout.

    Attributes:
        replicate: groups of processes that hold all weights each (HSDP); they take turns with the passes of a step.
        shard: processes that take turns too, and hold a part of all weights each (FSDP). None: what the others leave.
        tp: tensor parallelism: processes that compute the same tokens, with some heads of each mixer, a part of the width
            of each FFN and of the vocabulary.
        cp: context parallelism: processes that hold a stretch of every sequence each, and a part of all weights.
    """

    replicate: Count = 1
    shard: Count | None = None
    tp: Count = 1
    cp: Count = 1

    @property
    def readers(self) -> int:
        """Batches that are read at the same time: the processes of one batch count as one. Of a resolved one."""
        assert self.shard is not None
        return self.replicate * self.shard

    @property
    def parts(self) -> int:
        """Into which FSDP cuts weights, or what `tp` leaves of them. Of a resolved one."""
        assert self.shard is not None
        return self.shard * self.cp

    def of(self, processes: int) -> ParallelConfig:
        """The axes for so many processes, all of them numbers.

        Raises:
            UserError: their product is another number; says which one would do.
        """
        sizes = {"replicate": self.replicate, "shard": self.shard or 1, "tp": self.tp, "cp": self.cp}
        product = math.prod(sizes.values())
        if self.shard is None and processes % product == 0:
            return replace(self, shard=processes // product)
        if product == processes:
            return self
        others = {name: product // size for name, size in sizes.items()}
        fits = [f"--parallel.{name} {processes // n}" for name, n in others.items() if processes % n == 0]
        instead = f"set {' or '.join(fits)}, or " if fits else ""
        raise UserError(
            f"parallel.{' × '.join(f'{name} {size}' for name, size in sizes.items())} makes {product} processes, and there "
            f"are {processes}; {instead}start {product} with torchrun --nproc-per-node {product}"
        )


@dataclass(frozen=True)
class DistillConfig(Checked):
    """Learning from another model, the teacher, in place of the text's next tokens; validations measure these as ever.

    Attributes:
        teacher: a run, a checkpoint, or a folder, of the same tokenizer.
        match: what of the teacher: logits is the distribution of the next token; mixers what each mixer answers to what the
            teacher's own reads, for which the models have as many layers of the same width.
    """

    teacher: Annotated[str, PATH]
    match: Literal["logits", "mixers"] = "logits"


@dataclass(frozen=True)
class RunConfig(Checked):
    """Everything a run is made from; ``config.toml`` of a run directory holds it complete."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    distill: DistillConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distill and (self.train.z_loss or self.train.compile):
            name = "z_loss" if self.train.z_loss else "compile"
            raise UserError(f"train.{name} is not for runs with [distill]; leave it out")
        for axis in ("tp", "cp"):
            if self.distill and (size := getattr(self.parallel, axis)) > 1:
                raise UserError(
                    f"parallel.{axis} is {size}, and [distill] shares a teacher by parallel.shard and parallel.replicate "
                    "alone; set it to 1"
                )
