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


def _require_main_interpreter() -> None:
    """Refuses a second interpreter of the process.

    Raises:
        ImportError: this is one; importing torch would wait there for ever.
    """
    for name in ("_interpreters", "_xxsubinterpreters"):  # of Python 3.13, and before
        try:
            known: Any = import_module(name)
        except ImportError:
            continue
        if known.get_current() != known.get_main():
            raise ImportError(
                "retnet cannot be used in a second interpreter of a process, where importing torch hangs; use threads or "
                "processes (mod_wsgi: WSGIApplicationGroup %{GLOBAL})"
            )
        return


_require_main_interpreter()


def __getattr__(name: str) -> Any:  # noqa: ANN401  (PEP 562 hands out any attribute)
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'retnet' has no attribute {name!r}")
