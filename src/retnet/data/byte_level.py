"""Byte-level vocabularies, as GPT-2's: a character for each byte, and the tokenizer that has no other tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2): itself where it prints, else U+0100 on."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others: Iterator[int] = iter(range(256, 512))
    return [chr(byte) if byte in printing else chr(next(others)) for byte in range(256)]


def bytes_tokenizer() -> tokenizers.Tokenizer:
    """BPE without merges over the 256 byte symbols in byte order: id == byte; BOS is 256."""
    inner = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(byte_characters())}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def is_bytes(plan: dict[str, Any]) -> bool:
    """Whether a tokenizer gives exactly the bytes of a text, so that encoding needs no library."""
    model, before = plan["model"], plan["pre_tokenizer"] or {}
    return (
        model["type"] == "BPE"
        and not model["merges"]
        and model["vocab"] == {c: i for i, c in enumerate(byte_characters())}
        and (before.get("type"), before.get("add_prefix_space")) == ("ByteLevel", False)
        and plan["normalizer"] is None
        and len(plan["added_tokens"]) == 1
    )
