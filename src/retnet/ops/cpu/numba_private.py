"""All private interfaces of numba that the kernels rely on, in one place; `tests/ops/test_private.py` says which one moved.

numba's public ways of compiling have no function of one address with its own cache key, which is what a kernel is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def external(name: str, result: str) -> Any:  # noqa: ANN401
    """A function without arguments of a library that is loaded already; `result` names a type of numba."""
    from numba import types

    return types.ExternalFunction(name, getattr(types, result)())


def c_function(function: Callable[..., None], integers: int | None = None) -> Any:  # noqa: ANN401
    """void(table), or void of so many int64, with C's calling convention.

    It is not compiled yet: `compile()`, then `address` is where it lies.
    """
    from numba import types
    from numba.core.ccallback import CFunc

    arguments = [types.CPointer(types.int64)] if integers is None else [types.int64] * integers
    return CFunc(function, (tuple(arguments), types.void), {}, {})


def named(name: str, compiled: Any, integers: int) -> Any:  # noqa: ANN401
    """A compiled `c_function` of int64 as what other functions call by this name, so that they can be kept on disk."""
    from llvmlite import binding
    from numba import types

    binding.add_symbol(name, compiled.address)
    return types.ExternalFunction(name, types.void(*[types.int64] * integers))


def cgutils() -> ModuleType:
    """numba's helpers for who writes LLVM's code: loops, places on the stack, functions of a module."""
    from numba.core import cgutils

    return cgutils


def has_feature(name: str) -> bool:
    """Whether numba compiles for a CPU with this feature, by LLVM's name; NUMBA_CPU_FEATURES can say it has not."""
    from numba.core.registry import cpu_target

    features: str = cpu_target.target_context.codegen().magic_tuple()[2]
    return f"+{name}" in features.split(",")


def take_enums_as_places() -> None:
    """Lets members of an IntEnum be places of arrays: numba 0.68 knows them, 0.65, which vLLM wants, does not."""
    import operator

    import numba
    from numba import types
    from numba.extending import overload

    if tuple(int(part) for part in numba.__version__.split(".")[:2]) >= (0, 68):
        return

    @overload(operator.getitem)
    def at(table: Any, place: Any) -> Any:  # noqa: ANN401
        def member(table: Any, place: Any) -> Any:  # noqa: ANN401
            return table[place.value]

        fits = isinstance(table, types.Array) and isinstance(place, types.IntEnumMember)
        return member if fits else None


def keep_on_disk(compiled: Any, key: Sequence[str]) -> None:  # noqa: ANN401
    """Has `compile()` look for the machine code on disk first, and put it there: in NUMBA_CACHE_DIR or beside the source.

    numba's own key for what is on disk holds random numbers of the functions that a kernel calls, so it would never be
    found again. Here it is `key`. Each key must have a name of its own, for the file's name is the function's: processes
    that compile at once number the files of one name alike, and one would get the other's.

    Raises:
        RuntimeError: no directory that can be written.
    """
    compiled.enable_caching()
    compiled._cache._index_key = lambda signature, codegen: (signature, codegen.magic_tuple(), tuple(key))
