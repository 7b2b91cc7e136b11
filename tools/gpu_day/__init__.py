"""Everything that has to be learned from a GPU, in one command: `python -m tools.gpu_day` (docs/gpu.md)."""

import sys
from pathlib import Path

_SOURCES = str(Path(__file__).parents[2] / "src")
if _SOURCES not in sys.path:  # a day is measured on the checkout that it belongs to, installed or not
    sys.path.insert(0, _SOURCES)
