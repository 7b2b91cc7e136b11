"""What tests of runs share: a tiny configuration, the weights that a run saved, a progress that ends training."""

from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from retnet.settings import load
from retnet.train.config import RunConfig
from retnet.train.progress import TrainingProgress


def tiny(config_file, **changes) -> RunConfig:
    run = load(RunConfig, config_file)
    return replace(run, train=replace(run.train, **({"steps": 4} | changes)))


def weights(run_dir: Path, name: str | None = None) -> dict[str, torch.Tensor]:
    name = name or (run_dir / "checkpoints/last").read_text().strip()
    return load_file(run_dir / "checkpoints" / name / "model.safetensors")


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Fails(TrainingProgress):
    """Ends training at a step as something that nobody expected would."""

    def __init__(self, at):
        super().__init__(Console(quiet=True))
        self.at = at

    def step(self, step, loss, rate, left=None):
        if step == self.at:
            raise RuntimeError("a bug")
