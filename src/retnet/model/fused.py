"""Plans of compiled steps, kept while the modules they were made from are the same."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import nn

from retnet.ops import Plan

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Fused:
    """The plan of a module's compiled step, which reads the weights of layers instead of calling them.

    So at every step it is asked whether the layers are still the same, and whether anybody would miss their calls. It is
    neither copied nor saved with its module.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def plan(self, module: nn.Module, make: Callable[[], Plan | None]) -> Plan | None:
        """What `make` gives for the module as it is now; None where its layers have to be called.

        That is so in training, where a gradient is wanted, in a graph that is traced, and where a layer inside has a hook
        or a `forward` of its own, as offloading gives it one.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or module.training:
            return None
        kept = self._kept
        if kept is None or not kept.holds():
            kept = self._kept = _Kept(module, make)
        return kept.plan

    def __reduce__(self) -> tuple[type[Fused], tuple[()]]:
        return Fused, ()


class _Kept:
    """A plan, and what its module was made of.

    The weights have emptied the caches when this is looked at, so it looks at as few places as it can.
    """

    def __init__(self, module: nn.Module, make: Callable[[], Plan | None]) -> None:
        inside = [m for m in module.modules() if m is not module]
        parts: list[tuple[dict[str, Any], str, Any]] = []
        for m in (module, *inside):
            for held in (m._modules, m._parameters, m._buffers):
                parts += [(held, name, part) for name, part in held.items() if part is not None]
        parts += [(m.__dict__, "training", m.training) for m in inside if m._modules or type(m) is nn.Dropout]
        self._holders, self._names, self._parts = (list(column) for column in zip(*parts, strict=True))
        self._dicts = [m.__dict__ for m in (module, *inside)]  # they grow with a `forward` of a layer's own
        self._sizes = list(map(len, self._dicts))
        self._hooks = [m.__dict__[name] for m in inside for name in _HOOKS]
        self._hooked = any(self._hooks)
        called = self._hooked or any(m.training or "forward" in m.__dict__ for m in inside)
        self.plan = None if called else make()

    def holds(self) -> bool:
        """Whether a plan made now would be the same one."""
        return (
            all(map(is_, map(dict.get, self._holders, self._names), self._parts))
            and list(map(len, self._dicts)) == self._sizes
            and any(self._hooks) == self._hooked
            and (self.plan is None or not self.plan.moved())
        )
