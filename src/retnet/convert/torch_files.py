"""Checkpoint files of torch, read as data: tensors, numbers and words. Nothing in them is ever run."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError  # the name of an error alone: nothing is unpickled
from typing import Any

import torch
from torch import Tensor

from retnet.errors import UserError, told
from retnet.io import require_fetched
from retnet.model.safetensors_files import load_tensors
from retnet.model.wrapped import unwrapped

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


def checkpoint_file(path: Path) -> Path:
    """The checkpoint a user means by a file or a folder.

    Raises:
        UserError: a folder without exactly one.
    """
    if not path.is_dir():
        return path
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    # A folder with a checkpoint of torch may have other tensors beside it, such as data of its tests.
    found = [file for file in found if file.suffix != ".safetensors"] or found
    if len(found) == 1:
        return found[0]
    what = f"{len(found)}: {', '.join(file.name for file in found)}" if found else "none"
    raise UserError(
        f"{path} should have one checkpoint ({', '.join(SUFFIXES)}) and has {what}; name the file"
    )


def load_weights(file: Path) -> dict[str, Tensor]:
    """Name → tensor of one file of weights, safetensors or a state dict of torch.

    Raises:
        UserError: as `load`, or it holds anything but named tensors.
    """
    if file.suffix == ".safetensors":
        return load_tensors(file)
    content = load(file)
    others = [str(key) for key, x in content.items() if not (isinstance(key, str) and isinstance(x, Tensor))]
    if others:
        raise UserError(f"{file} should hold named tensors alone; not tensors: {', '.join(others[:10])}")
    return dict(content)


def load(file: Path) -> dict[str, Any]:
    """The content of a checkpoint, without running anything in it.

    Raises:
        UserError: it cannot be read, or holds objects other than tensors, plain data and argparse's namespaces.
    """
    if file.suffix == ".safetensors":
        return {"model": load_tensors(file)}
    with told(f"read {file}"):
        file.open("rb").close()
    require_fetched(file)
    try:
        content = _load_data(file)
    except UnpicklingError as error:
        what = re.search(r"(?:GLOBAL|global:) (?:GLOBAL )?([\w.]+)", str(error))
        raise UserError(
            f"{file} was refused and nothing in it was run: it holds {what[1] if what else 'more than data'}, and "
            "unpickling such objects can run any code. Where you trust the file, save it anew with "
            "{'model': its tensors, 'args': a plain dict}"
        ) from None
    except Exception as error:  # torch raises whatever the damage leads to
        reason = str(error).partition(". ")[0].strip() or type(error).__name__
        raise UserError(f"{file} is no readable checkpoint, or is cut short ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not a dictionary with the key 'model'")
    return content


def _load_data(file: Path) -> Any:  # noqa: ANN401
    """torch.load restricted to data. Namespaces hold what attributes hold, and nothing of them is called."""
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")  # about pickle protocols
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only" not in str(error):
                raise
            return torch.load(file, map_location="cpu", weights_only=True)  # the format before torch 1.6


def state_of(content: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """Name → tensor, names without ``decoder.``.

    Raises:
        UserError: there are no tensors, or one of them twice.
    """
    state = content["model"] if isinstance(content.get("model"), Mapping) else content
    others = [str(key) for key, x in state.items() if not (isinstance(key, str) and isinstance(x, Tensor))]
    if not state or others:
        raise UserError(
            f"{file} holds no weights: torchscale keeps them under 'model', and this file has "
            f"{', '.join(repr(str(name)) for name in content) or 'nothing'}"
            + (f"; not tensors: {', '.join(others[:10])}" if state is not content else "")
        )
    return without_prefix(unwrapped(state), "decoder.", file)


def without_prefix(tensors: Mapping[str, Tensor], prefix: str, where: Path) -> dict[str, Tensor]:
    """The same tensors, names without this prefix.

    Raises:
        UserError: one of them is there twice.
    """
    short: dict[str, Tensor] = {}
    for name, x in tensors.items():
        plain = name.removeprefix(prefix)
        if plain in short:
            raise UserError(f"{where} has {plain} twice, with and without the prefix {prefix!r}")
        short[plain] = x
    return short


def arguments_of(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments that a checkpoint holds itself, or None."""
    for key in ("args", "cfg", "config"):
        args = content.get(key)
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        if isinstance(args, Mapping) and args:
            return dict(args)
    return None
