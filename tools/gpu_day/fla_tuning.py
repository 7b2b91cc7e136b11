"""Tunes flash-linear-attention in little time: `python -m tools.gpu_day.fla_tuning N OF H K V` compiles a share.

Triton's autotuner compiles the configurations of a kernel one after the other, some 180 of them at every head shape. Here
each process is shown its share of them alone, and leaves what it compiled in Triton's cache; the process that measures then
finds all of it there, and times every configuration itself, as it would have without. It does so on a sequence of `TUNED`
tokens, for the autotuner chooses once, whatever the length of what comes first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from retnet.bench.implementations import HeadShape
from tools.gpu_day.checks import WORKERS

T = TypeVar("T")
SHORT = 512  # tokens, where a kernel is run only to be compiled
TUNED = 8192


def compile_all(shape: HeadShape, seconds: float) -> None:
    """Runs a process for each share, and ends those that take longer; what they did not come to is compiled later."""
    count, until = max(1, min(WORKERS, (os.cpu_count() or 2) - 2)), time.monotonic() + seconds
    words = [sys.executable, "-m", "tools.gpu_day.fla_tuning"]
    numbers = [[str(n) for n in (number, count, *shape)] for number in range(count)]
    processes = [subprocess.Popen([*words, *of_share], stdin=subprocess.DEVNULL) for of_share in numbers]
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def tune(shape: HeadShape) -> None:
    """Lets the autotuner choose all configurations."""
    with _timed(warmup=5, rep=25):
        run_all(shape, TUNED)


def run_all(shape: HeadShape, tokens: int) -> None:
    """All its kernels once, forward and backward."""
    import torch

    from retnet.measure.peers import flash_linear_attention

    H, K, V = shape
    inputs = [
        torch.randn(1, tokens, H, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for width in (K, K, V)
    ]
    for name, form in flash_linear_attention().items():
        try:
            form(*inputs).float().sum().backward()
        except Exception as error:  # no configuration, or none of this share, fits this card
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)


@contextmanager
def _timed(**milliseconds: int) -> Iterator[None]:
    """The autotuner gives each configuration so much time instead of the usual 125 ms."""
    import triton.testing

    usual = triton.testing.do_bench
    triton.testing.do_bench = partial(usual, **milliseconds)
    try:
        yield
    finally:
        triton.testing.do_bench = usual


def share(configurations: Sequence[T], number: int, count: int) -> list[T]:
    """Every `count`-th configuration; never none, for a kernel must have one."""
    return list(configurations[number % max(1, len(configurations)) :: count])


def see_a_share(number: int, count: int) -> None:
    """From now on, autotuners are made with their share of configurations alone."""
    from triton.runtime.autotuner import Autotuner

    whole: Any = Autotuner.__init__

    def partly(self: Any, fn: Any, arg_names: Any, configs: Any, *rest: Any, **named: Any) -> None:  # noqa: ANN401
        whole(self, fn, arg_names, share(configs or (), number, count), *rest, **named)

    Autotuner.__init__ = partly  # type: ignore[method-assign]


def main(number: int, count: int, shape: HeadShape) -> None:
    """Compiles a share."""
    see_a_share(number, count)  # before any of them is made
    with _timed(warmup=1, rep=1):  # nobody looks at these times
        run_all(shape, SHORT)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), HeadShape(*map(int, sys.argv[3:6])))
