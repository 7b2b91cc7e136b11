"""Where a step works: folder, device, whether it is a rehearsal, and until when."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tools.gpu_day.notebook import Found, Notebook


@dataclass(frozen=True)
class Place:
    """What a part is told.

    Attributes:
        out: folder of the day, for what is more than a record.
        rehearsal: kernels interpreted on a CPU, tiny sizes, numbers that mean nothing.
        device: that is measured.
        notebook: of the step.
        until: when all has to be done, as `time.time` counts.
        seconds: that this part should take.
    """

    out: Path
    rehearsal: bool
    device: torch.device
    notebook: Notebook
    until: float
    seconds: float

    @property
    def minutes(self) -> float:
        """That this part should take, and never beyond the end."""
        return max(1.0, min(self.seconds, self.until - time.time())) / 60


Run = Callable[[Place], Found]


def interpret_exactly() -> None:
    """In a rehearsal: the interpreter computes bf16 as a GPU does."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.ops.triton.interpreted import bf16

        bf16.install()
