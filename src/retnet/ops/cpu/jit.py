"""Compiling kernels with numba: the compiler, its intrinsics, and compiled kernels kept on disk."""

from __future__ import annotations

import hashlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

from retnet.ops.cpu.openmp import parallel

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
    if parallel() is None:
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
    found again. Here it is the texts of their files, and the constants that they were made with.
    """
    from numba import types
    from numba.core.ccallback import CFunc

    signature = types.void(types.CPointer(types.int64))
    compiled: Any = CFunc(function, (signature.args, signature.return_type), {}, {})
    key = tuple(_constants(function))
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
    """What a function and all compiled functions that it calls were made of and with."""
    found = [function.__module__, function.__qualname__, _text_of(function.__code__.co_filename)]
    for cell in function.__closure__ or ():
        x = cell.cell_contents
        if isinstance(x, (int, float, str, type)):
            found.append(repr(x))
        elif isinstance(called := getattr(x, "py_func", None), FunctionType):
            found += _constants(called)
    return found


@cache
def _text_of(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
