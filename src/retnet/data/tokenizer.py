"""Tokenizers: bytes, byte-level BPE trained here, or anything the `tokenizers` library reads.

Text never becomes a special id: where a corpus happens to contain the characters of a special token, they are encoded
as the ordinary characters they are. Only the library itself puts the document start (BOS) into a stream.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import DTypeLike, NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from retnet.data.config import BPE_SIZES
from retnet.settings import UserError

BOS = "<|bos|>"
_KNOWN_BOS = (BOS, "<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "[CLS]")


class Tokenizer:
    """Text ↔ token ids.

    Attributes:
        vocab_size: ids lie in [0, vocab_size).
        bos_id: the id that starts every document.
        fingerprint: SHA-256 (hex) of the canonical JSON, the document start included.
    """

    def __init__(self, inner: tokenizers.Tokenizer, bos: str) -> None:
        inner.no_truncation()
        inner.no_padding()
        inner.add_special_tokens([AddedToken(bos, special=True, normalized=False)])
        bos_id = inner.token_to_id(bos)
        assert bos_id is not None
        self.bos_id: int = bos_id
        # The template is where a tokenizer.json says what starts a text; it makes BOS part of the saved file.
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, self.bos_id)]
        )
        inner.encode_special_tokens = True
        self._inner = inner
        self._json = json.dumps(
            json.loads(inner.to_str()), ensure_ascii=False, sort_keys=True, separators=(",", ":")
        )
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint: str = hashlib.sha256(self._json.encode()).hexdigest()
        self._is_bytes = _is_bytes(json.loads(self._json))
        if self.bos_id in inner.encode(bos, add_special_tokens=False).ids:
            raise UserError(
                f"this tokenizer turns the text {bos!r} into its document start; it cannot be used"
            )

    @classmethod
    def load(cls, spec: str | Path) -> Tokenizer:
        """Reads a tokenizer.

        Args:
            spec: ``bytes``, a ``tokenizer.json``, or a folder with one (the ``bos_token`` of a
                ``tokenizer_config.json`` beside it counts then).

        Raises:
            UserError: there is none, it cannot be read, or it names no document start.
        """
        if str(spec) == "bytes":
            return cls(_bytes_tokenizer(), BOS)
        path = Path(os.path.expanduser(spec))
        file = path / "tokenizer.json" if os.path.isdir(path) else path
        if not os.path.isfile(file):
            raise UserError(
                f"no tokenizer {str(spec)!r}: give 'bytes', a tokenizer.json, or a folder that holds one"
            )
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:
            raise UserError(f"cannot read the tokenizer {file}: {error}") from None
        return cls(inner, _find_bos(inner, file, path.is_dir()))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Trains a byte-level BPE (the pre-tokenizer of GPT-2); the same texts give the same tokenizer.

        Args:
            texts: documents or parts of them, read once.
            vocab_size: from 257 (256 bytes and BOS) to 2^20. Few texts may fill less of it.
        """
        if vocab_size not in BPE_SIZES:
            raise UserError(
                f"vocab_size must be at least {BPE_SIZES[0]} (256 bytes and {BOS}) and at most {BPE_SIZES[-1]:,}, "
                f"got {vocab_size:,}"
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner, BOS)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS."""
        if self._is_bytes:
            return list(text.encode())
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], dtype: DTypeLike = np.int64) -> list[NDArray[np.integer]]:
        """The ids of many texts, one array each, without BOS; all cores work unless TOKENIZERS_PARALLELISM=false."""
        if self._is_bytes:
            return [np.frombuffer(text.encode(), np.uint8).astype(dtype) for text in texts]
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=dtype) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ids have none, and bytes that are not UTF-8 become U+FFFD."""
        if self._token_bytes is None:
            return self._inner.decode([int(i) for i in ids], skip_special_tokens=True)
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, exactly, for byte-level tokenizers; for others, those of `decode`.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if self._token_bytes is None:
            return self.decode(ids).encode()
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} lies outside the vocabulary [0, {self.vocab_size})")
        return b"".join([self._token_bytes[i] for i in ids])

    def stream(self) -> TextStream:
        """A decoder that takes one id at a time."""
        return TextStream(self)

    def save(self, path: str | Path) -> None:
        """Writes a ``tokenizer.json``; `load` of it gives the same fingerprint."""
        Path(path).write_bytes(self.content)

    @property
    def content(self) -> bytes:
        """What stands in a ``tokenizer.json``."""
        return f"{self._json}\n".encode()

    @cached_property
    def _token_bytes(self) -> list[bytes] | None:
        """The bytes of every id, when the tokenizer is byte-level."""
        plan = json.loads(self._json)
        decoder = plan["decoder"] or {}
        if "ByteLevel" not in [d["type"] for d in decoder.get("decoders", [decoder]) if "type" in d]:
            return None
        value = {character: byte for byte, character in enumerate(_byte_characters())}
        table = [b""] * self.vocab_size
        for token, i in self._inner.get_vocab(with_added_tokens=False).items():
            if all(c in value for c in token):
                table[i] = bytes(value[c] for c in token)
        for added in plan["added_tokens"]:  # written in plain characters, unlike the rest
            table[added["id"]] = b"" if added["special"] else added["content"].encode()
        return table


