"""Folders of safetensors: read without trusting a word of them, written complete or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from retnet.errors import told
from retnet.io import require_fetched, sha256
from retnet.model.checkpoint import MANIFEST, verify
from retnet.model.wrapped import unwrapped
from retnet.settings import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONVERSION = "conversion.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What Hugging Face tokenizers are kept in."""


class Folder:
    """One model folder. Every file is looked up through `file`, which leads nowhere else, and its hash is kept.

    Raises:
        UserError: there is a manifest, and a file is not what it says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hashes: dict[str, str] = {}
        self._verified: dict[str, Any] = {}
        if (path / MANIFEST).is_file():
            verify(path)
            self._verified = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]

    def file(self, name: str) -> Path:
        """The path of a file of this folder.

        Raises:
            UserError: the name is a path, there is no such file, or it is a link that leads out of the folder.
        """
        path = self.path / name
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{self.path} refers to {name!r}, which is not the name of a file in this folder")
        if not path.is_file():
            raise UserError(f"{self.path} has no {name}")
        home, target = self.path.resolve(), path.resolve()
        # The cache of the Hugging Face hub keeps files in MODEL/blobs and links to them from MODEL/snapshots/COMMIT.
        homes = {home, home.parent.parent / "blobs"} if home.parent.name == "snapshots" else {home}
        if target.parent not in homes:
            raise UserError(
                f"{path} is a link that leads out of its folder, to {target}; put the file itself there"
            )
        return path

    def read(self, name: str) -> bytes:
        """The content of a small file."""
        data = self.file(name).read_bytes()
        self.hashes[name] = hashlib.sha256(data).hexdigest()
        return data

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file."""
        return as_object(self.read(name), self.path / name)

    def tokenizer(self) -> dict[str, bytes]:
        """The files of its tokenizer, as they are."""
        return {name: self.read(name) for name in TOKENIZER_FILES if (self.path / name).is_file()}

    def tensors(self) -> dict[str, Tensor]:
        """All its weights, one file or shards with their index; read from the disk when first used.

        Raises:
            UserError: no weights, two sets of them, or shards that are missing, damaged or at odds with the index.
        """
        single, index = (self.path / WEIGHTS).exists(), (self.path / INDEX).exists()
        if single and index:
            raise UserError(
                f"{self.path} has both {WEIGHTS} and {INDEX}; remove the one that does not belong to it"
            )
        if single:
            return unwrapped(self.shard(WEIGHTS))
        if not index:
            found = sorted(path.name for path in self.path.glob("*") if path.is_file())
            raise UserError(
                f"{self.path} has neither {WEIGHTS} nor {INDEX} (it has: {', '.join(found) or 'nothing'}); "
                "weights in pickles are not read, save them as safetensors first"
            )
        return unwrapped(self._sharded(self.json(INDEX).get("weight_map")))

    def shard(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file."""
        path = self.file(name)
        self.hashes[name] = self._verified[name]["sha256"] if name in self._verified else sha256(path)
        return load_safetensors(path)

    def _sharded(self, places: object) -> dict[str, Tensor]:
        if not isinstance(places, Mapping) or not all(isinstance(place, str) for place in places.values()):
            raise UserError(
                f"{self.path / INDEX} is damaged: its weight_map does not name a file for every tensor"
            )
        wrong: list[str] = []
        tensors: dict[str, Tensor] = {}
        for name in sorted(set(places.values())):
            try:
                shard = self.shard(name)
            except UserError as error:
                wrong.append(str(error))
                continue
            wrong += [
                f"{key} is in {name}, but not there by the index" for key in shard if places.get(key) != name
            ]
            wrong += [
                f"{key} is not in {name}, where the index has it"
                for key, place in places.items()
                if place == name and key not in shard
            ]
            wrong += [f"{key} is in two shards" for key in shard if key in tensors]
            tensors.update(shard)
        if wrong:
            raise UserError(f"the shards of {self.path} are not in order: {'; '.join(wrong)}")
        return tensors


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Name → tensor of one file, mapped, not copied, into memory.

    Raises:
        UserError: it cannot be read, or is cut short.
    """
    require_fetched(path)
    with told(f"read {path}"), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)


def as_object(data: bytes, where: Path) -> dict[str, Any]:
    """The object that JSON text describes.

    Raises:
        UserError: it is not JSON, or no object.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"it has {word}")  # NaN and infinities, which are not JSON

    try:
        value = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} holds {type(value).__name__}, not a JSON object")
    return value


def destination(dest: str | Path, source: Path, *, force: bool) -> Path:
    """The folder to write, which is new, empty, or a model that may be replaced.

    Raises:
        UserError: something else is there, or the source is.
    """
    path, source = Path(dest).resolve(), source.resolve()
    if path == source or path in source.parents:
        raise UserError(f"DEST {dest} holds SOURCE {source}; choose another folder")
    if path.exists() and not path.is_dir():
        raise UserError(f"DEST {dest} is a file; choose a folder")
    if not path.exists() or not any(path.iterdir()):
        return path
    if not force:
        raise UserError(
            f"DEST {dest} exists and is not empty; choose another folder, or --force to replace it"
        )
    if not any((path / name).is_file() for name in (MANIFEST, "config.json")):
        raise UserError(
            f"DEST {dest} holds no model (no {MANIFEST}, no config.json); remove it yourself if it may go"
        )
    return path
