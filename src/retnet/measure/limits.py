"""Physical limits of a machine: the rate of matrix products (GEMM) and the bandwidth of memory, on a CPU or a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from retnet.host import product_rate
from retnet.measure.clock import CPU, Limits, least_seconds
from retnet.ops.torch_private import onednn_linear


def matrix_products(
    size: int = 1536, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> Limits:
    """Square matrix products of this size, flops per second, each the best of four, on all threads of torch.

    ``torch_mm``: by the library behind `torch.mm`; on a CPU also ``onednn``: by oneDNN, in fp32, where torch has it. Which
    one is faster depends on the maker of the CPU; the limit of the machine is the faster.
    """
    limits: dict[str, Callable[[], float]] = {
        "torch_mm": lambda: product_rate(dtype, size, rounds=3, device=device)
    }
    if device.type == "cpu" and onednn_linear is not None:
        a, b = torch.ones(size, size), torch.ones(size, size)
        product = partial(onednn_linear, a, b)
        limits["onednn"] = lambda: 2 * size**3 / least_seconds(product, 4)
    return limits


def memory_bandwidth(
    megabytes: int = 256, read_bytes: int | None = None, device: torch.device = CPU
) -> Limits:
    """Bytes per second between memory and the cores, all threads of torch.

    ``read``: over a buffer of `read_bytes` (default: that of ``update``), by the fastest of four readers of torch: its sum,
    its sum as integers, its norm, its product with itself. Which of them is fastest changes with the size and the machine.
    A buffer of the size of what is judged has the same share of it in the caches. ``update``: multiplying a buffer of so
    many megabytes in place, where reading and writing both count. Each is the best of three passes, so a limit is rather
    too high than too low.
    """
    buffer = torch.ones(megabytes * 2**20 // 4, device=device)
    source = buffer if read_bytes is None else torch.ones(max(2, read_bytes // 8 * 2), device=device)
    readers = (source.sum, source.view(torch.int64).sum, source.norm, lambda: source.dot(source))
    return {
        "read": lambda: source.nbytes / min(least_seconds(read, 3, device) for read in readers),
        "update": lambda: 2 * buffer.nbytes / least_seconds(lambda: buffer.mul_(1.0), 3, device),
    }


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
