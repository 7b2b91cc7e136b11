"""Folders of weights and a ``config.json``: read without trusting a word of them, written in Hugging Face's layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from retnet.convert.torch_files import load_weights
from retnet.convert.weights import TOKENS, Found, Wanted, fit
from retnet.io import sha256
from retnet.model import ModelConfig
from retnet.model.checkpoint import verify
from retnet.model.checkpoint_layout import MANIFEST, Entry, Files, is_sharded, listed
from retnet.model.safetensors_files import save_tensors
from retnet.model.wrapped import unwrapped
from retnet.settings import UserError, build

Arguments = TypeVar("Arguments")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LAYOUTS = ((WEIGHTS, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
SHARD = "5GB"
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

    Args:
        path: the folder.
        weights: False where its weights are not wanted: then it has none, and what a manifest says is believed.

    Raises:
        UserError: there is a manifest, and a file is not what it says.
    """

    def __init__(self, path: Path, *, weights: bool = True) -> None:
        self.path = path
        self.hashes: dict[str, str] = {}
        self._weights = weights
        self._listed: dict[str, Entry] = {}
        if (path / MANIFEST).is_file():
            if weights:
                verify(path)
            self._listed = listed(path)

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

    def arguments(self, kind: type[Arguments], without_effect: set[str]) -> tuple[Arguments, tuple[str, ...]]:
        """``config.json`` as a dataclass, and a note of what is set there that is neither in it nor without effect.

        Raises:
            UserError: a value that the dataclass does not take.
        """
        given = self.json("config.json")
        known = {field.name for field in fields(kind)}  # type: ignore[arg-type]  # a dataclass
        unknown = sorted(key for key in given.keys() - known - without_effect if given[key])
        try:
            found = build(kind, {key: value for key, value in given.items() if key in known})
        except UserError as error:
            raise UserError(f"{self.path / 'config.json'}: {error}") from None
        return found, (f"not known here, so without effect: {', '.join(unknown)}",) if unknown else ()

    def found(
        self,
        kind: str,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        wanted: Mapping[str, Wanted],
        notes: tuple[str, ...] = (),
    ) -> Found:
        """The model, of weights that are made to `fit`, with the tokenizer and the ids of tokens that are here.

        Raises:
            UserError: weights that do not fit.
        """
        given = self.json("config.json")
        weights = self.fitted(tensors, wanted)
        tokenizer, tokens = self.tokenizer(), {key: given.get(key) for key in TOKENS}
        return Found(kind, config, weights, self.hashes, tokenizer, tokens, notes)

    def fitted(self, tensors: Mapping[str, Tensor], wanted: Mapping[str, Wanted]) -> dict[str, Tensor]:
        """What `fit` makes of weights; of none, where none are wanted, none."""
        return fit(tensors, wanted, str(self.path)) if self._weights else {}

    def tokenizer(self) -> dict[str, bytes]:
        """The files of its tokenizer, as they are."""
        return {name: self.read(name) for name in TOKENIZER_FILES if (self.path / name).is_file()}

    def tensors(self, *, pickles: bool = False) -> dict[str, Tensor]:
        """All its weights, if they are wanted, one file or shards with their index; read from the disk when first used.

        Args:
            pickles: where there are no safetensors, read ``pytorch_model.bin`` as data.

        Raises:
            UserError: no weights, two sets of them, or shards that are missing, damaged or at odds with the index.
        """
        self.hashes |= {
            name: entry["sha256"]
            for name, entry in self._listed.items()
            if name == WEIGHTS or name.startswith("shard-")
        }
        if not self._weights:
            return {}
        if self._listed and is_sharded(self.path):  # of a run on several processes
            from retnet.model.sharded import SavedTensors

            return SavedTensors(self.path, "model").whole()
        for whole, index in LAYOUTS if pickles else LAYOUTS[:1]:
            single, sharded = (self.path / whole).exists(), (self.path / index).exists()
            if single and sharded:
                raise UserError(
                    f"{self.path} has both {whole} and {index}; remove the one that does not belong to it"
                )
            if single:
                return unwrapped(self.shard(whole))
            if sharded:
                return unwrapped(self._sharded(index))
        found = sorted(path.name for path in self.path.glob("*") if path.is_file())
        raise UserError(
            f"{self.path} has neither {WEIGHTS} nor {INDEX} (it has: {', '.join(found) or 'nothing'})"
            + ("" if pickles else "; weights in pickles are not read, save them as safetensors first")
        )

    def shard(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file."""
        path = self.file(name)
        self.hashes[name] = self._listed[name]["sha256"] if name in self._listed else sha256(path)
        return load_weights(path)

    def _sharded(self, index: str) -> dict[str, Tensor]:
        places = self.json(index).get("weight_map")
        if not isinstance(places, Mapping) or not all(isinstance(place, str) for place in places.values()):
            raise UserError(
                f"{self.path / index} is damaged: its weight_map does not name a file for every tensor"
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


def folder_files(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Files:
    """``config.json`` and the weights as safetensors, in shards with an index where they are large."""
    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=SHARD)
    files: dict[str, Callable[[Path], None]] = {
        "config.json": partial(_put_json, dict(config), sort_keys=True)
    }
    for file, names in split.filename_to_tensors.items():
        files[file] = partial(_put_tensors, {name: tensors[name] for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        files[INDEX] = partial(_put_json, index)
    return files


def _put_json(value: Mapping[str, Any], path: Path, *, sort_keys: bool = False) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")


def _put_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_tensors(tensors, path, {"format": "pt"})  # which transformers asks for


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
