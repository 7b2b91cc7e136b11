"""Memory-mapped token shards: the prepared tokens of a split as one long stream of documents."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from retnet.data.manifest import TOKENIZER, Manifest, Split, read_manifest
from retnet.data.tokenizer import Tokenizer
from retnet.settings import UserError

_OPEN_FILES = 128  # mappings kept open; each holds a file descriptor


class TokenShards:
    """The tokens of one split as one stream: document after document, each BOS followed by its tokens.

    Attributes:
        num_tokens: length of the stream, BOS included.
        num_documents: how many documents it has; their ids are 0 … num_documents − 1, in the order of the stream.
        num_bytes: length of the text in UTF-8, BOS not counted (the denominator of bits per byte).
        dtype: of the tokens on disk: uint16 or uint32.
        bos_id: the id that starts every document, and stands nowhere else.
        fingerprint: SHA-256 (hex) of the content: tokens, boundaries and tokenizer.
        corpora: how many of the tokens each corpus has, one after the other.
    """

    def __init__(self, directory: Path, split: Split, manifest: Manifest) -> None:
        self.num_tokens = split.tokens
        self.num_documents = split.documents
        self.num_bytes = split.bytes
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self.bos_id = manifest.bos_id
        self.corpora = tuple(split.corpora) or (split.tokens,)
        hashes = [f"{shard.tokens_sha256} {shard.offsets_sha256}" for shard in split.shards]
        self.fingerprint = hashlib.sha256("\n".join([manifest.tokenizer, *hashes]).encode()).hexdigest()
        self._names = [shard.name for shard in split.shards]
        self._starts = [0, *accumulate(shard.tokens for shard in split.shards)]  # of shards in the stream
        self._documents = [0, *accumulate(shard.documents for shard in split.shards)]
        self._directory = directory
        self._open = lru_cache(_OPEN_FILES)(self._map)

    def tokens(self, start: int, stop: int) -> NDArray[np.integer]:
        """Tokens [start, stop) of the stream, cut off at its ends; a view of the file where they lie in one shard."""
        start, stop = max(start, 0), min(stop, self.num_tokens)
        parts = []
        while start < stop:
            shard = bisect_right(self._starts, start) - 1
            base, end = self._starts[shard], self._starts[shard + 1]
            parts.append(self._open(shard, "tokens")[start - base : min(stop, end) - base])
            start = end
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def document_at(self, token: int) -> int:
        """The id of the document that token `token` of the stream belongs to."""
        if not 0 <= token < self.num_tokens:
            raise IndexError(f"token {token} lies outside the stream of {self.num_tokens}")
        shard = bisect_right(self._starts, token) - 1
        offset = np.uint64(token - self._starts[shard])
        # One less than the count of starts up to here; a shard may begin inside the last document before it.
        return self._documents[shard] + int(self._open(shard, "offsets").searchsorted(offset, "right")) - 1

    def document_span(self, document: int) -> tuple[int, int]:
        """[start, stop) of a document in the stream, its BOS included."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} lies outside the {self.num_documents} there are")
        last = document + 1 == self.num_documents
        return self._start(document), self.num_tokens if last else self._start(document + 1)

    def _start(self, document: int) -> int:
        shard = bisect_right(self._documents, document) - 1
        return self._starts[shard] + int(self._open(shard, "offsets")[document - self._documents[shard]])

    def _map(self, shard: int, what: str) -> NDArray[np.integer]:
        path = self._directory / f"{self._names[shard]}.{what}"
        dtype = self.dtype if what == "tokens" else np.dtype("<u8")
        if not path.stat().st_size:  # nothing can be mapped; a shard inside one document has no offsets
            return np.empty(0, dtype)
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


class Prepared(NamedTuple):
    """A corpus ready for training.

    Attributes:
        train: the tokens to train on.
        validation: the tokens to validate on.
        tokenizer: what made them.
        manifest: counts, hashes, sources and problems.
        directory: where they lie.
    """

    train: TokenShards
    validation: TokenShards
    tokenizer: Tokenizer
    manifest: Manifest
    directory: Path


def load(directory: str | Path, *, verify: bool | None = None) -> Prepared:
    """Opens a prepared folder; `verify` as in `read_manifest`.

    Raises:
        UserError: it is unfinished or damaged.
    """
    directory = Path(os.path.expanduser(directory))
    manifest = read_manifest(directory, verify)
    tokenizer = Tokenizer.load(directory / TOKENIZER)
    if tokenizer.fingerprint != manifest.tokenizer:
        raise UserError(
            f"{directory} is damaged: its {TOKENIZER} is not the one the tokens were made with; "
            "delete the folder and prepare it again"
        )
    train = TokenShards(directory, manifest.train, manifest)
    return Prepared(
        train, TokenShards(directory, manifest.validation, manifest), tokenizer, manifest, directory
    )
