"""JIT compilation by numba: compiler, intrinsics (prefetch), cache of compiled kernels on disk, and what may fail.

Compiled kernels are optional: whatever goes wrong here (numba missing or broken, another OpenMP than torch's, no writable
cache, a kernel that does not compile) is said once, and torch's own operators do the work.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from enum import EnumType
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from retnet.ops.cpu import numba_private
from retnet.ops.cpu.openmp import parallel

Made = TypeVar("Made")
_log = logging.getLogger("retnet.ops")
_lock = (
    threading.RLock()
)  # one thread compiles; a fork waits, for its child would never see the lock released
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class Compiler(NamedTuple):
    """What kernels are written with; see `compiler`."""

    function: Callable[..., Any]  # decorator: a compiled function
    shared: Callable[..., Any]  # shared(function, n): a function of n int64, compiled once for all kernels
    kernel: Callable[..., Any]  # decorator: a kernel, void(table), whose `.address` goes to `run`
    array: Callable[..., Any]  # array(address, shape, dtype): contiguous memory as an array
    numbers: Callable[..., Any]  # numbers(table, n): the first n numbers of a table, as an array
    real: Callable[..., Any]  # real(number): what `bits` made a number of
    prefetch: Callable[..., None]  # prefetch(address): begins to read the line there into the second cache
    thread: Callable[[], int]  # which thread of the team this is
    threads: Callable[[], int]  # size of the team
    barrier: Callable[[], None]  # waits for all threads of the team


def compiler() -> Compiler | None:
    """The compiler, or None where there is none; why, the log says once."""
    return _compiler()[0]


def hindrance() -> str | None:
    """Why there is no compiler; None if there is one."""
    return _compiler()[1]


@cache
def _compiler() -> tuple[Compiler | None, str | None]:
    """The compiler, or why there is none."""
    made, why, level = None, None, logging.INFO
    try:
        made, why = _make_compiler(), None
    except ImportError as error:
        why = "numba is not installed; pip install 'retnet[fast]' is faster"
        if not isinstance(error, ModuleNotFoundError) or error.name != "numba":
            why, level = f"numba cannot be imported ({_short(error)})", logging.WARNING
    except (Exception, SystemExit) as error:  # a half-installed or mismatched numba raises all kinds
        why, level = f"numba is broken ({_short(error)})", logging.WARNING
    if why is None and parallel() is None:
        made, why = None, "torch does not use GNU OpenMP here, whose threads the kernels run on"
    if why is not None:
        _log.log(level, "kernels for the CPU cannot be compiled, so torch's own operators are used: %s", why)
    return made, why


def _make_compiler() -> Compiler:
    import numba

    numba_private.take_enums_as_places()
    # Errors "as numpy": a division that may raise is one number at a time, with a call for it, and nobody hears it here.
    compiled = numba.njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
    pointer, real, prefetch = _intrinsics()

    def function(written: Callable[..., Any]) -> Any:  # noqa: ANN401
        _name_by_content(written)
        return compiled(written)

    @function
    def array(address: Any, shape: Any, dtype: Any) -> Any:  # noqa: ANN401
        return numba.carray(pointer(address), shape, dtype)

    @function
    def numbers(table: Any, n: int) -> Any:  # noqa: ANN401
        return numba.carray(table, (n,))

    return Compiler(
        function,
        _shared,
        _kernel,
        array,
        numbers,
        real,
        prefetch,
        numba_private.external("omp_get_thread_num", "int32"),
        numba_private.external("omp_get_num_threads", "int32"),
        numba_private.external("GOMP_barrier", "void"),
    )


def optional(make: Callable[..., Made]) -> Callable[..., Made | None]:
    """Decorator of make(compiler, key): its kernels, compiled once for each key; None, said once, where that fails."""
    return _Compiled(make).__getitem__


class _Compiled(dict[Hashable, Made | None]):
    def __init__(self, make: Callable[..., Made]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, key: Hashable) -> Made | None:
        with _lock:
            if key not in self:
                self[key] = _attempt(self.make, key)
        return self[key]


def _attempt(make: Callable[..., Made], key: Hashable) -> Made | None:
    if (found := compiler()) is None:
        return None
    try:
        return make(found, key)
    except Exception as error:  # of numba, LLVM, or this CPU
        name = f"{make.__module__}.{make.__qualname__}"
        _log.warning("%s could not be compiled, so torch's own operators are used: %s", name, _short(error))
        return None


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


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
    """Compiles void(table)."""
    _name_by_content(function)
    return _compiled(function, None)


def _shared(function: Callable[..., None], arguments: int) -> Any:  # noqa: ANN401
    """Compiles void(int64, …) under a name that kernels are linked to: copies would take as long to compile again."""
    name = f"retnet_{_name_by_content(function)}"
    return numba_private.named(name, _compiled(function, arguments), arguments)


def _compiled(function: Callable[..., None], integers: int | None) -> Any:  # noqa: ANN401
    """Compiles a function of a table or of so many int64, or finds it on disk: beside its file or in NUMBA_CACHE_DIR.

    The key for what is on disk is the code and the texts of the files it was made from, and the constants that it was
    made with. Without a place on disk, or with a spoiled one, it is compiled for this process alone.
    """
    try:
        compiled = numba_private.c_function(function, integers)
        numba_private.keep_on_disk(compiled, _constants(function))
        with _uninterrupted():
            compiled.compile()
    except Exception as error:
        why = _short(error)
        compiled = numba_private.c_function(function, integers)
        with _uninterrupted():
            compiled.compile()
        _say_once_not_kept(why)
    return compiled


_not_kept: list[str] = []  # why kernels are not kept on disk; the first is said


def _say_once_not_kept(why: str) -> None:
    _not_kept.append(why)
    if len(_not_kept) == 1:
        _log.warning(
            "compiled kernels are not kept on disk, so every process compiles them again, some seconds (%s); "
            "set NUMBA_CACHE_DIR to a directory that can be written",
            why,
        )


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


def _name_by_content(function: Callable[..., Any]) -> str:
    """Puts a hash of what a function was made of into its name, and so into its symbols in machine code.

    numba's symbols hold the function's name, the types of its arguments and a count of the functions compiled in this
    process. Of two kernels from disk that two processes compiled, functions of one name can differ in constants alone and
    have one count; the linker takes such symbols for the same function, so one kernel would call the other's.
    """
    content = hashlib.sha256(repr(_constants(function)).encode()).hexdigest()[:16]
    function.__qualname__ = f"{function.__qualname__}_{content}"
    return content


def _constants(function: Callable[..., None]) -> list[str]:
    """What a function and all compiled functions that it calls were made of and with."""
    code = function.__code__
    found = [function.__module__, function.__qualname__, _text_of(code.co_filename), _code_of(code)]
    for name in code.co_names:  # constants of other files
        x = function.__globals__.get(name)
        if isinstance(x, EnumType):
            found.append(repr(list(x)))
        elif isinstance(x, (int, float, str, tuple, np.generic)):
            found.append(repr(x))
    for cell in function.__closure__ or ():
        x = cell.cell_contents
        if isinstance(x, (int, float, str, type, tuple, np.generic, list)):
            found.append(repr(x))
        elif isinstance(called := getattr(x, "py_func", getattr(x, "_defn", x)), FunctionType):
            found += _constants(called)  # of a compiled function, of an intrinsic, or what writes one
        elif hasattr(x, "symbol"):  # a shared function, whose name says what it was made of
            found.append(x.symbol)
    return found


def _code_of(code: CodeType) -> str:
    """What runs in this process: its file may say something else by now, when the package was replaced under it."""
    constants = [
        _code_of(x)
        if isinstance(x, CodeType)
        else repr(sorted(map(repr, x)) if isinstance(x, frozenset) else x)
        for x in code.co_consts
    ]
    return repr((code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants))


@cache
def _text_of(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
