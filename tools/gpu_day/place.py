"""Where a step works: folder, device, whether it is a rehearsal, and until when."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tools.gpu_day.notebook import Found, Notebook, attempts


@dataclass(frozen=True)
class Place:
    """What a part is told.

    Attributes:
        out: folder of the day, for what is more than a record.
        rehearsal: kernels interpreted on a CPU, tiny sizes, numbers that mean nothing.
        device: that is measured.
        notebook: of the step.
        part: that is done.
        until: when all has to be done, as `time.time` counts.
        seconds: that this part should take.
        ended: when it is ended at the latest, as `time.time` counts.
    """

    out: Path
    rehearsal: bool
    device: torch.device
    notebook: Notebook
    part: str
    until: float
    seconds: float
    ended: float

    @property
    def minutes(self) -> float:
        """That this part should take, and never beyond the end."""
        return max(1.0, min(self.seconds, self.until - time.time())) / 60

    def note(self, found: Found) -> None:
        """What the part has found so far; nothing that happens later loses it."""
        self.notebook.note(self.part, found)

    def before(self) -> Found:
        """What the attempts before this one had found at last (one that was killed at once knows nothing), or nothing."""
        *earlier, _ = attempts(self.notebook.parts()[self.part])
        found: Found = next((one["found"] for one in reversed(earlier) if "found" in one), {})
        return found


Run = Callable[[Place], Found]


class StoppedError(Exception):
    """A part ended early, as it was told to, and can go on later; its text says what is left."""


def usable(device: torch.device) -> bool:
    """Whether the card still answers this process, and holds no memory of what failed."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return bool(torch.ones(1, device=device).item() == 1.0)
    except RuntimeError:
        return False


def interpret_exactly() -> None:
    """In a rehearsal: the interpreter computes bf16 as a GPU does."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.ops.triton.interpreted import bf16

        bf16.install()