class TextStream:
    """Turns ids into text as they come, holding back a character until its last byte is there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Tokenizers that are not byte-level decode with their neighbours in view; the library knows how.
        self._library = decoders.DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        if self._tokenizer._token_bytes is not None:
            return self._utf8.decode(self._tokenizer.decode_bytes([token]))
        text = self._library.step(self._tokenizer._inner, int(token))
        self._held = [] if text else [*self._held, token]
        return text or ""

    def finish(self) -> str:
        """What remains; an incomplete character becomes U+FFFD."""
        held, self._held = self._held, []
        return self._utf8.decode(b"", final=True) + (self._tokenizer.decode(held) if held else "")


def _find_bos(inner: tokenizers.Tokenizer, file: Path, in_folder: bool) -> str:
    """What a tokenizer says starts a text: its folder's configuration, its template, or a well-known name."""
    known = inner.get_vocab(with_added_tokens=True)
    config = file.with_name("tokenizer_config.json")
    named: list[str] = []
    if in_folder and config.is_file():
        try:
            bos = json.loads(config.read_text(encoding="utf-8")).get("bos_token")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"cannot read {config}: {error}") from None
        named.append(bos.get("content", "") if isinstance(bos, dict) else bos or "")
    processor = json.loads(inner.to_str())["post_processor"] or {}
    for step in processor.get("processors", [processor]):
        for part in (step.get("single") or [])[:1] if step.get("type") == "TemplateProcessing" else []:
            named.append(part.get("SpecialToken", {}).get("id", ""))
    for bos in (*named, *_KNOWN_BOS):
        if bos in known:
            return bos
    raise UserError(
        f"the tokenizer {file} has no token that starts a document; add one of {', '.join(_KNOWN_BOS)}"
    )


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2): itself where it prints, else U+0100 on."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others: Iterator[int] = iter(range(256, 512))
    return [chr(byte) if byte in printing else chr(next(others)) for byte in range(256)]


def _bytes_tokenizer() -> tokenizers.Tokenizer:
    """BPE without merges over the 256 byte symbols in byte order: id == byte; BOS is 256."""
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(_byte_characters())}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def _is_bytes(plan: dict[str, Any]) -> bool:
    """Whether a tokenizer gives exactly the bytes of a text, so that encoding needs no library."""
    model, before = plan["model"], plan["pre_tokenizer"] or {}
    return (
        model["type"] == "BPE"
        and not model["merges"]
        and model["vocab"] == {c: i for i, c in enumerate(_byte_characters())}
        and (before.get("type"), before.get("add_prefix_space")) == ("ByteLevel", False)
        and plan["normalizer"] is None
        and len(plan["added_tokens"]) == 1
    )
