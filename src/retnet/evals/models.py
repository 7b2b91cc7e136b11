"""Models to evaluate: our runs and checkpoints, or any causal language model in a Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from torch import nn

from retnet.convert import folder_of
from retnet.data import Tokenizer
from retnet.engine import find_checkpoint, open_run
from retnet.evals.readers import CachedReader, Reader, RecurrentReader
from retnet.host import choose_device, choose_dtype
from retnet.io import require_fetched
from retnet.model import LanguageModel
from retnet.settings import UserError

# Where configurations of Hugging Face say how many positions a model has.
_LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "n_ctx",
    "seq_length",
)


class Candidate(NamedTuple):
    """A model to be evaluated.

    Attributes:
        name: as it was given.
        model: a `LanguageModel`, or a causal model of transformers', in evaluation mode.
        tokenizer: the one it was trained with; its document start is the folder's BOS, or its EOS where it has none.
        theirs: the tokenizer of a Hugging Face folder, as transformers opens it; None for ours.
        limit: positions the model can hold; None for any.
        about: path, kind, SHA-256 of the weights, parameters and types, for records.
    """

    name: str
    model: nn.Module
    tokenizer: Tokenizer
    theirs: Any
    limit: int | None
    about: dict[str, Any]

    def reader(self, batch_tokens: int | None = None) -> Reader:
        """To score with; `batch_tokens` as in `Reader`."""
        if isinstance(self.model, LanguageModel):
            return RecurrentReader(self.model, batch_tokens)
        return CachedReader(self.model, _vocab_size(self.model), self.limit, batch_tokens)


def open_model(
    path: str | Path, *, checkpoint: str | None = None, device: str = "cpu", dtype: str | None = None
) -> Candidate:
    """Loads a model for evaluation. Nothing is unpickled, no code of a folder is run, no network is used.

    Args:
        path: a run, one of its checkpoints, or a Hugging Face folder.
        checkpoint: of a run: "best", "last" or a name; None: the best, or the last while there is none.
        device: what torch calls it; "auto" is a GPU where there is one.
        dtype: a key of `retnet.host.DTYPES`; None is that of the file.

    Raises:
        UserError: nothing there that can be used, or no such checkpoint, device or dtype.
    """
    path = folder_of(path)
    check_model(path, checkpoint)
    if _is_folder(path):
        return _open_folder(Path(path), device, dtype)
    run = open_run(path, checkpoint=checkpoint, device=device, dtype=dtype)
    about = {
        "kind": "run",
        "checkpoint": run.checkpoint.name,
        **_about(run.model, run.tokenizer, run.checkpoint),
    }
    return Candidate(str(path), run.model, run.tokenizer, None, None, about)


def check_model(path: str | Path, checkpoint: str | None = None) -> None:
    """Says whether there is something to open, without opening it.

    Raises:
        UserError: there is not, or no such checkpoint.
    """
    path = folder_of(path)
    if not _is_folder(path):
        find_checkpoint(path, checkpoint)
    elif checkpoint is not None:
        raise UserError(f"{path} is a Hugging Face folder; leave out the checkpoint name {checkpoint!r}")


def _is_folder(path: str | Path) -> bool:
    return (Path(path) / "config.json").is_file()


def _open_folder(folder: Path, device: str, dtype: str | None) -> Candidate:
    kind = choose_dtype(dtype)
    try:
        import transformers

        from retnet.model.hf import RetNetForCausalLM  # registers our models with the Auto classes
    except ImportError as error:
        raise UserError(f"Hugging Face folders need {error.name}; pip install 'retnet[hf]'") from None
    transformers.utils.logging.disable_progress_bar()
    for file in sorted(folder.glob("*.safetensors")):
        require_fetched(file)
    try:
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if kind is None else kind,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds
        raise UserError(f"cannot open {folder}: {' '.join(str(error).split())[:400]}") from None
    if loaded["missing_keys"]:
        raise UserError(f"{folder} lacks weights: {', '.join(sorted(loaded['missing_keys'])[:5])} …")
    model = model.to(choose_device(device)).eval()
    tokenizer = _tokenizer(theirs, folder)
    if tokenizer.vocab_size > _vocab_size(model):
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens but the model {_vocab_size(model)}; "
            "they do not belong together"
        )
    about = {"kind": model.config.model_type, **_about(model, tokenizer, folder)}
    if isinstance(model, RetNetForCausalLM):
        return Candidate(str(folder), model.to_language_model().eval(), tokenizer, theirs, None, about)
    text = model.config.get_text_config()
    limit = next((int(n) for name in _LIMITS if isinstance(n := getattr(text, name, None), int)), None)
    return Candidate(str(folder), model, tokenizer, theirs, limit, about)


def _tokenizer(theirs: Any, folder: Path) -> Tokenizer:  # noqa: ANN401
    inner = getattr(theirs, "backend_tokenizer", None)
    if inner is None:
        raise UserError(
            f"{folder} has no fast tokenizer (tokenizer.json); convert it with transformers first"
        )
    inner = tokenizers.Tokenizer.from_str(inner.to_str())  # ours says itself what starts a text
    for start in (theirs.bos_token, theirs.eos_token):
        if start is not None and inner.token_to_id(start) is not None:
            return Tokenizer(inner, start)
    raise UserError(f"the tokenizer of {folder} has neither a BOS nor an EOS token to start a document with")


def _vocab_size(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


def _about(model: nn.Module, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    weight = next(model.parameters())
    return {
        "path": str(folder),
        "sha256": _folder_sha256(folder),
        "tokenizer_sha256": tokenizer.fingerprint,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
    }


def _folder_sha256(folder: Path) -> str:
    """Of the names and SHA-256 of the files of weights and configuration."""
    lines = []
    known = _manifest(folder)
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors" or file.name in ("config.json", "model.toml"):
            if file.name not in known:
                with file.open("rb") as content:
                    known[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
            lines.append(f"{file.name} {known[file.name]}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _manifest(folder: Path) -> dict[str, str]:
    """File → SHA-256, as loading has verified them; empty where there is no manifest."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return {}
    return {name: entry["sha256"] for name, entry in files.items()}
