"""Hugging Face folders, written completely or not at all, and checked before a weight of them is used."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retnet.errors import UserError, told
from retnet.io import flush, require_fetched, sha256, write_text
from retnet.model.checkpoint import verify, weights, write_checkpoint
from retnet.model.checkpoint_layout import MANIFEST
from retnet.model.hf.config import RetNetConfig
from retnet.model.hf.tokenizer import SavedTokenizer, hf_tokenizer
from retnet.model.language_model import LanguageModel
from retnet.model.wrapped import unwrapped

if TYPE_CHECKING:
    from retnet.model.hf.modeling import RetNetForCausalLM
    from retnet.model.hf.pretrained import RetNetPreTrainedModel

PROVENANCE = "provenance.json"
CODE = "retentive_network.py"
_CODE = '''"""Opens this folder with trust_remote_code=True; needs the package: pip install 'retnet[hf]'."""

from retnet.model.hf import RetNetConfig, RetNetForCausalLM, RetNetModel

__all__ = ["RetNetConfig", "RetNetForCausalLM", "RetNetModel"]
'''
_AUTO_MAP = {
    "AutoConfig": "retentive_network.RetNetConfig",
    "AutoModel": "retentive_network.RetNetModel",
    "AutoModelForCausalLM": "retentive_network.RetNetForCausalLM",
}


def write_folder(
    model: RetNetForCausalLM,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | SavedTokenizer | None = None,
    max_shard_size: int | str = "5GB",
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that ``AutoModelForCausalLM.from_pretrained`` opens; stopped at any moment, it leaves none.

    Args:
        model: token ids that its configuration leaves open are set to the tokenizer's.
        path: the folder; it must not exist, or be empty.
        tokenizer: transformers' or ours (`retnet.data.Tokenizer`).
        max_shard_size: of one file of weights: bytes, or such as ``"500MB"``.
        provenance: where the weights came from, as JSON; goes to ``provenance.json``.

    Raises:
        UserError: `path` is taken.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"{path} exists; choose another name, or remove it first")
    staging = path.with_name(f".{path.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)  # left by an interrupted write
    staging.mkdir(parents=True)
    try:
        if tokenizer is not None:
            theirs = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else hf_tokenizer(tokenizer)
            theirs.save_pretrained(staging)
            _take_ids(model, theirs)
        save(model, staging, max_shard_size=max_shard_size)
        if provenance is not None:
            (staging / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
        write_checkpoint(path, {file.name: partial(_move, file) for file in sorted(staging.iterdir())})
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def save(model: RetNetPreTrainedModel, folder: str | Path, *options: Any, **named: Any) -> None:  # noqa: ANN401
    """transformers' own `save_pretrained`, and the code file for ``trust_remote_code``."""
    model.config.auto_map = dict(_AUTO_MAP)
    PreTrainedModel.save_pretrained(model, folder, *options, **named)
    if Path(folder, "config.json").is_file():  # adapters come without
        Path(folder, CODE).write_text(_CODE, encoding="utf-8")


def unseal(folder: Path, variant: str | None) -> None:
    """Removes what would contradict the weights to be written: manifest, provenance, older weights of this variant."""
    for name in (MANIFEST, PROVENANCE):
        (folder / name).unlink(missing_ok=True)
    if variant is None and folder.is_dir():
        for file in folder.iterdir():
            if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", file.name):
                file.unlink()


def seal(folder: Path) -> None:
    """Writes the manifest with the hash of every file of the model; tokenizers may still come and go."""
    names = {"config.json", "generation_config.json", "adapter_config.json", CODE}
    sums = {}
    for file in sorted(folder.iterdir()):
        if file.name in names or re.search(r"\.safetensors(\.index(\..+)?\.json)?$", file.name):
            flush(file)
            sums[file.name] = {"sha256": sha256(file), "bytes": file.stat().st_size}
    write_text(folder / MANIFEST, json.dumps({"files": sums}, indent=2) + "\n")


def check_folder(folder: Path, *, variant: str | None = None, head: bool = True) -> None:
    """Checks a folder before anything of it is used: links, hashes where there is a manifest, names, shapes, numbers.

    Args:
        folder: of a model, or of adapters, whose base is checked if it is a folder.
        variant: of the files of weights, as in `from_pretrained`.
        head: whether the weights of an untied head have to be there.

    Raises:
        UserError: a link or an index leads out of the folder; a file was changed, cut short or is not in the manifest;
            tensors are missing, unknown, misshapen, or hold values that are no numbers (all are listed); or there are
            only pickled weights, which are never opened.
    """
    root = folder.resolve()
    for entry in folder.iterdir():
        if entry.is_symlink() and not _within(entry.resolve(), root):
            raise UserError(
                f"{entry} is a link to {entry.resolve()}, outside the folder; put the file itself there"
            )
    listed = None
    if (folder / MANIFEST).exists():
        try:
            verify(folder)
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"{folder / MANIFEST} is damaged; take another copy of the folder") from None
        listed = _read_json(folder / MANIFEST)["files"]
    if not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if base and Path(base).is_dir():
            check_folder(Path(base), variant=variant, head=head)
        return
    config = _read_config(folder)
    files = _weight_files(folder, variant)
    for name in files:
        if listed is not None and name not in listed:
            raise UserError(f"{folder / name} is not in the manifest, so it was not written with the others")
    _check_weights(folder, config, files, head)


