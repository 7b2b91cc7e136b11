"""Checkpoint directories: complete or absent, never half-written, every file hashed.

A directory is written under a temporary name, file by file, each flushed to the disk; the manifest with the SHA-256 of
every file comes last; one rename makes it visible. Loading verifies the manifest, so a file that was cut short or
changed is refused. Weights are safetensors, configurations TOML; nothing is ever unpickled.

One process writes whole tensors, a file of each kind (`checkpoint_layout.KINDS`). Several write their parts, each into files
of its own (`retnet.model.sharded`). Both are read alike.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from retnet.errors import told
from retnet.io import flush, lfs_pointer, require_fetched, sha256, write_text
from retnet.model.checkpoint_layout import MANIFEST, Entry, Files, TensorPart, entry, is_sharded, tensor_files
from retnet.model.config import ModelConfig
from retnet.model.language_model import LanguageModel
from retnet.model.safetensors_files import load_tensors, save_tensors
from retnet.model.wrapped import unwrapped
from retnet.ops.torch_private import foreach_norm
from retnet.settings import UserError, dump, load


def staging(path: Path) -> Path:
    """Where a checkpoint directory is written before it is complete."""
    return path.with_name(f".{path.name}.partial")


def begin_checkpoint(path: Path) -> None:
    """Makes the empty folder that a checkpoint directory is written into, instead of what interrupted writes left."""
    for left in (staging(path), _before(path)):
        shutil.rmtree(left, ignore_errors=True)
    staging(path).mkdir(parents=True)


def _before(path: Path) -> Path:
    return path.with_name(f".{path.name}.before.partial")


def write_checkpoint(
    path: Path, files: Files, *, whole: str = "", written: Mapping[str, Entry] | None = None
) -> None:
    """Writes a directory with these files and a manifest, or, stopped at any moment, nothing that could be taken for it.

    Args:
        path: the directory; what is there is replaced as a whole.
        files: what it holds.
        whole: what is still there when it cannot be written, for the message.
        written: files that it holds too, and that are on the disk already, where `begin_checkpoint` made their folder.

    Raises:
        UserError: it cannot be written; what was there is as it was.
    """
    partial, before = staging(path), _before(path)
    try:
        with told(f"write {path}", whole):
            if written is None:
                begin_checkpoint(path)
            sums = dict(written or {})
            for name, write in files.items():
                write(partial / name)
                flush(partial / name)
                sums[name] = entry(partial / name)
            (partial / MANIFEST).write_text(json.dumps({"files": sums}, indent=2) + "\n", encoding="utf-8")
            flush(partial / MANIFEST)
            flush(partial)
            if path.exists():  # an earlier checkpoint of the same step
                path.rename(before)
            partial.rename(path)
            flush(path.parent)
    except BaseException:
        if before.exists() and not path.exists():
            before.rename(path)
        shutil.rmtree(partial, ignore_errors=True)  # or the space would be missing for the next one
        raise
    shutil.rmtree(before, ignore_errors=True)


def verify(path: Path, number: int = 0, of: int = 1) -> None:
    """Checks every file of a checkpoint directory against its manifest.

    Args:
        path: the directory.
        number: of this process among those that share the work; each checks other files.
        of: how many these are.

    Raises:
        UserError: no such directory, no manifest, or a file that is missing, cut short or changed; all are listed.
    """
    with told(f"read the checkpoint {path}", "take another one"):
        _verify(path, number, of)


def _verify(path: Path, number: int, of: int) -> None:
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        wanted = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        what = "has no manifest.json, so it is no complete checkpoint" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path / MANIFEST} is damaged; take another checkpoint") from None
    wrong = []
    for name, (size, digest) in list(wanted.items())[number::of]:
        file = path / name
        if Path(name).name != name or not file.is_file():
            wrong.append(f"{name} is missing")
        elif pointer := lfs_pointer(file):
            wrong.append(f"{name} is not there: {pointer}")
        elif file.stat().st_size != size:
            wrong.append(f"{name} has {file.stat().st_size} bytes instead of {size}")
        elif sha256(file) != digest:
            wrong.append(f"{name} was changed after it was written")
    if wrong:
        raise UserError(f"checkpoint {path} is damaged: {'; '.join(wrong)}; take another checkpoint")


def model_files(model: LanguageModel) -> Files:
    """The files of a model: ``model.safetensors`` and ``model.toml``."""
    return {
        "model.safetensors": lambda path: save_tensors(weights(model), path),
        "model.toml": lambda path: write_text(path, dump(model.config)),
    }


def weights(model: LanguageModel) -> dict[str, Tensor]:
    """Name → tensor of what a model has learned; a tied head is its embedding and not listed twice."""
    tied = {"head.weight"} if model.config.tie_embeddings else set()
    return {name: x for name, x in unwrapped(model.state_dict()).items() if name not in tied}


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a NaN or an infinity: of one fused pass, and only where it fails, one by one."""
    numbers = [x for x in tensors.values() if x.is_floating_point() and x.numel()]
    if not numbers or all(bool(x.isfinite()) for x in foreach_norm(numbers, math.inf)):
        return None
    return next(name for name, x in tensors.items() if not x.isfinite().all())


