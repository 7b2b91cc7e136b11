"""The host machine: hardware and versions, choice of device and type, GEMM rate, and memory settings of the process."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from retnet.settings import UserError, nearest

Result = TypeVar("Result")
Precision = Literal["fp32", "bf16"]  # of products

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}  # of weights that are loaded


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep what is freed instead of handing it back to the system.

    A training step on the CPU allocates the same large tensors again and again; each time the system maps fresh zeroed
    pages, which costs several times as much as the arithmetic on them (measured: an elementwise product of 8 M numbers
    takes 10.6 ms with fresh pages and 1.7 ms without). Elsewhere than on glibc this does nothing.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of mallopt(3)
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)
    # never; at 2³¹ − 1, gigabytes of gradients were mapped anew at every step
    libc.mallopt(trim_threshold, -1)
    libc.mallopt(top_pad, 64 << 20)


def map_large_tensors() -> None:
    """Tells glibc's malloc to map each large tensor by itself, so that resident memory is what is alive.

    Left alone, malloc raises its threshold to the size of what is freed, and tensors lie among each other's gaps: training
    steps that hold 425 MiB peaked at 498 to 609. Slower; for measuring memory. Elsewhere than on glibc this does nothing.
    """
    if sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc":
        mmap_threshold = -3  # of mallopt(3); setting it keeps it where it is
        ctypes.CDLL(None).mallopt(mmap_threshold, 256 << 10)


def in_passing_thread(function: Callable[[], Result]) -> Result:
    """What a function returns or raises, called in a thread that ends with it, and so does its OpenMP team.

    Every thread that computes has a team of its own. Where the teams of a process have more threads than there are cores,
    libgomp puts threads to sleep at every barrier instead of letting them spin: measured, a step of a model of 17 M
    parameters with int8 weights took 2.6 ms instead of 1.1. So whoever computes in a thread for long (a server) has what
    comes before, such as reading a model, done in a passing one.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="retnet-passing")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def choose_device(name: str) -> torch.device:
    """The device of this name; ``"auto"`` is a GPU if there is one.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it has shapes, and no numbers")
    except (RuntimeError, AssertionError) as error:
        here = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used here: {reason}; {nearest(name, here)}") from None
    return device


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has, in use or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choose_dtype(name: str | None) -> torch.dtype | None:
    """The type of this name, a key of `DTYPES`; None stays None, which is that of the file.

    Raises:
        UserError: no such type; answers with the nearest.
    """
    if name is not None and name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}; {nearest(name, DTYPES)}")
    return None if name is None else DTYPES[name]


def choose_precision(precision: Literal["auto"] | Precision, device: torch.device) -> Precision:
    """``"fp32"`` or ``"bf16"``; ``"auto"`` takes bf16 on GPUs that have it, and on CPUs whose bf16 products are faster.

    CPUs are measured, since torch reports bf16 as supported where it is emulated and several times slower.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    narrow, wide = matrix_rate(device, "bf16"), matrix_rate(device, "fp32")
    return "bf16" if narrow > 1.5 * wide else "fp32"


def fast_dtype(device: torch.device) -> torch.dtype:
    """The type whose products are fast there, for measurements: bf16, but fp32 on a CPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def product_rate(
    dtype: torch.dtype,
    size: int = 768,
    rounds: int = 5,
    device: torch.device | str = "cpu",
    *,
    busy: bool = False,
) -> float:
    """Matrix products (GEMM) of this type by `torch.mm`, in floating-point operations per second.

    Args:
        dtype: of the matrices.
        size: of the square matrices.
        rounds: of which the best counts; one more is made before.
        device: where.
        busy: others work on this CPU too: its cores are timed as they work for this process, and all rounds count.
    """
    # random: a GPU multiplies ones faster, for it takes less power
    g = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, dtype=dtype, device=device, generator=g) for _ in range(2))
    cuda = torch.device(device).type == "cuda"
    seconds = []
    for _ in range(rounds + 1):
        begin = time.process_time() / torch.get_num_threads() if busy else time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize(device)
        end = time.process_time() / torch.get_num_threads() if busy else time.perf_counter()
        seconds.append(end - begin)
    return 2 * size**3 / (sum(seconds[1:]) / rounds if busy else min(seconds))


def matrix_rate(device: torch.device, precision: str) -> float:
    """`product_rate` of a device in ``"fp32"`` or ``"bf16"``, with the threads there are; measured once in a process."""
    return _matrix_rate(
        device, torch.bfloat16 if precision == "bf16" else torch.float32, torch.get_num_threads()
    )


@functools.cache
def _matrix_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    return product_rate(dtype, 8192 if device.type == "cuda" else 768, device=device)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of a GPU, what torch allocated there; else resident memory (VmHWM)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident() or _peak_of_usage()


def peak_resident(pid: int | str = "self") -> int:
    """The most bytes that a process has held resident (VmHWM); 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def forget_peak(device: torch.device) -> None:
    """Lets `peak_memory` of a GPU begin anew, from what is held now; that of resident memory cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_of_usage() -> int:
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def describe() -> dict[str, Any]:
    """What a record of a run or a measurement must say: code, versions, hardware."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "versions": versions("retnet", "torch", "numpy", "tokenizers", "safetensors"),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_of(torch.device("cpu")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions(*packages: str) -> dict[str, str | None]:
    """Package → its installed version, None where it is missing."""
    found = dict.fromkeys(packages)
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _git(*words: str) -> str | None:
    home = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(home), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
    """The maker's name, with AVX2 where that is the CPU's newest; "as" what ATEN_CPU_CAPABILITY keeps torch to.

    Virtual machines hide models: an "AMD EPYC" may be of any generation, with AVX-512 or without.
    """
    uses = torch.backends.cpu.get_cpu_capability()
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        return f"{_maker()} as {uses}"
    return f"{_maker()} with {uses}" if uses == "AVX2" else _maker()


def _maker() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
