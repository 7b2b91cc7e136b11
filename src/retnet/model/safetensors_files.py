"""Safetensors files: named tensors, written while other threads go on, and read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from retnet.errors import told
from retnet.io import require_fetched

_OF_SYSTEM = re.compile(r"\(os error (\d+)\)")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Name → tensor, as safetensors. The interpreter lock is free meanwhile: other threads compute.

    Args:
        tensors: by name.
        path: of the file, a new one as a rule.
        about: what its header says beside them.

    Raises:
        OSError: it cannot be written.
    """
    path.touch()  # as readable as other files here; the library's own are for nobody but their owner
    mode = path.stat().st_mode
    try:
        save_file(
            {name: x.detach().contiguous() for name, x in tensors.items()}, path, dict(about or {}) or None
        )
    except SafetensorError as error:
        if found := _OF_SYSTEM.search(str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number)) from error
        raise
    path.chmod(mode)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Name → tensor of one safetensors file, mapped, not copied, into memory.

    Raises:
        UserError: it cannot be read, or is cut short.
    """
    require_fetched(path)
    with told(f"read {path}"):
        return load_file(path)
