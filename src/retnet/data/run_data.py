"""Fingerprints of a run's data, in its `data.json`: whether text, tokens and tokenizer still are what it began with."""

from __future__ import annotations

from pathlib import Path

import msgspec

from retnet.data.shards import Prepared
from retnet.data.split import DIVISION
from retnet.errors import told
from retnet.io import write_bytes

RECORD = "data.json"
OR_DIVISION = ", or the rule by which this version divides it,"  # where nobody can tell


class RunData(msgspec.Struct, frozen=True):
    """What a run is trained and validated on.

    Attributes:
        tokenizer: `Tokenizer.fingerprint`.
        train: `TokenShards.fingerprint` of the tokens that are trained on.
        validation: of those that are validated on.
        train_text: `text_fingerprint` of what the tokens were made from; empty where that is not known.
        validation_text: likewise.
        division: number of the rule that divided the text (`retnet.data.split.DIVISION`); 0 where it is not known.
    """

    tokenizer: str
    train: str
    validation: str
    train_text: str = ""
    validation_text: str = ""
    division: int = 0

    @classmethod
    def of(cls, prepared: Prepared) -> RunData:
        """Of data that is ready to be trained on."""
        return cls(
            tokenizer=prepared.tokenizer.fingerprint,
            train=prepared.train.fingerprint,
            validation=prepared.validation.fingerprint,
            train_text=prepared.manifest.train_text,
            validation_text=prepared.manifest.validation_text,
            division=DIVISION if prepared.manifest.train_text else 0,
        )

    @classmethod
    def read(cls, run: Path) -> RunData | None:
        """What a run says of itself; None where it says nothing, as those of older versions.

        Raises:
            UserError: the record is damaged.
        """
        file = run / RECORD
        if not file.is_file():
            return None
        with told(
            f"read {file}", "restore it, or remove it: nobody can then tell whether the text is the same"
        ):
            return msgspec.json.decode(file.read_bytes(), type=cls)

    def write(self, run: Path) -> None:
        """Replaces what a run says of itself.

        Raises:
            OSError: it cannot be written.
        """
        write_bytes(run / RECORD, msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")

    @property
    def known_division(self) -> bool:
        """Whether text is divided into sides as it was then, so that other sides are of other text."""
        return self.division == DIVISION

    def changed(self, now: RunData, *, apart: bool) -> str:
        """What is no longer as it is here, as the beginning of a sentence; empty while the tokens are the same.

        Args:
            now: what there is now.
            apart: the text that is validated on is a corpus of its own.
        """
        if (self.tokenizer, self.train, self.validation) == (now.tokenizer, now.train, now.validation):
            return ""
        before, after = (self.train_text, self.validation_text), (now.train_text, now.validation_text)
        other_tokenizer = self.tokenizer != now.tokenizer
        if not all((*before, *after)):  # another tokenizer makes other tokens of the same text
            if other_tokenizer:
                return "the tokenizer has changed"
            before, after = (self.train, self.validation), (now.train, now.validation)
        words = ["the corpus"] if before[0] != after[0] or (before != after and not apart) else []
        words += ["the validation text"] if before != after and not words else []
        if now.division and not apart and not self.known_division:
            words = [f"{word}{OR_DIVISION}" for word in words]
        words += ["the tokenizer"] if other_tokenizer else []
        return f"{' and '.join(words or ['what becomes of the corpus'])} {'have' if words[1:] else 'has'} changed"
