"""Opening a trained run, one checkpoint of it, or a RetNet's folder of another library, for inference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from retnet.convert import folder_of, model_type, read, recognise
from retnet.data import Tokenizer
from retnet.engine.quantise import quantise
from retnet.host import choose_device, choose_dtype
from retnet.model.checkpoint import load_model
from retnet.model.runs import find_checkpoint
from retnet.settings import UserError, nearest

if TYPE_CHECKING:
    from retnet.model import LanguageModel

WEIGHTS = ("int8",)


class Run(NamedTuple):
    """A model ready for inference.

    Attributes:
        model: in evaluation mode.
        tokenizer: the one it was trained with.
        checkpoint: the directory both were read from.
        chosen: the name under which it was found: "best", "last" or the directory's own; empty for another's folder.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    checkpoint: Path
    chosen: str


def open_run(
    path: str | Path,
    *,
    checkpoint: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    weights: str | None = None,
) -> Run:
    """Loads model and tokenizer.

    Args:
        path: a run or checkpoint, anything in one, or a folder of Hugging Face or flash-linear-attention.
        checkpoint: of a run: "best", "last" or a name such as "step-00001000"; None is the best, or the last while
            there is no best yet (`Run.chosen` tells).
        device: what torch calls it, such as "cpu" or "cuda:0"; "auto" is a GPU where there is one.
        dtype: a key of `retnet.host.DTYPES`; None is that of the file.
        weights: "int8" for linear layers with int8 weights, see `retnet.engine.quantise`; None is as `dtype` says.

    Raises:
        UserError: nothing there, no such checkpoint, damaged files, a model that is no RetNet, or no such device, dtype or
            weights.
    """
    kind = choose_dtype(dtype)
    if weights is not None and weights not in WEIGHTS:
        raise UserError(f"unknown weights {weights!r}; {nearest(weights, WEIGHTS)}")
    if weights is not None and dtype not in (None, "float32"):
        raise UserError(
            f"{weights} weights are computed with in float32, not {dtype}; leave out one of the two"
        )
    place = choose_device(device)
    if (folder_of(path) / "config.json").is_file():
        where, chosen = folder_of(path), ""
        model, tokenizer = _open_folder(where, checkpoint)
        model = (model if kind is None else model.to(dtype=kind)).to(place)
    else:
        where, chosen = find_checkpoint(path, checkpoint)
        model = load_model(where, device=place, dtype=kind).eval()
        tokenizer = _tokenizer(where, where / "tokenizer.json")
    vocab_size = model.config.vocab_size
    assert vocab_size is not None  # no model is built without
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens but the model "
            f"{vocab_size}; they do not belong together"
        )
    return Run(quantise(model) if weights else model, tokenizer, where, chosen)


def _open_folder(folder: Path, checkpoint: str | None) -> tuple[LanguageModel, Tokenizer]:
    """Model and tokenizer of another library's folder, which say themselves what is wrong with them."""
    if checkpoint is not None:
        raise UserError(f"{folder} is no run; leave out the checkpoint name {checkpoint!r}")
    try:
        kind = recognise(folder)
    except UserError:
        raise UserError(
            f"{folder} holds no RetNet that can be run here, but a model of type {model_type(folder)!r}; "
            "`retnet eval` measures any"
        ) from None
    return read(folder, kind).model(), _tokenizer(folder, folder)


def _tokenizer(folder: Path, spec: Path) -> Tokenizer:
    """What lies beside a model; a model has no place for one that lies elsewhere, so the message makes one."""
    try:
        return Tokenizer.load(spec)
    except UserError as error:
        raise UserError(
            f"{error}; `retnet convert {folder} DEST --to run --tokenizer …` puts one beside the model"
        ) from None
