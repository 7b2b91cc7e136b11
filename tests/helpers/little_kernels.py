"""Kernels that compile in a second, of all kinds that `retnet.ops.cpu.jit` makes: what it does is seen on them as on ours.

The commands of `run` have processes of their own, in which nothing was compiled before.
"""

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from retnet.ops.cpu.jit import optional
from retnet.ops.cpu.openmp import run as run_kernel
from tests.helpers.forks import shared

ROOT = Path(__file__).parents[2]


@optional
def kernels(made, key):
    """Two kernels of a table (address, how many numbers); the second is linked to a shared function."""
    factor, number = key
    array, numbers = made.array, made.numbers

    def add(address, n):
        x = array(address, (n,), number)
        for i in range(n):
            x[i] += factor

    shared = made.shared(add, 2)

    @made.function
    def times(x):
        return x * factor

    @made.kernel
    def scaled(pointer):
        table = numbers(pointer, 2)
        x = array(table[0], (table[1],), number)
        for i in range(len(x)):
            x[i] = times(x[i])

    @made.kernel
    def moved(pointer):
        table = numbers(pointer, 2)
        shared(table[0], table[1])

    return scaled, moved


def use(word="2"):
    """Checks what both compute."""
    factor, wide = int(float(word)), "." in word
    x = torch.arange(40, dtype=torch.float64 if wide else torch.float32)
    want = x * factor + factor
    for kernel in kernels((factor, np.float64 if wide else np.float32)):
        run_kernel(kernel, (x.data_ptr(), len(x)))
    assert torch.equal(x, want), (word, x)


def main() -> None:
    """Uses the kernels of all words; what is logged goes to standard output."""
    from numba.core import config

    config.reload_config()  # it was imported before the variables were there
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, force=True)
    for word in sys.argv[1:]:
        use(word)
    print("done")


def run(cache: Path, *commands: Sequence[str], call: str = f"{__name__}:main") -> list[str]:
    """What processes say that run at the same time, each with words such as "2" (for fp32) and "2.0" (for fp64)."""
    environment = {"NUMBA_CACHE_DIR": str(cache)}
    done = shared().together(commands, ROOT, call=call, environment=environment)
    for one in done:
        assert (one.returncode, one.stderr, one.stdout.endswith("done\n")) == (0, "", True), (
            one.stdout + one.stderr
        )
    return [one.stdout for one in done]


def with_a_full_disk() -> None:
    """`main`, where nothing can be kept."""
    from numba.core import caching

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    caching.IndexDataCacheFile.save = refuse
    main()


def with_ctrl_c() -> None:
    """`main` behind one try during which Ctrl-C is pressed, as LLVM hands over the first thing that it compiled."""
    from numba.core.codegen import CPUCodeLibrary
    from numba.core.registry import cpu_target

    pressed = []

    def press(*arguments: object) -> None:
        if not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)
        CPUCodeLibrary._object_compiled_hook(*arguments)

    engine = cpu_target.target_context.codegen()._engine
    engine.set_object_cache(press, CPUCodeLibrary._object_getbuffer_hook)
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted")
    main()
