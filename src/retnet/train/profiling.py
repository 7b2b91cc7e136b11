"""Profile of training steps: where their time goes, as a trace that Perfetto (https://ui.perfetto.dev) opens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from retnet.errors import UserError, told

WAITED, WARM, TRACED = (
    3,
    1,
    3,
)  # steps of the call that are not looked at, that warm the profiler up, and that are traced


@contextmanager
def profiled(
    folder: Path, step: int, device: torch.device, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Traces three steps of those made inside the block, after the first four; what it yields is called after each.

    A trace that cannot be written is said, and training goes on.

    Args:
        folder: where the trace goes, which is made if need be; its name says which steps it has.
        step: steps made before.
        device: where the model lies.
        say: how a person hears of it, or why there is none.
    """
    first = step + WAITED + WARM + 1
    path = folder / f"steps-{first}-to-{first + TRACED - 1}.json.gz"
    steps = 0

    def write(found: profile) -> None:
        if steps < WAITED + WARM + TRACED:
            return
        try:
            with told(f"write {path}"):
                folder.mkdir(parents=True, exist_ok=True)
                found.export_chrome_trace(str(path))
        except UserError as error:
            say(f"no profile: {error}")
            return
        say(f"profile of steps {first} to {first + TRACED - 1}: {path}; https://ui.perfetto.dev opens it")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    plan = schedule(wait=WAITED, warmup=WARM, active=TRACED, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:

        def after_step() -> None:
            nonlocal steps
            steps += 1
            profiler.step()

        yield after_step
    if steps < WAITED + WARM + TRACED:
        say(
            f"no profile: it is of steps {first} to {first + TRACED - 1}, and there were {steps} in this call"
        )
