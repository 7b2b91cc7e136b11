"""Dispatch of ops to backends: one table, op × backend → the function that runs it, or why it cannot run here.

Every op declares its row, an `Op`, beside its public function; `TABLE` holds them all. Nowhere else in the package is a
backend chosen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

BACKENDS = ("reference", "torch", "numba", "triton", "auto")
FORMER = {
    "cpu": "backend 'cpu' is now 'torch' (torch's operators) or 'numba' (compiled kernels); "
    "'auto' takes the fastest that can run"
}
TABLE: dict[str, Op] = {}

_log = logging.getLogger("retnet.ops")


class Implementation(NamedTuple):
    """One cell of the table. All three functions take the arguments of the op's row.

    Attributes:
        run: computes the op.
        unfit: why it cannot run with these arguments on this machine; None if it can. By default it always can.
        slow: why ``"auto"`` passes it over though it can run; None if it does not. By default it never does.
        auto_on: the one type of device on which ``"auto"`` takes it; None: on any.
        differentiable: if not, ``"auto"`` passes it over while autograd records.
    """

    run: Callable[..., Any]
    unfit: Callable[..., str | None] | None = None
    slow: Callable[..., str | None] | None = None
    auto_on: str | None = None
    differentiable: bool = True


ABSENT = Implementation(lambda *_: None, lambda *_: "its row of the table has no such cell")


class Op:
    """A row of the table: an op and its implementations, the fastest first."""

    def __init__(self, name: str, **implementations: Implementation) -> None:
        self.name, self.implementations = name, implementations
        TABLE[name] = self

    def choose(self, backend: str, *arguments: Any) -> Callable[..., Any]:  # noqa: ANN401
        """The function that is to run these arguments, of a backend, or by ``"auto"``, whose choice is logged once.

        Raises:
            ValueError: `backend` is unknown, or cannot run them here.
        """
        if backend != "auto":
            return self._named(backend, *arguments)
        device, passed = arguments[0].device.type, ""
        for name, (run, unfit, slow, auto_on, differentiable) in self.implementations.items():
            why = f"tensors on {device}" if auto_on and auto_on != device else None
            if why is None and not differentiable and torch.is_grad_enabled():
                why = "a gradient may be wanted"
            if why is None and slow is not None:
                why = slow(*arguments)
            if why is None and unfit is not None:
                why = unfit(*arguments)
            if why is None:
                if not torch.compiler.is_compiling():
                    _say_once(self.name, name, passed or f"tensors on {device}")
                return run
            passed = f"{passed}; {name}: {why}" if passed else f"{name}: {why}"
        raise ValueError(f"no backend can run {self.name}: {passed}")

    def _named(self, backend: str, *arguments: Any) -> Callable[..., Any]:  # noqa: ANN401
        check_backend(backend)
        implementation = self.implementations.get(backend, ABSENT)
        if implementation.unfit and (why := implementation.unfit(*arguments)) is not None:
            raise ValueError(
                f"backend {backend!r} cannot run {self.name}: {why}; or use backend 'auto' or 'reference'"
            )
        return implementation.run


def check_backend(backend: str) -> None:
    """Whether there is a backend of this name.

    Raises:
        ValueError: there is none, or no longer.
    """
    if backend in FORMER:
        raise ValueError(FORMER[backend])
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(map(repr, BACKENDS))}")


@cache
def _say_once(op: str, backend: str, why: str) -> None:
    _log.info("%s: backend 'auto' is %r (%s)", op, backend, why)