Shapes = Mapping[str, tuple[int, ...]]  # by name, of whole tensors
Into = Mapping[str, Tensor | TensorPart]


def load_into(tensors: Into | Callable[[Shapes], Into], path: Path, kind: str = "model") -> None:
    """Copies the tensors of one of `KINDS` in a verified checkpoint into these; of parts, what they hold.

    Args:
        tensors: name → tensor or part of one; or what makes them, when it hears which are there.
        path: the checkpoint.
        kind: of tensors.

    Raises:
        UserError: tensors that are missing, unknown or misshapen, and all are listed; or numbers that are not finite; or a
            file that cannot be read.
    """
    saved = None
    if is_sharded(path):
        from retnet.model.sharded import SavedTensors

        saved = SavedTensors(path, kind)
    shapes = _shapes(*tensor_files(path, kind)) if saved is None else saved.shapes
    if callable(tensors):
        tensors = tensors(shapes)
    wrong = [f"{name} is missing" for name in tensors.keys() - shapes.keys()]
    wrong += [f"{name} is not part of the model" for name in shapes.keys() - tensors.keys()]
    wrong += [
        f"{name} has shape {shapes[name]} instead of {tuple(tensors[name].shape)}"
        for name in tensors.keys() & shapes.keys()
        if tuple(tensors[name].shape) != shapes[name]
    ]
    if wrong:
        raise UserError(f"{path} does not fit its configuration: {'; '.join(sorted(wrong))}")
    with torch.no_grad():
        if saved is not None or any(isinstance(x, TensorPart) for x in tensors.values()):
            from retnet.model.sharded import SavedTensors, local_part

            parts = {name: x if isinstance(x, TensorPart) else local_part(x) for name, x in tensors.items()}
            (saved or SavedTensors(path, kind)).read(parts)
            found = {name: part.tensor for name, part in parts.items()}
        else:
            found = load_tensors(*tensor_files(path, kind))
            for name, tensor in tensors.items():
                assert isinstance(tensor, Tensor)
                tensor.copy_(found[name])
    if (bad := first_not_finite(found)) is not None:
        raise UserError(f"{path} is damaged: {bad} has numbers that are not finite; take another checkpoint")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    require_fetched(file)
    with told(f"read {file}"), safe_open(file, "pt") as saved:
        return {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118  no mapping


def load_model(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> LanguageModel:
    """The model of a checkpoint directory, in evaluation mode, after its hashes have been verified.

    Args:
        path: a directory written by `write_checkpoint` with `model_files`.
        device: where the weights go.
        dtype: type of the weights, default: as saved. γ, angles, states and statistics stay fp32 or better.

    Raises:
        UserError: the directory is incomplete, damaged, or its weights do not fit its configuration.
    """
    path = Path(path)
    verify(path)
    config = load(ModelConfig, path / "model.toml")
    with torch.device("meta"):  # no time spent on initialising what is overwritten
        model = LanguageModel(config)
    model = model.to_empty(device=device)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight  # `to_empty` makes them two
    load_into(weights(model), path)
    return model.to(dtype=dtype).eval() if dtype else model.eval()
