"""Retentive Networks: retention in three forms, models built on it, and the tools to train and run them.

The names below are imported when first used, so that `import retnet` and `retnet --help` cost nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retnet.model import LanguageModel, ModelConfig
    from retnet.model.hf import RetNetForCausalLM

__version__ = "0.1.0"
__all__ = ["LanguageModel", "ModelConfig", "RetNetForCausalLM", "__version__"]

_HOME = {
    "LanguageModel": "retnet.model",
    "ModelConfig": "retnet.model",
    "RetNetForCausalLM": "retnet.model.hf",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562 hands out any attribute)
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'retnet' has no attribute {name!r}")
