"""Compiled loops on torch's own threads.

numba compiles; the loops run in a team of the OpenMP runtime that torch has loaded, because two pools of threads on the
same cores slow each other down several times: a pool keeps its threads spinning for milliseconds after its last work.
A kernel is a function of one table of 64-bit numbers, addresses and sizes, so calling it costs a few microseconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_log = logging.getLogger("retnet.ops")


class Compiler(NamedTuple):
    """What kernels are written with; see `compiler`."""

    function: Callable[..., Any]  # decorator: a compiled function
    kernel: Callable[..., Any]  # decorator: a kernel, void(table), whose `.address` goes to `run`
    array: Callable[..., Any]  # array(address, shape, dtype): contiguous memory as an array
    thread: Callable[[], int]  # which thread of the team this is
    threads: Callable[[], int]  # size of the team
    barrier: Callable[[], None]  # waits for all threads of the team


def run(
    kernel: Any,  # noqa: ANN401
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    reals: Sequence[float] = (),
    threads: int | None = None,
) -> None:
    """Runs a kernel on `threads` (torch's number) threads.

    Its table holds the addresses of `tensors`, then `numbers`, then the address of `reals`, as fp64.
    """
    floats = (ctypes.c_double * len(reals))(*reals)
    numbers = (*[x.data_ptr() for x in tensors], *numbers, ctypes.addressof(floats))
    _parallel()(
        kernel.address, (ctypes.c_int64 * len(numbers))(*numbers), threads or torch.get_num_threads(), 0
    )


@cache
def compiler() -> Compiler | None:
    """The compiler, or None where numba is not installed or torch's threads are not those of GNU OpenMP."""
    try:
        import numba
        from numba.extending import intrinsic
    except ImportError:
        _log.info(
            "numba is not installed, so torch's own operators are used; pip install 'retnet[fast]' is faster"
        )
        return None
    if _parallel() is None:
        _log.info("torch does not use GNU OpenMP here, so its own operators are used")
        return None

    @intrinsic
    def pointer(_: Any, address: Any) -> Any:  # noqa: ANN401
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ANN401
            return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

        return numba.types.voidptr(address), generate

    function = numba.njit(nogil=True, fastmath={"contract", "reassoc", "nsz"})

    @function
    def array(address: Any, shape: Any, dtype: Any) -> Any:  # noqa: ANN401
        return numba.carray(pointer(address), shape, dtype)

    external = numba.types.ExternalFunction
    return Compiler(
        function,
        _kernel,
        array,
        external("omp_get_thread_num", numba.types.int32()),
        external("omp_get_num_threads", numba.types.int32()),
        external("GOMP_barrier", numba.types.void()),
    )


def _kernel(function: Callable[..., None]) -> Any:  # noqa: ANN401
    """Compiles void(table), or finds it on disk, beside its file or where NUMBA_CACHE_DIR says.

    numba's own key for what is on disk holds random numbers of the functions that a kernel calls, so it would never be
    found again. Here it is the constants that a kernel was made with, and the text of this package.
    """
    from numba import types
    from numba.core.ccallback import CFunc

    signature = types.void(types.CPointer(types.int64))
    compiled: Any = CFunc(function, (signature.args, signature.return_type), {}, {})
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    constants = [repr(x) for x in cells if isinstance(x, (int, float, str, type))]
    key = (function.__module__, function.__qualname__, *constants, _text_of_package())
    compiled.enable_caching()
    compiled._cache._index_key = lambda signature, codegen: (signature, codegen.magic_tuple(), key)
    compiled.compile()
    return compiled


@cache
def _text_of_package() -> str:
    texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()


@cache
def _parallel() -> Any:  # noqa: ANN401
    """``GOMP_parallel(function, table, threads, flags)`` of the runtime torch has loaded, or None."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function
