"""Tokenizers: bytes, byte-level BPE trained here, or anything the `tokenizers` library reads.

Text never becomes a special id: where a corpus happens to contain the characters of a special token, they are encoded
as the ordinary characters they are. Only the library itself puts the document start (BOS) into a stream.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import DTypeLike, NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from retnet.data.byte_level import byte_characters, bytes_tokenizer, is_bytes
from retnet.data.config import BPE_SIZES
from retnet.data.fast_bpe import FastBpe
from retnet.errors import UserError
from retnet.io import read_text, require_fetched, write_bytes
from retnet.model.text_ends import end_ids

BOS = "<|bos|>"
_CONTEXT = 64  # characters before a text that show that it is no beginning
_WORTH_IT = 1 << 19  # characters of a batch, from which on the fast encoder is made, which takes a second
_LONG = 4096  # characters, which take a millisecond: of more the library lets go of Python's lock, for batches alone
_making = threading.Lock()  # of it: since Python 3.12 each thread would make one
_OTHER_FORMS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
_KNOWN_BOS = (BOS, "<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "[CLS]")


class Tokenizer:
    """Text ↔ token ids.

    Attributes:
        vocab_size: ids lie in [0, vocab_size).
        bos_id: the id that starts every document.
        end_ids: those that end a text: BOS, which begins the next one, and what models of others write at an end (EOS).
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
        plan = json.loads(self._json)
        self.end_ids: tuple[int, ...] = end_ids(plan, self.bos_id)
        self._is_bytes = is_bytes(plan)
        # Unigram models, and words of WordLevel, have special tokens among the others; their names in a text are divided
        special = {token["content"]: token["id"] for token in plan["added_tokens"] if token["special"]}
        special = {
            name: number for name, number in special.items() if not _is_unknown(plan["model"], name, number)
        }
        self._names = [name for name, number in special.items() if self._makes(number, name)]
        if any(len(name) < 2 or special[name] in self.encode(name) for name in self._names):
            raise UserError(
                f"this tokenizer turns the text {self._names[0]!r} into a special token; it cannot be used"
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
            return cls(bytes_tokenizer(), BOS)
        path = Path(os.path.expanduser(spec))
        file = path / "tokenizer.json" if os.path.isdir(path) else path
        if not os.path.isfile(file):
            raise UserError(
                f"no tokenizer {str(spec)!r}: give 'bytes', a tokenizer.json, or a folder that holds one{_other(path)}"
            )
        require_fetched(file)
        text = read_text(file, f"the tokenizer {file}")
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            raise UserError(f"cannot read the tokenizer {file}: {error}{_other(path)}") from None
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

    def encode(self, text: str, before: str = "") -> list[int]:
        """The ids of a text, without BOS.

        Args:
            text: to be encoded.
            before: the end of what it goes on from, if it is no beginning: some tokenizers put a space before a text.

        Raises:
            UserError: the tokenizer has no ids for it.
        """
        if self._is_bytes:
            return list(text.encode())
        found: list[int] = []
        with self._said():
            for part in self._divided(text):
                found += (
                    self._encode_after(before, part) if before and self.marks_beginnings else self._raw(part)
                )
                before = (before + part)[-_CONTEXT:]
        return found

    def encode_batch(
        self, texts: Sequence[str], dtype: DTypeLike = np.int64, before: Sequence[str] = ()
    ) -> list[NDArray[np.integer]]:
        """The ids of many texts, one array each, without BOS; the same, however many and however long they are.

        Args:
            texts: to be encoded.
            dtype: of the arrays.
            before: the end of what each goes on from, see `encode`; empty where none does.

        Raises:
            UserError: the tokenizer has no ids for one of them.
        """
        if self._is_bytes:
            return [np.frombuffer(text.encode(), np.uint8).astype(dtype) for text in texts]
        ends = before or [""] * len(texts)
        alone = [
            len(self._divided(text)) > 1 or bool(end and self.marks_beginnings)
            for text, end in zip(texts, ends, strict=True)
        ]
        whole = [i for i, apart in enumerate(alone) if not apart]
        with _making:
            fast = self._fast if sum(map(len, texts)) >= _WORTH_IT else None
        by_fast = fast.encode([texts[i] for i in whole]) if fast else [None] * len(whole)
        found = {i: ids for i, ids in zip(whole, by_fast, strict=True) if ids is not None}
        left = [i for i in whole if i not in found]
        with self._said():
            encodings = self._inner.encode_batch_fast([texts[i] for i in left], add_special_tokens=False)
        others = {i: encoding.ids for i, encoding in zip(left, encodings, strict=True)}
        others |= {i: self.encode(texts[i], ends[i]) for i, apart in enumerate(alone) if apart}
        return [np.asarray(found[i] if i in found else others[i], dtype) for i in range(len(texts))]

    @cached_property
    def _fast(self) -> FastBpe | None:
        return FastBpe.of(json.loads(self._json))

    def _raw(self, text: str) -> list[int]:
        if len(text) < _LONG:
            found = self._inner.encode(text, add_special_tokens=False)
        else:
            (found,) = self._inner.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = found.ids
        return ids

    def _makes(self, number: int, name: str) -> bool:
        """Whether the model makes a special id of a text that is its name."""
        try:
            return number in self._raw(name)
        except Exception:  # a model that has no ids for it; the library knows no other kind of error
            return False

    def _divided(self, text: str) -> list[str]:
        """A text in parts, none of which holds a name that the model would take for a special token."""
        if not any(name in text for name in self._names):
            return [text]
        starts = {found.start() + 1 for name in self._names for found in re.finditer(re.escape(name), text)}
        return [text[a:b] for a, b in itertools.pairwise([0, *sorted(starts), len(text)])]

    def _encode_after(self, before: str, text: str) -> list[int]:
        """The ids of a text where it stands behind another; alone where a token would reach over both."""
        both, cut = self._inner.encode(before + text, add_special_tokens=False), len(before)
        for number, (start, stop) in enumerate(both.offsets):
            if stop > cut:
                return list(both.ids[number:]) if start >= cut else self._raw(text)
        return []

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token as the tokenizer writes it → its id, special ones among them."""
        return self._inner.get_vocab(with_added_tokens=True)

    @cached_property
    def marks_beginnings(self) -> bool:
        """Whether a text has other tokens at the beginning than behind another text, as where a space is put before it."""
        with self._said():
            return any(
                self._raw(a + b) != self._raw(a) + self._raw(b)
                for a, b in (("a", " a"), ("a", "\na"), ("a", "  a"))
            )

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # the library knows no other
            kind = json.loads(self._json)["model"]["type"]
            raise UserError(f"the tokenizer ({kind}) has no ids for this text: {error}") from None

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

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """A decoder that takes one id at a time; `after` are the ids before those, if it is no beginning."""
        return TextStream(self, after)

    def save(self, path: str | Path) -> None:
        """Writes a ``tokenizer.json``; `load` of it gives the same fingerprint.

        Raises:
            OSError: it cannot be written; what was there before is as it was.
        """
        write_bytes(Path(path), self.content)

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
        value = {character: byte for byte, character in enumerate(byte_characters())}
        table = [b""] * self.vocab_size
        for token, i in self._inner.get_vocab(with_added_tokens=False).items():
            if all(c in value for c in token):
                table[i] = bytes(value[c] for c in token)
        for added in plan["added_tokens"]:  # written in plain characters, unlike the rest
            table[added["id"]] = b"" if added["special"] else added["content"].encode()
        return table


class TextStream:
    """Turns ids into text as they come, holding back a character until its last byte is there.

    Args:
        tokenizer: knows the text of each id.
        after: ids that stand before them, whose text is not given: tokenizers that put a space before a text take it away
            from the first words they decode.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Tokenizers that are not byte-level decode with their neighbours in view; the library knows how.
        self._library = decoders.DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []
        if tokenizer._token_bytes is None:
            for token in after:
                self._library.step(tokenizer._inner, int(token))

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        table = self._tokenizer._token_bytes
        if table is not None:
            known = 0 <= token < len(table)
            return self._utf8.decode(table[token] if known else self._tokenizer.decode_bytes([token]))
        text = self._library.step(self._tokenizer._inner, int(token))
        self._held = [] if text else [*self._held, token]
        return text or ""

    def finish(self) -> str:
        """What remains; an incomplete character becomes U+FFFD."""
        held, self._held = self._held, []
        return self._utf8.decode(b"", final=True) + (self._tokenizer.decode(held) if held else "")


def _other(path: Path) -> str:
    """What to do about a tokenizer that is there in another form."""
    found = [path] if path.is_file() else [path / name for name in _OTHER_FORMS]
    here = next((file.name for file in found if file.is_file() and file.name in _OTHER_FORMS), None)
    if here is None:
        return ""
    return (
        f"; {here} is another form of one, which transformers turns into a tokenizer.json: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _find_bos(inner: tokenizers.Tokenizer, file: Path, in_folder: bool) -> str:
    """What a tokenizer says starts a text: its folder's configuration, its template, or a well-known name; or ends one."""
    known = inner.get_vocab(with_added_tokens=True)
    config = file.with_name("tokenizer_config.json")
    named: list[str] = []
    end = ""
    if in_folder and config.is_file():
        try:
            said = json.loads(read_text(config))
            bos, end = (_content(said.get(name)) for name in ("bos_token", "eos_token"))
        except (ValueError, AttributeError) as error:
            raise UserError(f"cannot read {config}: {error}") from None
        named.append(bos)
    processor = json.loads(inner.to_str())["post_processor"] or {}
    for step in processor.get("processors", [processor]):
        for part in (step.get("single") or [])[:1] if step.get("type") == "TemplateProcessing" else []:
            named.append(part.get("SpecialToken", {}).get("id", ""))
    for bos in (*named, *_KNOWN_BOS, end):
        if bos in known:
            return bos
    raise UserError(
        f"the tokenizer {file} has no token that starts a document; add one of {', '.join(_KNOWN_BOS)}"
    )


def _is_unknown(model: dict[str, Any], name: str, number: int) -> bool:
    """Whether a token is what the model makes of what it does not know."""
    return name == model.get("unk_token") or number == model.get("unk_id")


def _content(token: object) -> str:
    """The text of a special token, as a ``tokenizer_config.json`` writes it."""
    return str((token.get("content") if isinstance(token, dict) else token) or "")
