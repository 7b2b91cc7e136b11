"""Compiled loops on torch's own threads.

numba compiles; the loops run in a team of the OpenMP runtime that torch has loaded, because two pools of threads on the
same cores slow each other down several times: a pool keeps its threads spinning for milliseconds after its last work.
A kernel is a function of one table of 64-bit numbers, addresses and sizes, so calling it costs a few microseconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGE_PAGES = 256  # at most, for the tensors of one call: half a gigabyte, a second
_COLLAPSE = 25  # MADV_COLLAPSE

_log = logging.getLogger("retnet.ops")


class Compiler(NamedTuple):
    """What kernels are written with; see `compiler`."""

    function: Callable[..., Any]  # decorator: a compiled function
    kernel: Callable[..., Any]  # decorator: a kernel, void(table), whose `.address` goes to `run`
    array: Callable[..., Any]  # array(address, shape, dtype): contiguous memory as an array
    real: Callable[..., Any]  # real(number): what `bits` made a number of
    prefetch: Callable[..., None]  # prefetch(address): begins to read the line there into the second cache
    thread: Callable[[], int]  # which thread of the team this is
    threads: Callable[[], int]  # size of the team
    barrier: Callable[[], None]  # waits for all threads of the team


def run(kernel: Any, numbers: Sequence[int], threads: int | None = None) -> None:  # noqa: ANN401
    """Runs a kernel once; its table holds `numbers`: addresses, sizes, `bits`."""
    launch(kernel, table(numbers), threads)


def table(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """The table of a kernel; whoever keeps it may change single numbers and `launch` again."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


def launch(kernel: Any, table: ctypes.Array[ctypes.c_int64], threads: int | None = None) -> None:  # noqa: ANN401
    """Runs a kernel on `threads` (torch's number) threads."""
    _parallel()(kernel.address, table, threads or torch.get_num_threads(), 0)


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


def plain() -> bool:
    """Whether operators run at once and as they are: nothing traces, transforms or intercepts them."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


@cache
def compiler() -> Compiler | None:
    """The compiler, or None where numba is not installed or torch's threads are not those of GNU OpenMP."""
    try:
        import numba
    except ImportError:
        _log.info(
            "numba is not installed, so torch's own operators are used; pip install 'retnet[fast]' is faster"
        )
        return None
    if _parallel() is None:
        _log.info("torch does not use GNU OpenMP here, so its own operators are used")
        return None
    function = numba.njit(nogil=True, fastmath={"contract", "reassoc", "nsz"})
    pointer, real, prefetch = _intrinsics()

    @function
    def array(address: Any, shape: Any, dtype: Any) -> Any:  # noqa: ANN401
        return numba.carray(pointer(address), shape, dtype)

    external = numba.types.ExternalFunction
    return Compiler(
        function,
        _kernel,
        array,
        real,
        prefetch,
        external("omp_get_thread_num", numba.types.int32()),
        external("omp_get_num_threads", numba.types.int32()),
        external("GOMP_barrier", numba.types.void()),
    )


def _intrinsics() -> tuple[Any, Any, Any]:
    """What numba has no words for: an address as a pointer, a number as the fp64 of the same bits, a prefetch."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    @intrinsic
    def pointer(_: Any, address: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ANN401
            return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

        return types.voidptr(address), generate

    @intrinsic
    def real(_: Any, number: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ANN401
            return builder.bitcast(values[0], ir.DoubleType())

        return types.float64(types.int64), generate

    @intrinsic
    def prefetch(_: Any, address: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ANN401
            place, number = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [place, number, number, number])
            function = builder.module.declare_intrinsic("llvm.prefetch", [place], kind)
            reading, near, data = (ir.Constant(number, x) for x in (0, 2, 1))
            builder.call(function, [builder.inttoptr(values[0], place), reading, near, data])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return pointer, real, prefetch


def _kernel(function: Callable[..., None]) -> Any:  # noqa: ANN401
    """Compiles void(table), or finds it on disk, beside its file or where NUMBA_CACHE_DIR says.

    numba's own key for what is on disk holds random numbers of the functions that a kernel calls, so it would never be
    found again. Here it is the constants that they were made with, and the text of this package.
    """
    from numba import types
    from numba.core.ccallback import CFunc

    signature = types.void(types.CPointer(types.int64))
    compiled: Any = CFunc(function, (signature.args, signature.return_type), {}, {})
    key = (*_constants(function), _text_of_package())
    compiled.enable_caching()
    cache = compiled._cache
    cache._index_key = lambda signature, codegen: (signature, codegen.magic_tuple(), key)
    # A file of its own for each key: processes that compile at once number their files alike, and one got the other's.
    name = f"{cache._impl.filename_base}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"
    file = cache._cache_file
    cache._cache_file = type(file)(file._cache_path, name, file._source_stamp)
    with _uninterrupted():
        compiled.compile()
    return compiled


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the end: LLVM calls Python while it compiles, and exceptions there are lost or fatal."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's, and not Python's everywhere
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)


def _constants(function: Callable[..., None]) -> list[str]:
    """What a function and all compiled functions that it calls were made with."""
    found = [function.__module__, function.__qualname__]
    for cell in function.__closure__ or ():
        x = cell.cell_contents
        if isinstance(x, (int, float, str, type)):
            found.append(repr(x))
        elif isinstance(called := getattr(x, "py_func", None), FunctionType):
            found += _constants(called)
    return found


@cache
def _text_of_package() -> str:
    texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()


@cache
def _parallel() -> Any:  # noqa: ANN401
    """``GOMP_parallel(function, table, threads, flags)`` of the runtime torch has loaded, or None."""
    try:
        function = _libc().GOMP_parallel
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function
