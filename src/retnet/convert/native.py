"""Native formats: this library's runs and its Hugging Face folders, read and written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from retnet.convert.folders import Folder
from retnet.convert.weights import Found, Wanted, expected, same
from retnet.model import ModelConfig
from retnet.model.checkpoint import model_files, write_checkpoint
from retnet.model.checkpoint_layout import Files
from retnet.model.runs import find_checkpoint
from retnet.model.text_ends import end_ids
from retnet.settings import UserError, load

if TYPE_CHECKING:
    from retnet.model.hf.tokenizer import SavedTokenizer

TOKENIZER = "tokenizer.json"


class RunTokenizer:
    """The tokenizer of a run: its file, which says what starts a text."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        plan = json.loads(data)
        (start,) = plan["post_processor"]["special_tokens"].values()
        self.bos_id: int = start["ids"][0]
        self.end_ids = end_ids(plan, self.bos_id)

    def save(self, path: str | Path) -> None:
        """Writes the file."""
        Path(path).write_bytes(self.data)


def special_ids(tokenizer: SavedTokenizer) -> dict[str, int | list[int]]:
    """The ids that begin, end and fill texts, as the configurations of Hugging Face's models name them."""
    bos, ends = tokenizer.bos_id, list(tokenizer.end_ids)
    return {"bos_token_id": bos, "eos_token_id": ends if len(ends) > 1 else bos, "pad_token_id": bos}


def read_run(path: Path, *, weights: bool = True) -> Found:
    """The model of a checkpoint directory, or of the best (else last) one of a run; weights: whether with them.

    Raises:
        UserError: no such checkpoint, or it is damaged.
    """
    where, _ = find_checkpoint(path)
    folder = Folder(where, weights=weights)
    folder.read("model.toml")
    config = load(ModelConfig, where / "model.toml")
    wanted = {name: Wanted(name, shape) for name, shape in expected(config).items()}
    tokenizer = {TOKENIZER: folder.read(TOKENIZER)} if (where / TOKENIZER).is_file() else {}
    tokens: dict[str, int | list[int]] = {}
    if tokenizer:
        try:
            tokens = special_ids(RunTokenizer(tokenizer[TOKENIZER]))
        except (ValueError, KeyError, TypeError, IndexError):
            raise UserError(
                f"{where / TOKENIZER} was not written by this library; give another with --tokenizer"
            ) from None
    tensors = folder.fitted(folder.tensors(), wanted)
    return Found("run", config, tensors, folder.hashes, tokenizer=tokenizer, tokens=tokens)


def run_files(found: Found, tokenizer: SavedTokenizer | None) -> Files:
    """A checkpoint directory, which `retnet generate` opens if it has a tokenizer."""
    files = dict(model_files(found.model()))
    if tokenizer is not None:
        files[TOKENIZER] = tokenizer.save
    elif TOKENIZER in found.tokenizer:
        files[TOKENIZER] = partial(_put, found.tokenizer[TOKENIZER])
    return files


def read_hf(path: Path, *, weights: bool = True) -> Found:
    """The model of a folder that `RetNetForCausalLM.save_pretrained` wrote; weights: whether with them.

    Raises:
        UserError: weights that are quantised, or do not fit the configuration.
    """
    _need_transformers()
    from retnet.model.hf import RetNetConfig

    folder = Folder(path, weights=weights)
    given = folder.json("config.json")
    if given.get("quantization_config"):
        raise UserError(f"{path} holds quantised weights; convert the model they were made from")
    try:
        config = RetNetConfig.from_dict(given).model_config
    except ValueError as error:
        raise UserError(f"{path / 'config.json'}: {error}") from None
    tensors = folder.tensors()
    if config.tie_embeddings:
        same(tensors, "lm_head.weight", "model.embedding.weight", str(path))
    wanted = {
        "lm_head.weight" if name == "head.weight" else f"model.{name}": Wanted(name, shape)
        for name, shape in expected(config).items()
    }
    return folder.found("hf", config, tensors, wanted)


def write_hf(found: Found, path: Path, extra: Files) -> None:
    """A folder that `AutoModelForCausalLM.from_pretrained` opens, with these files beside those of the model."""
    _need_transformers()
    from retnet.model.hf import RetNetForCausalLM
    from retnet.model.hf.folder import save

    model = RetNetForCausalLM.from_language_model(
        found.model(), use_cache=found.config.has_states, **found.tokens
    )
    staging = path.with_name(f".{path.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)  # left by an interrupted write
    try:
        staging.mkdir(parents=True)
        save(model, staging)
        moved = {file.name: partial(_move, file) for file in sorted(staging.iterdir())}
        write_checkpoint(path, {**moved, **extra})
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def hf_tokenizer_files(tokenizer: SavedTokenizer, scratch: Path) -> Mapping[str, bytes]:
    """The files of a tokenizer of ours for transformers, made in an empty directory."""
    _need_transformers()
    from retnet.model.hf import hf_tokenizer

    hf_tokenizer(tokenizer).save_pretrained(scratch)
    return {file.name: file.read_bytes() for file in sorted(scratch.iterdir())}


def _need_transformers() -> None:
    if find_spec("transformers") is None:
        raise UserError("Hugging Face folders need transformers: pip install 'retnet[hf]'")


def _move(source: Path, path: Path) -> None:
    source.rename(path)


def _put(data: bytes, path: Path) -> None:
    path.write_bytes(data)
