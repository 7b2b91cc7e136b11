"""Progress of training: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Task, TextColumn
from rich.progress import Progress as Live
from rich.text import Text

from retnet.data import PreparationProgress, Problem
from retnet.model.cost import cost
from retnet.train.config import RunConfig, TrainConfig

PROBLEMS_SHOWN = 5
SECONDS_BETWEEN_LINES = 5.0


class TrainingProgress:
    """Tells a person how preparing and training go. All of it goes to stderr; stdout is for results.

    Args:
        console: to print on.
        way_on: how what was stopped goes on.
    """

    def __init__(self, console: Console | None = None, way_on: str = "--resume continues") -> None:
        self.way_on = way_on
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._steps, self._line = 0, 0.0
        self._bits: float | None = None
        self._problems = 0

    @classmethod
    def silent(cls) -> TrainingProgress:
        """One that shows nothing."""
        return cls(Console(quiet=True))

    def say(self, text: str) -> None:
        """One line, above the live line if there is one."""
        self._console.print(text, markup=False)

    def problem(self, problem: Problem) -> None:
        """Something in the corpus that could not be used; the first few are shown, all are counted in the manifest."""
        self._problems += 1
        if self._problems <= PROBLEMS_SHOWN:
            self.say(f"data: {problem}")
        elif self._problems == PROBLEMS_SHOWN + 1:
            self.say("data: more problems follow; the manifest of the prepared data counts them all")

    def preparing(self, done: PreparationProgress) -> None:
        """How far the tokens are prepared."""
        if time.monotonic() - self._line > SECONDS_BETWEEN_LINES:
            self._line = time.monotonic()
            part = f" ({done.bytes_read / done.bytes_total:.0%})" if done.bytes_total else ""
            self.say(f"preparing data: {done.words}{part}")

    @contextmanager
    def training(self, config: RunConfig, device: torch.device, step: int) -> Iterator[None]:
        """Frames the training loop, which begins after `step`."""
        c = config.train
        size = cost(config.model).total
        where = f"{device.type}, {c.precision}"
        goes = f"{c.steps:,} steps of {c.tokens_per_step:,} tokens"
        begun = f", from step {step:,}" if step else ""
        if step < c.steps:
            self.say(f"training {size / 1e6:.2f} M parameters on {where}: {goes}{begun}")
        else:
            self.say(f"finished before: {goes}")
        self._steps = c.steps
        if not self._console.is_terminal or self._console.quiet:
            yield
            return
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            _MeasuredColumn(),
        )
        with Live(*columns, console=self._console) as self._live:
            self._live.add_task("", total=c.steps, completed=step, loss=None, rate=None, bits=None, left=None)
            yield
        self._live = None

    def planned(self, config: TrainConfig) -> None:
        """The number of steps was chosen."""
        self._steps = config.steps
        if self._live is not None:
            self._live.update(self._live.task_ids[0], total=config.steps)
        self.say(f"{config.steps:,} steps fit into {config.minutes:g} minutes on this machine")

    def step(self, step: int, loss: float, rate: float, left: float | None = None) -> None:
        """After a step: loss in nats per token, speed in tokens per second, seconds that are left."""
        if self._live is not None:
            remaining = None if left is None else _duration(left)
            self._live.update(self._live.task_ids[0], completed=step, loss=loss, rate=rate, left=remaining)
        elif time.monotonic() - self._line > SECONDS_BETWEEN_LINES or step == self._steps:
            self._line = time.monotonic()
            remaining = "" if left is None else f", {_duration(left)} left"
            bits = "" if self._bits is None else f", validation {self._bits:.3f} bits/byte"
            self.say(f"step {step}/{self._steps}: loss {loss:.3f}{bits}, {rate:,.0f} tokens/s{remaining}")

    def validated(self, step: int, bits_per_byte: float) -> None:
        """After a validation."""
        self._bits = bits_per_byte
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=step, bits=bits_per_byte)
        self.say(f"step {step}: validation {bits_per_byte:.4f} bits/byte")


class _MeasuredColumn(TextColumn):
    """Loss, speed and validation, as far as they are known."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        known: dict[str, Any] = {name: value for name, value in task.fields.items() if value is not None}
        forms = {
            "loss": "loss {:.3f}",
            "bits": "val {:.3f} bits/byte",
            "rate": "{:,.0f} tokens/s",
            "left": "{} left",
        }
        return Text("  ".join(form.format(known[name]) for name, form in forms.items() if name in known))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
