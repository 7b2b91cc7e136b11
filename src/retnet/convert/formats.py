"""Formats of checkpoints: recognising which one something is in, reading, writing, converting one into another."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retnet import __version__
from retnet.convert import fla, llama, native, syncdoth, torchscale
from retnet.convert.clamp import with_clamp
from retnet.convert.folders import destination
from retnet.convert.torch_files import SUFFIXES
from retnet.convert.weights import Found
from retnet.errors import dangling, told
from retnet.host import choose_dtype
from retnet.model.checkpoint import write_checkpoint
from retnet.model.runs import meant
from retnet.settings import UserError, nearest

if TYPE_CHECKING:
    from retnet.model.hf.tokenizer import SavedTokenizer

READERS = {
    "torchscale": f"a file {', '.join(SUFFIXES)}, or a folder with one and its config.json",
    "fla": "a folder whose config.json has model_type 'retnet' and hidden_size",
    "syncdoth": "a folder whose config.json has model_type 'retnet' and decoder_embed_dim",
    "llama": f"a folder whose config.json has one of the model_types {', '.join(llama.FAMILY)}: a Transformer",
    "hf": "a folder whose config.json has model_type 'retentive_network'",
    "run": "a run (checkpoints/) or one of its checkpoints (manifest.json, model.toml)",
}
WRITERS = {
    "hf": "a Hugging Face folder",
    "fla": "a folder of flash-linear-attention",
    "syncdoth": "a folder of syncdoth/RetNet",
    "run": "a checkpoint of this library",
}
PROVENANCE = "provenance.json"


def folder_of(source: str | Path) -> Path:
    """The run, checkpoint or folder that a path means: a file of one stands for all of it; any other path as it is."""
    path = meant(source)
    return path.parent if path.is_file() and model_type(path.parent) else path


def model_type(folder: Path) -> str:
    """What a Hugging Face folder says it holds; empty where it says nothing."""
    return str(_config(folder).get("model_type") or "")


def recognise(source: str | Path) -> str:
    """The kind of a checkpoint, a key of `READERS`.

    Raises:
        UserError: nothing is there, it is of no kind, or of more than one.
    """
    path = folder_of(source)
    if not path.exists():
        raise UserError(f"there is no {source}{dangling(source)}; give a file or folder on this machine")
    kinds = _kinds(path)
    if len(kinds) == 1:
        return kinds[0]
    looked = "; ".join(f"{kind}: {what}" for kind, what in READERS.items())
    if kinds:
        raise UserError(
            f"{source} looks like {' and '.join(kinds)}; say which with --from. Looked for: {looked}"
        )
    raise UserError(f"{source} is no checkpoint known here. Looked for: {looked}")


def _kinds(path: Path) -> list[str]:
    """Every kind that a file or folder may be of."""
    if path.is_file():
        return ["torchscale"] if path.suffix in SUFFIXES else []
    config = _config(path)
    retnet = config.get("model_type") == "retnet"  # of two libraries, with different keys
    fla, syncdoth = retnet and "hidden_size" in config, retnet and "decoder_embed_dim" in config
    hf, transformer = (
        config.get("model_type") == "retentive_network",
        config.get("model_type") in llama.FAMILY,
    )
    pickles = any(file.suffix in SUFFIXES and file.suffix != ".safetensors" for file in path.iterdir())
    fits = {
        # The folders of the others may have the optimiser's pickles beside their weights.
        "torchscale": not (fla or syncdoth or hf or transformer)
        and ("decoder_embed_dim" in config or pickles),
        "fla": fla,
        "syncdoth": syncdoth,
        "llama": transformer,
        "hf": hf,
        "run": (path / "checkpoints").is_dir() or (path / "model.toml").is_file(),
    }
    return [kind for kind, fit in fits.items() if fit]


def _config(folder: Path) -> dict[str, Any]:
    """What a folder's ``config.json`` says; nothing where it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def read(
    source: str | Path,
    kind: str | None = None,
    *,
    config: str | Path | None = None,
    weights: bool = True,
) -> Found:
    """The model of a checkpoint.

    Args:
        source: a file or folder.
        kind: a key of `READERS`; None recognises it.
        config: a JSON with torchscale's arguments.
        weights: False reads what says which model it is alone, and no hashes are computed or compared; torchscale's
            checkpoints say it by their weights, and are read as always.

    Raises:
        UserError: it cannot be read, is damaged, asks for what this library does not compute, or its tensors do not fit.
    """
    path = folder_of(source)
    if kind is None:
        kind = recognise(path)
    elif kind not in READERS:
        raise UserError(f"unknown kind {kind!r}; {nearest(kind, READERS)}")
    elif not path.exists():
        raise UserError(f"there is no {source}{dangling(source)}; give a file or folder on this machine")
    if config is not None and kind != "torchscale":
        raise UserError(f"--config gives torchscale's arguments, but {source} is of kind {kind!r}")
    if kind == "torchscale":
        return torchscale.read(path, None if config is None else Path(config))
    if path.is_file():
        raise UserError(f"{source} is a file, but kind {kind!r} is {READERS[kind]}")
    if (kinds := _kinds(path)) and kind not in kinds:
        raise UserError(f"{source} looks like {' and '.join(kinds)}, and kind {kind!r} is {READERS[kind]}")
    readers = {
        "fla": fla.read,
        "syncdoth": syncdoth.read,
        "llama": llama.read,
        "hf": native.read_hf,
        "run": native.read_run,
    }
    return readers[kind](path, weights=weights)


def write(
    found: Found,
    dest: str | Path,
    to: str = "hf",
    *,
    source: str | Path,
    tokenizer: SavedTokenizer | None = None,
    force: bool = False,
) -> Path:
    """Writes a model as a folder with the SHA-256 of all its files and of the files it came from; complete or not at all.

    Args:
        found: the model.
        dest: the folder, which is new or empty.
        to: a key of `WRITERS`.
        source: where it was read; `dest` may not hold it, and its name goes to ``provenance.json``.
        tokenizer: a `retnet.data.Tokenizer`; None takes that of the source, if any.
        force: replace a model that is there.

    Returns:
        The folder.

    Raises:
        UserError: `dest` is taken or cannot be written, or the target cannot express the model.
    """
    if to not in WRITERS:
        raise UserError(f"unknown kind {to!r}; {nearest(to, WRITERS)}")
    path = destination(dest, Path(source), force=force)
    where_from = {
        "source": Path(source).resolve().name,
        "kind": found.kind,
        "sha256": dict(found.hashes),
        "notes": list(found.notes),
        "converted_by": f"retnet {__version__}",
    }
    extra = {PROVENANCE: partial(_put, json.dumps(where_from, indent=2).encode() + b"\n")}
    if tokenizer is not None:
        known = {key: x for key, x in found.tokens.items() if x is not None}
        found = replace(found, tokens={**native.special_ids(tokenizer), **known})
    whole = "what was there before is as it was" if path.exists() else "nothing is left there"
    with told(f"write {dest}", whole):
        path.parent.mkdir(parents=True, exist_ok=True)
        if to == "run":
            write_checkpoint(path, {**native.run_files(found, tokenizer), **extra}, whole=whole)
            return path
        extra |= {name: partial(_put, data) for name, data in _tokenizer_files(found, tokenizer).items()}
        if to == "hf":
            native.write_hf(found, path, extra)
        else:
            foreign = {"fla": fla.files, "syncdoth": syncdoth.files}[to](found)
            write_checkpoint(path, {**foreign, **extra}, whole=whole)
    return path


def _tokenizer_files(found: Found, tokenizer: SavedTokenizer | None) -> Mapping[str, bytes]:
    """What Hugging Face's tokenizers are kept in: ours in their form, those of the source's folder as they are."""
    if tokenizer is None and found.kind == "run" and found.tokenizer:
        tokenizer = native.RunTokenizer(found.tokenizer[native.TOKENIZER])
    if tokenizer is None:
        return found.tokenizer
    with tempfile.TemporaryDirectory() as scratch:
        return native.hf_tokenizer_files(tokenizer, Path(scratch))


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    kind: str | None = None,
    to: str = "hf",
    config: str | Path | None = None,
    dtype: str | None = None,
    tokenizer: SavedTokenizer | None = None,
    clamp: bool = False,
    force: bool = False,
) -> Found:
    """Reads a checkpoint and writes it as another kind; see `read` and `write`.

    Args:
        source: a file or folder.
        dest: the folder to write.
        kind: of the source, a key of `READERS`; None recognises it.
        to: a key of `WRITERS`.
        config: a JSON with torchscale's arguments.
        dtype: of the weights written, a key of `retnet.host.DTYPES`; None keeps that of the source.
        tokenizer: a `retnet.data.Tokenizer`; None takes that of the source, if any.
        clamp: keep torchscale's score clamp: exact, but for whole sequences alone.
        force: replace a model that is at `dest`.

    Returns:
        What was written.

    Raises:
        UserError: whatever is wrong with the source, the destination or the combination.
    """
    destination(dest, Path(source), force=force)  # before reading gigabytes
    target = choose_dtype(dtype)
    found = read(source, kind, config=config)
    if clamp:
        found = with_clamp(found)
    if target is not None:
        found = found.to(target)
    write(found, dest, to, source=source, tokenizer=tokenizer, force=force)
    return found


def _put(data: bytes, path: Path) -> None:
    path.write_bytes(data)
