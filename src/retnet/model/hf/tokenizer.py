"""Our tokenizers as transformers' own: the same ids, byte tokenizers included."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Protocol

import tokenizers
from transformers import PreTrainedTokenizerFast


class SavedTokenizer(Protocol):
    """What `retnet.data.Tokenizer` is to this room."""

    bos_id: int
    end_ids: tuple[int, ...]

    def save(self, path: str | Path) -> None:
        """Writes a ``tokenizer.json``."""


def hf_tokenizer(tokenizer: SavedTokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer for transformers.

    It starts texts with BOS, which also ends them and fills up batches, on the left; with
    ``add_special_tokens=False`` its ids are those of `tokenizer`. Text never becomes a special id.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        tokenizer.save(file)
        inner = tokenizers.Tokenizer.from_file(str(file))
    bos = inner.id_to_token(tokenizer.bos_id)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=bos,
        eos_token=bos,
        pad_token=bos,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )
