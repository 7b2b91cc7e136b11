"""What the steps between two lines of metrics cost: speed, share of the hardware's rate, memory, waiting for data."""

from __future__ import annotations

import torch

from retnet import host
from retnet.model.cost import cost
from retnet.train.config import RunConfig

# In lines of metrics, what the machine decides; all else is the same whenever a run is made again.
MEASURED = frozenset(
    {
        *("tokens_per_s", "tokens_per_s_per_device", "utilisation", "memory_bytes", "data_wait_s", "seconds"),
        *("checkpoint_step", "checkpoint_stall_s", "checkpoint_write_s"),
    }
)


class StepMeter:
    """Counts tokens and seconds of steps since the last line.

    `utilisation` is model flops a second and device ÷ what `torch.mm` reaches there on square matrices in the precision of
    the run, measured once when training begins (on a CPU with the threads there are). A token's flops are three times those
    of its forward pass (`retnet.model.cost`); what activation checkpointing computes again does not count.
    """

    def __init__(self, config: RunConfig, device: torch.device, world: int) -> None:
        self._flops = 3 * cost(config.model, config.train.seq_len).flops_per_token
        self._rate = host.matrix_rate(device, config.train.precision)
        host.forget_peak(device)  # the matrices of the measurement are not the run's
        self._device, self._world = device, world
        self._tokens, self._seconds, self._waited = 0, 0.0, 0.0

    def step(self, tokens: int, seconds: float, waited: float) -> None:
        """Notes a step: tokens of all ranks, its seconds, and how many of them went by before its data was there."""
        self._tokens += tokens
        self._seconds += seconds
        self._waited += waited

    def line(self) -> dict[str, float]:
        """What was measured since the last call. Memory is the most this process has held."""
        speed = self._tokens / self._seconds
        found = {
            "tokens_per_s": speed,
            "tokens_per_s_per_device": speed / self._world,
            "utilisation": speed / self._world * self._flops / self._rate,
            "memory_bytes": host.peak_memory(self._device),
            "data_wait_s": self._waited,
        }
        self._tokens, self._seconds, self._waited = 0, 0.0, 0.0
        return found
