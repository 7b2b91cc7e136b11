"""`retnet.engine` under its old name, for one release."""

import sys
import warnings

from retnet.engine import *  # noqa: F403  all of it
from retnet.engine import __all__ as __all__
from retnet.engine import load, sampling, stops

warnings.warn("retnet.infer is now retnet.engine; change the import", FutureWarning, stacklevel=2)

sys.modules |= {
    f"{__name__}.{name}": module for name, module in (("run", load), ("sampling", sampling), ("stops", stops))
}


def __getattr__(name: str) -> None:
    if name in ("Decoding", "Piece"):
        raise ImportError(
            f"{__name__}.{name} is gone: retnet.engine.Engine hands out events as texts grow, see docs/generation.md"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
