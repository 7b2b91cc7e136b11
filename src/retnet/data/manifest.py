"""Manifest of a folder of prepared tokens, and how its files are written so that a kill leaves none half-made.

manifest.json                 written last: without it the folder is unfinished
tokenizer.json
train-00000.tokens            little-endian uint16 or uint32, documents one after the other, each BOS + tokens
train-00000.offsets           little-endian uint64, where documents start, counted from the start of this file
validation-00000.tokens, …
segment-00000.json            only while unfinished: the shards that are complete, and where reading went on
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from retnet.data.config import as_tuple
from retnet.io import sha256
from retnet.settings import UserError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
FORMAT = "retnet-tokens"
VERSION = 2
VERIFY_BELOW = 256 << 20  # bytes; smaller folders have their hashes checked whenever they are opened


class Shard(msgspec.Struct, frozen=True):
    """One file of tokens and its offsets. `bytes` are those of the text in UTF-8, BOS not counted."""

    name: str
    tokens: int
    documents: int
    bytes: int
    tokens_sha256: str
    offsets_sha256: str


class Split(msgspec.Struct, frozen=True):
    """Train or validation: totals over its shards, and how many of the tokens each of several corpora has, in order."""

    documents: int
    tokens: int
    bytes: int
    shards: list[Shard]
    corpora: list[int] = []


class CorpusEntry(msgspec.Struct, frozen=True):
    """One corpus.

    Attributes:
        name: as it was given.
        files: how many of its files were read.
        bytes: of these, decompressed.
        sha256: of the contents of its files, in order.
        left_out: what was not read, by kind (an ending, ``duplicate``, ``not text``, ``hidden``, …) → how many.
    """

    name: str
    files: int
    bytes: int
    sha256: str
    left_out: dict[str, int]


class _Format(msgspec.Struct):
    """What every version has."""

    format: str
    version: int


class Manifest(msgspec.Struct, frozen=True):
    """Everything known of a prepared folder.

    Attributes:
        format: always ``retnet-tokens``.
        version: of the format.
        fingerprint: SHA-256 of what the tokens were made from and how.
        dtype: of the tokens.
        tokenizer: SHA-256 of the tokenizer (`Tokenizer.fingerprint`).
        vocab_size: of the tokenizer.
        bos_id: the id that starts each document.
        corpora: what was read, and which files were not.
        problems: what could not be used of the files that were read, or was mended: kind → how many.
        examples: the first problems, in words.
        listed: how many of these were found before anything was read for its documents: they depend on names and paths.
        train: its documents, tokens, bytes and shards.
        validation: the same.
        train_text: `retnet.data.split.text_fingerprint` of what it was made from; empty in the folder, whose text may move.
        validation_text: the same.
    """

    format: str
    version: int
    fingerprint: str
    dtype: Literal["uint16", "uint32"]
    tokenizer: str
    vocab_size: int
    bos_id: int
    corpora: list[CorpusEntry]
    problems: dict[str, int]
    examples: list[str]
    train: Split
    validation: Split
    listed: int = 0
    train_text: str = ""
    validation_text: str = ""


def prepared_folder(corpus: str | tuple[str, ...]) -> Path | None:
    """The folder, when a corpus is one that `prepare` wrote."""
    (first, *others) = as_tuple(corpus)
    folder = Path(os.path.expanduser(first))
    try:
        with (folder / MANIFEST).open("rb") as file:
            head = file.read(200)
    except (OSError, ValueError):  # ValueError: a name with NUL
        return None
    return folder if not others and FORMAT.encode() in head else None


def read_manifest(directory: Path, verify: bool | None = None) -> Manifest:
    """The manifest of a folder whose files fit it.

    Args:
        directory: what `prepare` wrote.
        verify: compare SHA-256 of all shards too; None does so below `VERIFY_BELOW` bytes. Sizes always are compared.

    Raises:
        UserError: it is unfinished, altered, or of another format.
    """
    try:
        content = (directory / MANIFEST).read_bytes()
        kind = msgspec.json.decode(content, type=_Format)
        if (kind.format, kind.version) == (FORMAT, VERSION):
            manifest = msgspec.json.decode(content, type=Manifest)
    except FileNotFoundError:
        raise UserError(f"{directory} is not a finished folder of tokens: it has no {MANIFEST}") from None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UserError(_damaged(directory, f"{MANIFEST} cannot be read ({error})")) from None
    if (kind.format, kind.version) != (FORMAT, VERSION):
        raise UserError(
            f"{directory} has format {kind.format} version {kind.version}; this library reads {FORMAT} version "
            f"{VERSION}: prepare it again from the text it was made of"
        )
    shards = [*manifest.train.shards, *manifest.validation.shards]
    width = np.dtype(manifest.dtype).itemsize
    sizes = {f"{s.name}.tokens": s.tokens * width for s in shards}
    sizes |= {f"{s.name}.offsets": s.documents * 8 for s in shards}
    for file, size in sizes.items():
        path = directory / file
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise UserError(_damaged(directory, f"{file} should have {size} bytes, found {found}"))
    if verify or (verify is None and sum(sizes.values()) < VERIFY_BELOW):
        for shard in shards:
            for file, wanted in (("tokens", shard.tokens_sha256), ("offsets", shard.offsets_sha256)):
                if sha256(directory / f"{shard.name}.{file}") != wanted:
                    raise UserError(_damaged(directory, f"{shard.name}.{file} is not what was written"))
    return manifest


def _damaged(directory: Path, why: str) -> str:
    return f"{directory} is damaged: {why}; delete the folder and prepare it again"
