"""Timing and limits on any device: calls queue up on a GPU, so a clock has to wait for them."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import torch

from retnet.bench.timing import Limits, matrix_products, median_seconds, memory_bandwidth


def wait(device: torch.device) -> None:
    """Until everything queued on a GPU is done; a CPU has nothing queued."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def stopwatch(
    run: Callable[[], object], device: torch.device, units: float = 1.0, budget: float = 0.15
) -> Callable[[], float]:
    """Measures seconds of a call ÷ `units`: the median of as many calls as the budget, in seconds, holds, at most 20.

    How many that is, the first measurement finds out (the one that `interleave` does not count). On a GPU, calls that
    are shorter than 10 ms are timed several at once.
    """
    times, queued = 0, 1

    def all_queued() -> None:
        for _ in range(queued):
            run()
        wait(device)

    def measure() -> float:
        nonlocal times, queued
        wait(device)
        seconds = median_seconds(all_queued, times or 1, warmup=int(times > 1), budget=budget) / queued
        if not times:
            queued = 1 if device.type == "cpu" else max(1, min(50, int(0.01 / seconds)))
            times = max(1, min(20, int(budget / seconds / queued)))
        return seconds / units

    return measure


def product_limits(device: torch.device, dtype: torch.dtype, size: int) -> Limits:
    """Square matrix products of this size, flops per second, by name; on a GPU of this type and by torch.mm alone."""
    if device.type == "cpu":
        return matrix_products(size)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return {"torch_mm": lambda: 2 * size**3 / _best(lambda: a @ b, device)}


def update_limit(device: torch.device, megabytes: int) -> Limits:
    """Bytes per second of multiplying a large buffer in place, reading and writing counted."""
    if device.type == "cpu":
        return {"update": memory_bandwidth(megabytes)["update"]}
    buffer = torch.ones(megabytes * 2**20 // 4, device=device)
    return {"update": lambda: 2 * buffer.nbytes / _best(lambda: buffer.mul_(1.0), device)}


def recent(limits: Limits, seconds: float = 1.0) -> Limits:
    """The same limits, but measured anew only where the last measurement is older than so many seconds."""

    def remembering(measure: Callable[[], float]) -> Callable[[], float]:
        rate, taken = 0.0, -float("inf")

        def rate_now() -> float:
            nonlocal rate, taken
            if time.perf_counter() - taken > seconds:
                rate, taken = measure(), time.perf_counter()
            return rate

        return rate_now

    return {name: remembering(measure) for name, measure in limits.items()}


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still get there."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(device)[0])


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of five calls after one that does not count."""
    found = []
    for _ in range(6):
        wait(device)
        begin = time.perf_counter()
        run()
        wait(device)
        found.append(time.perf_counter() - begin)
    return min(found[1:])
