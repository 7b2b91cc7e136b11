"""Data configuration, the section [data] of a run: corpora, tokenizer, and where prepared tokens go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from retnet.settings import PATH, At, Checked, UserError

LEARNED = "bpe:"  # what the name of a tokenizer to be learned begins with
BPE_SIZES = range(257, (1 << 20) + 1)  # from 256 bytes and the document start to more than anybody uses

Text = Annotated[str, PATH]


@dataclass(frozen=True)
class DataConfig(Checked):
    """What to train on.

    A corpus is ``stdlib`` (source and documentation of the running Python), ``package:NAME`` (those of an installed
    Python package, which is not imported), a file, a folder or a glob of ``.txt .md .py .jsonl .parquet`` (all but the
    last also packed: ``.gz .zst .bz2 .xz``), or ``hf:NAME[:CONFIG[:SPLIT]]`` (a Hugging Face dataset, or a local folder
    of data files, streamed); a list joins several, in order. A folder that `prepare` wrote stands for itself.
    The same text is read once, and what is validated on is not trained on.

    Attributes:
        corpus: the text to train on.
        validation: the text to validate on; None splits it off `corpus`, whole documents at a time, by a hash of
            the file's path (text files) or of the text (records).
        validation_fraction: the part of the documents split off, in (0, 1); unused when `validation` is given.
        tokenizer: ``bytes``, ``bpe:SIZE`` (a byte-level BPE of SIZE tokens, learned from the training text before it
            is prepared), a ``tokenizer.json``, or a Hugging Face folder that holds one.
        text_field: the field or column of JSON Lines, Parquet and Hugging Face records that holds the text.
        cache: where prepared tokens go, one folder per fingerprint of everything above.
    """

    corpus: Text | tuple[Text, ...] = "stdlib"
    validation: Text | tuple[Text, ...] | None = None
    validation_fraction: Annotated[float, At(above=0, below=1)] = 0.02
    tokenizer: Text = "bytes"
    text_field: str = "text"
    cache: Text = ".cache/data"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("corpus", "validation"):
            value = getattr(self, name)
            if value is not None and not value:
                raise UserError(f"{name} must name at least one corpus, got {value!r}")
        if self.tokenizer.startswith(LEARNED):
            size = self.tokenizer.removeprefix(LEARNED)
            if not (size.isascii() and size.isdigit() and int(size) in BPE_SIZES):
                raise UserError(
                    f"tokenizer {self.tokenizer!r} has no size from {BPE_SIZES[0]} (256 bytes and the document start) "
                    f"to {BPE_SIZES[-1]:,} behind the colon; for example 'bpe:4096'"
                )

    @property
    def learned_vocab(self) -> int | None:
        """Tokens of a tokenizer that is to be learned from the text; None when it is there already."""
        return int(self.tokenizer.removeprefix(LEARNED)) if self.tokenizer.startswith(LEARNED) else None


def as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """One corpus or several, as several."""
    return (value,) if isinstance(value, str) else tuple(value)
