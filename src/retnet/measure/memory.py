"""Memory use: of a process (peak resident memory), of what a forward pass keeps for its backward pass, of a device."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from retnet.host import peak_memory
from retnet.ops.torch_private import TorchDispatchMode, tree_leaves

GIB = 2**30
UNITS = (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))


class Watch:
    """Bytes that a process has come to hold since the watch was made, and the most it ever held meanwhile.

    On a GPU: what torch has allocated there. On a CPU: resident memory. Its peak is the system's own high-water mark
    (VmHWM), which belongs to this process alone, while getrusage's also counts the process that started it; where the
    mark cannot be set back (elsewhere than on Linux), the peak is that since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        give_back()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_mark()
        self.before = self._held()

    def held(self) -> int:
        """Now, beyond what was held at first."""
        give_back()
        return max(self._held() - self.before, 0)

    def peak(self) -> int:
        """At most, beyond what was held at first."""
        return max(peak_memory(self.device) - self.before, 0)

    def _held(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return int(psutil.Process().memory_info().rss)


def kept_for_backward(run: Callable[[], Tensor], weights: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass: each storage once, weights left out."""
    known = {w.untyped_storage()._cdata for w in weights}
    kept: dict[int, int] = {}  # storage → bytes

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = run()
    del graph  # it held the tensors, so that no storage was counted under the address of another
    return sum(kept.values())


def most_alive(run: Callable[[], object]) -> int:
    """Bytes of the tensors that a computation makes, as many as are there at once; what its operators have inside is not."""
    watch = _Alive()
    with watch:
        kept = run()
    del kept
    return watch.most


class _Alive(TorchDispatchMode):
    """Counts storages from the operator that made them until nobody has them any more."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.most = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Runs an operator."""
        found = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and (place := x.untyped_storage()._cdata) not in self._known | given:
                self._known.add(place)
                self._now += x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self._gone, place, x.untyped_storage().nbytes())
        self.most = max(self.most, self._now)
        return found

    def _gone(self, place: int, nbytes: int) -> None:
        self._known.discard(place)
        self._now -= nbytes


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still get there."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(device)[0])


def total_memory() -> int:
    """Bytes of one GPU, or of this machine where there is none."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return int(psutil.virtual_memory().total)


def give_back() -> None:
    """Frees what only cycles of objects still hold, and hands what is free back to the system, where the C library can.

    Left to itself, Python frees such cycles (a sharded model is in one) some time later, in the midst of what is measured.
    """
    gc.collect()
    if sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def in_bytes(nbytes: float) -> str:
    """Bytes as text, in the unit that suits them, such as ``"1.25 GiB"``."""
    unit, size = next((u, s) for u, s in UNITS if nbytes >= s / 10 or s == 1)
    return f"{nbytes / size:.3g} {unit}"


def _reset_mark() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): VmHWM becomes VmRSS
