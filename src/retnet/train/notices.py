"""What processes have to tell each other while they train: signals, and mistakes of one; heard in the sums of a step."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from retnet.errors import UserError
from retnet.train.distributed import Ranks
from retnet.train.signals import STOPPING


class Notices:
    """What arrived at this process, and what all processes know of.

    Args:
        ranks: the processes.
        device: of this one's model, over which it sums.

    Attributes:
        stopped: signals that arrived at this process; whoever collects them sets it.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        self.stopped: Sequence[signal.Signals] = ()
        self._known: list[str] = []
        self._mistake: UserError | None = None  # that the others have not heard of

    @property
    def signals(self) -> list[str]:
        """Names of signals that arrived. Several processes hear of them in a step, so all stop after the same one."""
        return [received.name for received in self.stopped] if self._ranks.alone else self._known

    def sum(self, *numbers: float | Tensor) -> list[float]:
        """Numbers summed over all ranks, which hear of signals and mistakes there too: one small reduction a step.

        Raises:
            UserError: on all ranks, what any kept for `later`.
        """
        arrived = [float(kind in self.stopped) for kind in STOPPING]
        found = self._ranks.sum([*numbers, *arrived, float(self._mistake is not None)], self._device)
        *sums, sigterm, sigint, mistakes = found
        if mistakes:
            self.tell()
        self._known = [kind.name for kind, of in zip(STOPPING, (sigterm, sigint), strict=True) if of]
        return sums

    @contextmanager
    def later(self) -> Iterator[None]:
        """Keeps a mistake that this process alone makes until all hear of it; one alone makes it at once."""
        try:
            yield
        except UserError as error:
            if self._ranks.alone:
                raise
            self._mistake = error

    def tell(self) -> None:
        """Ends all ranks with the mistake that one has kept, if there is any; all must call it."""

        def tell() -> None:
            if self._mistake is not None:
                raise self._mistake

        self._ranks.together(tell)
