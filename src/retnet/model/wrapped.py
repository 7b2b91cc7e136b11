"""Names of weights as wrappers save them: `module.` of DistributedDataParallel, `_orig_mod.` of torch.compile, FSDP's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from retnet.settings import UserError

T = TypeVar("T")
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class ReadsWrapped:
    """Before `torch.nn.Module` among the bases of a model: it reads weights saved from inside a wrapper."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:  # noqa: ANN401
        """As torch's; weights saved from inside a wrapper (``module.``, ``_orig_mod.``) are known by their own names."""
        plain = unwrapped(state_dict)
        given = state_dict if plain.keys() == state_dict.keys() else plain
        return super().load_state_dict(given, strict, assign)  # type: ignore[misc]  # the module's


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
