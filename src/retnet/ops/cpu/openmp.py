"""OpenMP launch of compiled kernels on torch's own threads (GOMP_parallel), and large pages (2 MB) for what they read.

Two pools of threads on the same cores slow each other down several times: a pool keeps its threads spinning for
milliseconds after its last work. So kernels run in a team of the OpenMP runtime that torch has loaded. A kernel is a
function of one table of 64-bit numbers, addresses and sizes, so calling it costs a few microseconds.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from retnet.ops.torch_private import plain as plain

LARGE_PAGES = 256  # at most, for the tensors of one call: half a gigabyte, a second
_DONTNEED, _HUGEPAGE, _COLLAPSE = 4, 14, 25  # of madvise(2)


def run(kernel: Any, numbers: Sequence[int], threads: int | None = None) -> None:  # noqa: ANN401
    """Runs a kernel once; its table holds `numbers`: addresses, sizes, `bits`."""
    launch(kernel, (ctypes.c_int64 * len(numbers))(*numbers), threads)


def table(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """The table of a kernel; whoever keeps it may change single numbers and `launch` again."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


def launch(kernel: Any, table: ctypes.Array[ctypes.c_int64], threads: int | None = None) -> None:  # noqa: ANN401
    """Runs a kernel on `threads` (torch's number) threads."""
    parallel()(kernel.address, table, 1 if _forked else threads or torch.get_num_threads(), 0)


_forked = False  # whether this process is the child of a fork: it has none of the team's threads, and would wait for them


def _notice_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_notice_fork)


def bits(x: float) -> int:
    """An fp64 number as the 64-bit number that lies in the same memory."""
    return int(_WHOLE.unpack(_REAL.pack(x))[0])


_REAL, _WHOLE = struct.Struct("=d"), struct.Struct("=q")


def in_large_pages(tensors: Iterable[Tensor | None]) -> None:
    """Has the system move the memory of tensors to pages of 2 MB, where it can (Linux 6.1 and later); addresses stay.

    At the end of a page reading ahead stops, and the next address has to be translated: from large pages weights were read
    a sixth to a fifth faster. It takes 5 ms a page, once, so what goes beyond `LARGE_PAGES` stays where it is.
    """
    if not sys.platform.startswith("linux"):
        return
    pages: dict[int, None] = {}  # in the order of the tensors
    for x in tensors:
        if x is not None and x.nbytes:
            pages.update(dict.fromkeys(range(x.data_ptr() >> 21, (x.data_ptr() + x.nbytes - 1 >> 21) + 1)))
    for page in islice(pages, LARGE_PAGES):
        _libc().madvise(
            ctypes.c_void_p(page << 21), ctypes.c_size_t(1 << 21), _COLLAPSE
        )  # a refusal changes nothing


def zeros_in_large_pages(tensors: Iterable[Tensor]) -> None:
    """Has the system hold tensors of zeros that nobody has written yet in pages of 2 MB, where it can (Linux).

    Their memory is given back, so it comes, zeroed, when it is touched, and no sooner; addresses stay.
    """
    if not sys.platform.startswith("linux"):
        return
    for x in tensors:
        begin, end = x.data_ptr() + (1 << 21) - 1 >> 21, x.data_ptr() + x.nbytes >> 21  # whole pages
        for advice in (_DONTNEED, _HUGEPAGE) if begin < end else ():
            _libc().madvise(ctypes.c_void_p(begin << 21), ctypes.c_size_t(end - begin << 21), advice)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def readable(
    tensors: Sequence[Tensor | None], dtype: torch.dtype, sizes: Sequence[int] | None = None
) -> bool:
    """Whether a kernel may read so many numbers of this type at the addresses of these tensors; None is never read."""
    for i, x in enumerate(tensors):
        if x is not None and not (
            x.dtype is dtype and x.is_cpu and x.is_contiguous() and (sizes is None or x.numel() == sizes[i])
        ):
            return False
    return True


@cache
def parallel() -> Any:  # noqa: ANN401
    """``GOMP_parallel(function, table, threads, flags)`` of the runtime torch has loaded, or None."""
    try:
        function = _libc().GOMP_parallel
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function
