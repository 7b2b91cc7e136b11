"""How checkpoint directories are laid out: kinds of tensors, whole or in parts, and what the manifest says of a file."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypedDict

from torch import Tensor

from retnet.errors import UserError, told
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

    def of(self, whole: Tensor) -> Tensor:
        """The same box of another tensor of that shape, sharing its memory."""
        box = zip(self.offset, self.tensor.shape, strict=True)
        return whole[tuple(slice(begin, begin + size) for begin, size in box)]


def entry(file: Path) -> Entry:
    """What a manifest is to say of a file."""
    return {"sha256": sha256(file), "bytes": file.stat().st_size}


def listed(path: Path) -> dict[str, Entry]:
    """The files of a verified checkpoint: those that its manifest names. What else lies there nobody has verified.

    Raises:
        UserError: there is no manifest any more.
    """
    with told(f"read {path / MANIFEST}", "take another checkpoint"):
        files: dict[str, Entry] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        return files


def is_sharded(path: Path) -> bool:
    """Whether several processes wrote a verified checkpoint."""
    return any(name.startswith("shard-") for name in listed(path))


def part_file(rank: int, kind: str) -> str:
    """The name of the file in which a process has its parts of the tensors of one of `KINDS`: that of DCP."""
    return f"shard-{rank + 1:05d}-model-{KINDS.index(kind) + 1:05d}-of-{len(KINDS):05d}.safetensors"


def tensor_files(path: Path, kind: str) -> list[Path]:
    """The files of one of `KINDS` in a verified checkpoint: one with whole tensors, or those of each process.

    Raises:
        UserError: it has no such file.
    """
    names, whole = listed(path), f"{kind}.safetensors"
    if is_sharded(path):
        parts = f"shard-*-model-{KINDS.index(kind) + 1:05d}-of-*.safetensors"
        return [path / name for name in sorted(fnmatch.filter(names, parts))]
    if whole not in names:
        raise UserError(f"{path} has no {whole} in its manifest; take another checkpoint")
    return [path / whole]
