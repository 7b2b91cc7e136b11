"""How checkpoint directories are laid out: kinds of tensors, whole or in parts, and what the manifest says of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypedDict

from torch import Tensor

from retnet.io import sha256

MANIFEST = "manifest.json"
# of tensors; training: of a run that saves an average as its model
KINDS = ("model", "training", "optimizer")
# name → function that writes the file at the path it is given
Files = Mapping[str, Callable[[Path], None]]


class Entry(TypedDict):
    """What a manifest says of a file."""

    sha256: str
    bytes: int


class TensorPart(NamedTuple):
    """What a process holds of a tensor: a box of it."""

    tensor: Tensor
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]  # in it, of the first number held


def entry(file: Path) -> Entry:
    """What a manifest is to say of a file."""
    return {"sha256": sha256(file), "bytes": file.stat().st_size}


def is_sharded(path: Path) -> bool:
    """Whether several processes wrote a checkpoint."""
    return any(path.glob("shard-*.safetensors"))
