"""Data configuration, the section [data] of a run: corpora, tokenizer, and where prepared tokens go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from retnet.settings import PATH, At, Checked, Count, UserError

LEARNED = "bpe:"  # what the name of a tokenizer to be learned begins with
BPE_SIZES = range(257, (1 << 20) + 1)  # from 256 bytes and the document start to more than anybody uses

Text = Annotated[str, PATH]
Weight = Annotated[float, At(least=0, most=1e9)]


@dataclass(frozen=True)
class MixturePhase(Checked):
    """Weights of a mixture from a step on.

    Attributes:
        step: the first step that has them, counted from 0; a run's first phase is `DataConfig.weights`.
        weights: one for each corpus, as in `DataConfig.weights`.
    """

    step: Count
    weights: tuple[Weight, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_weights(self.weights)


@dataclass(frozen=True)
class DataConfig(Checked):
    """What to train on.

    A corpus is ``stdlib`` (source and documentation of the running Python), ``package:NAME`` (those of an installed
    Python package, which is not imported), a file, a folder or a glob of ``.txt .md .py .jsonl .parquet`` (all but the
    last also compressed: ``.gz .zst .bz2 .xz``), a URL of such files that fsspec reads (``s3://…``, ``https://…``,
    ``hf://datasets/…``; a folder or a pattern with ``*`` too), or ``hf:NAME[:CONFIG[:SPLIT]]`` (a Hugging Face dataset,
    or a local folder of data files, streamed); a list joins several, in order. A folder that `prepare` wrote stands for
    itself.
    The same text is read once, and what is validated on is not trained on.

    Attributes:
        corpus: the text to train on.
        validation: the text to validate on; None splits it off `corpus`, whole documents at a time, by a hash of
            the file's path (text files) or of the text (records).
        validation_fraction: the part of the documents split off, in (0, 1); unused when `validation` is given.
        tokenizer: ``bytes``, ``bpe:SIZE`` (a byte-level BPE of SIZE tokens, learned from the training text before it
            is prepared), a ``tokenizer.json``, or a Hugging Face folder that holds one.
        text_field: the field or column of JSON Lines, Parquet and Hugging Face records that holds the text.
        weights: of a mixture: the share of training's rows from each corpus of `corpus`, in any proportion (``[7, 2, 1]``);
            none takes all text as one. They do not change what is prepared.
        phases: other weights from later steps on, in order.
        cache: where prepared tokens go, one folder per fingerprint of everything above.
    """

    corpus: Text | tuple[Text, ...] = "stdlib"
    validation: Text | tuple[Text, ...] | None = None
    validation_fraction: Annotated[float, At(above=0, below=1)] = 0.02
    tokenizer: Text = "bytes"
    text_field: str = "text"
    weights: tuple[Weight, ...] | None = None
    phases: tuple[MixturePhase, ...] | None = None
    cache: Text = ".cache/data"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("corpus", "validation"):
            value = getattr(self, name)
            if value is not None and not value:
                raise UserError(f"{name} must name at least one corpus, got {value!r}")
        self._check_weights()
        if self.tokenizer.startswith(LEARNED):
            size = self.tokenizer.removeprefix(LEARNED)
            if not (size.isascii() and size.isdigit() and int(size) in BPE_SIZES):
                raise UserError(
                    f"tokenizer {self.tokenizer!r} has no size from {BPE_SIZES[0]} (256 bytes and the document start) "
                    f"to {BPE_SIZES[-1]:,} behind the colon; for example 'bpe:4096'"
                )

    def _check_weights(self) -> None:
        if self.phases and self.weights is None:
            raise UserError("phases change the weights of a mixture; give data.weights, which it begins with")
        if self.weights is None:
            return
        _require_weights(self.weights)
        phases = self.phases or ()
        steps = [phase.step for phase in phases]
        named = len(as_tuple(self.corpus))
        corpora = named if named > 1 else len(self.weights)  # one may be a prepared folder of several corpora
        given = [("weights", self.weights)]
        given += [(f"the phase from step {phase.step} on", phase.weights) for phase in phases]
        for name, weights in given:
            if len(weights) != corpora:
                raise UserError(f"{name} has {len(weights)} numbers for {corpora} corpora; give one for each")
        if steps != sorted(set(steps)):
            raise UserError(f"phases must be in the order of their steps, got steps {steps}")

    @property
    def learned_vocab(self) -> int | None:
        """Tokens of a tokenizer that is to be learned from the text; None when it is there already."""
        return int(self.tokenizer.removeprefix(LEARNED)) if self.tokenizer.startswith(LEARNED) else None


def as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """One corpus or several, as several."""
    return (value,) if isinstance(value, str) else tuple(value)


def _require_weights(weights: tuple[float, ...]) -> None:
    if not any(weights):
        raise UserError(f"weights is {list(weights)}; one of them must be above 0")