def _check_weights(
    folder: Path, config: RetNetConfig, files: Mapping[str, set[str] | None], head: bool
) -> None:
    found: dict[str, tuple[int, ...]] = {}
    wrong = []
    for file, promised in files.items():
        require_fetched(folder / file)
        with told(f"read {folder / file}"), safe_open(folder / file, "pt") as tensors:
            names = set(tensors.keys())
            wrong += [
                f"{name} is not in {file}, where the index says" for name in (promised or set()) - names
            ]
            for name in names:
                tensor = tensors.get_tensor(name)
                found[name] = tuple(tensor.shape)
                wrong += _not_numbers(name, tensor, quantised=hasattr(config, "quantization_config"))
    if unwrapped(found).keys() != found.keys():
        wrapped = next(name for name in found if unwrapped({name: ()}).keys() != {name})
        raise UserError(
            f"the weights in {folder} were saved from inside a wrapper, by names such as {wrapped}; "
            f"`retnet convert {folder} DEST` writes a folder with their own names"
        )
    if not hasattr(config, "quantization_config"):  # which renames tensors and changes their shapes
        expected = _expected(config, based=not any(name.startswith("model.") for name in found), head=head)
        wrong += [f"{name} is missing" for name in expected.keys() - found.keys()]
        wrong += [f"{name} is not part of the model" for name in found.keys() - expected.keys()]
        wrong += [
            f"{name} has shape {found[name]} instead of {expected[name]}"
            for name in expected.keys() & found.keys()
            if found[name] != expected[name]
        ]
    if wrong:
        raise UserError(f"{folder} does not fit its configuration: {'; '.join(sorted(wrong))}")


def _not_numbers(name: str, tensor: Tensor, quantised: bool) -> list[str]:
    if not tensor.is_floating_point():
        return [] if quantised else [f"{name} has type {tensor.dtype}; allowed: floating types"]
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    bad = int((~torch.isfinite(wide)).sum())
    return [f"{name} has {bad} values that are NaN or infinite"] if bad else []


def _expected(config: RetNetConfig, *, based: bool, head: bool) -> dict[str, tuple[int, ...]]:
    """Name → shape; `based`: names of `RetNetModel`, which has no head and no prefix."""
    with torch.device("meta"):
        own = weights(LanguageModel(config.model_config))
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    lm_head = shapes.pop("head.weight", None)
    named = shapes if based else {f"model.{name}": shape for name, shape in shapes.items()}
    return {**named, "lm_head.weight": lm_head} if lm_head and (head or not based) else named


def _weight_files(folder: Path, variant: str | None) -> dict[str, set[str] | None]:
    """The files that transformers would read, each with the tensors that an index promises in it."""
    middle = f".{variant}" if variant else ""
    single, index = f"model{middle}.safetensors", f"model.safetensors.index{middle}.json"
    if (folder / single).is_file():
        return {single: None}
    if not (folder / index).is_file():
        pickles = sorted(file.name for file in folder.glob("*.bin")) + sorted(
            f.name for f in folder.glob("*.pt")
        )
        if pickles:
            raise UserError(
                f"{folder} has only pickled weights ({', '.join(pickles)}), which are never opened"
            )
        raise UserError(f"{folder} has no {single}")
    found: dict[str, set[str] | None] = {}
    placed = _read_json(folder / index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise UserError(f"{folder / index} has no weight_map from names to files")
    for name, file in placed.items():
        if Path(file).name != file or file == ".." or "\\" in file:
            raise UserError(f"{folder / index} leads out of the folder: {file!r}")
        if not (folder / file).is_file():
            raise UserError(f"{folder / file} is missing; the index names it")
        tensors = found.setdefault(file, set())
        assert tensors is not None
        tensors.add(name)
    return found


def _read_config(folder: Path) -> RetNetConfig:
    kind = _read_json(folder / "config.json").get("model_type")
    if kind != RetNetConfig.model_type:
        raise UserError(f"{folder} holds a model of type {kind!r}, not {RetNetConfig.model_type!r}")
    try:
        return RetNetConfig.from_pretrained(folder)
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object")
    return content


def _within(target: Path, root: Path) -> bool:
    """Also true in the hub's cache, where a snapshot's files are links to ``blobs`` beside it."""
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
    return target.is_relative_to(root) or target.is_relative_to(blobs)


def _move(file: Path, target: Path) -> None:
    file.rename(target)


def _take_ids(model: RetNetForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, model.generation_config):
            if getattr(config, name) is None:
                setattr(config, name, getattr(tokenizer, name))
