"""Names of weights as wrappers save them: `module.` of DistributedDataParallel, `_orig_mod.` of torch.compile, FSDP's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from retnet.settings import UserError

T = TypeVar("T")
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped(state: Mapping[str, T]) -> dict[str, T]:
    """A state dict by the names of the model inside its wrappers, wherever in the model these are.

    Raises:
        UserError: a weight is there twice, with and without a wrapper.
    """
    found: dict[str, T] = {}
    for name, value in state.items():
        plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if plain in found:
            raise UserError(
                f"the weights have {plain} twice, with and without a wrapper's prefix such as 'module.'"
            )
        found[plain] = value
    return found
