"""Byte-level BPE by tiktoken: the ids that the `tokenizers` library gives, several times as fast.

tiktoken knows no list of merges: it joins whatever pair makes the token of the lowest rank. That gives the same ids where
every token is reached by one merge alone. `FastBpe.of` makes sure of it for each token of a vocabulary: its bytes, joined by
the merges before its own, must come to the two parts that its own merge names. (A part of a text between two boundaries that
stand in the end is joined as if it stood alone, so whoever meets the bytes of a token in a text meets these two parts.)
Characters that the two libraries' tables of Unicode take for different things are left to `tokenizers`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import normalizers

from retnet.data.byte_level import byte_characters

_MARK = "\0"  # stands between texts, as a special token; texts that have it are left to `tokenizers`
# How a text is divided before merges: GPT-2's pattern, which ByteLevel has, as tiktoken writes it.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_OTHER_PATTERNS = (
    # Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen 2
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


class FastBpe:
    """An encoder of texts that have no special token's name in them.

    Args:
        pattern: by which a text is divided.
        ranks: bytes of each token → its rank, single bytes among them.
        ids: id of each rank.
    """

    def __init__(self, pattern: str, ranks: dict[bytes, int], ids: NDArray[np.uint32]) -> None:
        import tiktoken

        special = {_MARK: len(ranks)}
        self._encoding = tiktoken.Encoding(
            "retnet", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self._ids = np.append(ids, ids[:1])  # of the mark too, whichever
        self._mark = len(ranks)
        self._left = _unlike()

    @classmethod
    def of(cls, plan: dict[str, Any]) -> FastBpe | None:
        """The encoder of a tokenizer, given its JSON; None without tiktoken, or where it may not give the same ids."""
        pattern = _pattern(plan)
        try:
            import tiktoken  # noqa: F401  only whether it is there
        except ImportError:
            return None
        if pattern is None or not all(token["special"] for token in plan["added_tokens"]):
            return None
        found = _ranks(plan["model"])
        return None if found is None else cls(pattern, *found)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32] | None]:
        """The ids of texts, without BOS; None for each that is to be left to `tokenizers`.

        They go to tiktoken as one: each call waits for Python's lock at its end, while other threads work.
        """
        left = [bool(self._left.search(text)) for text in texts]
        chosen = [text for text, apart in zip(texts, left, strict=True) if not apart]
        parts: list[NDArray[np.uint32] | None] = [*self._together(chosen)]
        if not parts:
            parts = [next(iter(self._together([text])), None) for text in chosen]
        found = iter(parts)
        return [None if apart else next(found) for apart in left]

    def _together(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """The ids of each text; nothing at all where tiktoken gives up on one of them."""
        try:
            ranks: NDArray[np.uint32] = self._encoding.encode_to_numpy(
                _MARK.join(texts), allowed_special={_MARK}, disallowed_special=()
            )
        except (
            BaseException
        ) as error:  # what panics in Rust, such as a stretch of a million spaces, is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            return []
        bounds = [-1, *np.flatnonzero(ranks == self._mark).tolist(), len(ranks)]
        ids = self._ids[ranks]
        return [ids[a + 1 : b] for a, b in pairwise(bounds)]


def _pattern(plan: dict[str, Any]) -> str | None:
    """How a tokenizer divides texts; None where that is not by one of the patterns known here alone."""
    model, before = plan["model"], plan["pre_tokenizer"] or {}
    plain = model["type"] == "BPE" and plan["normalizer"] is None
    bare = not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    if not plain or not bare or model.get("byte_fallback"):
        return None
    split, *levels = before.get("pretokenizers") or [before]
    if not levels and _is_level(split, use_regex=True):
        return _GPT2
    found = split.get("pattern", {}).get("Regex") if split.get("type") == "Split" else None
    isolated = (split.get("behavior"), split.get("invert")) == ("Isolated", False)
    alone = len(levels) == 1 and _is_level(levels[0], use_regex=False)
    return found if found in _OTHER_PATTERNS and isolated and alone else None


def _is_level(step: dict[str, Any], *, use_regex: bool) -> bool:
    kind = (step.get("type"), step.get("add_prefix_space"), step.get("use_regex", True))
    return kind == ("ByteLevel", False, use_regex)


def _ranks(model: dict[str, Any]) -> tuple[dict[bytes, int], NDArray[np.uint32]] | None:
    """Bytes of tokens → rank in the order of merges, and their ids; None where a token does not tell its merge."""
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    vocab, merges = model["vocab"], [_pair(merge) for merge in model["merges"]]
    if any(character not in vocab for character in byte_of):
        return None
    ranks = {bytes([byte]): rank for rank, byte in enumerate(sorted(byte_of.values()))}
    ids = [vocab[character] for character, _ in sorted(byte_of.items(), key=lambda item: item[1])]
    if any(character not in byte_of for pair in merges for character in "".join(pair)):
        return None
    order = {(_bytes(a, byte_of), _bytes(b, byte_of)): number for number, (a, b) in enumerate(merges)}
    last = -1
    for left, right in merges:
        whole = _bytes(left + right, byte_of)
        if whole in ranks:  # by another merge, which no text gets to
            continue
        place = order.get(tuple(_joined(whole, ranks)), -1)  # type: ignore[arg-type]  # of two parts, or of none
        if place <= last:
            return None
        last = place
        ranks[whole] = len(ids)
        ids.append(vocab[left + right])
    unreached = model.get("ignore_merges") and any(
        _bytes(token, byte_of) not in ranks for token in vocab if all(c in byte_of for c in token)
    )
    return None if unreached else (ranks, np.array(ids, np.uint32))


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _bytes(token: str, byte_of: dict[str, int]) -> bytes:
    return bytes(byte_of[character] for character in token)


def _joined(text: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The tokens of a text alone, by tiktoken's rule: of all pairs that make a token, the one of the lowest rank."""
    parts = [text[i : i + 1] for i in range(len(text))]
    while len(parts) > 1:
        lowest, at = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(pairwise(parts)))
        if lowest == len(ranks):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


@cache
def _unlike() -> re.Pattern[str]:
    """The characters that `tokenizers` takes for a letter, a number or a space and tiktoken does not, or the other way.

    Each has tables of a Unicode of its own, so newer letters are known to one of them alone. The mark is among them.
    """
    # Unicode keeps letters to the planes 0 to 3, and has marks in plane 14; the others are empty or private
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xF0000)]))
    found = {_MARK}
    for kind in (r"\p{L}+", r"\p{N}+", r"\s+", r"(?i:[sdmtrevl])+"):
        others = normalizers.Replace(tokenizers.Regex(kind), "").normalize_str(
            every
        )  # ten times as fast as a Split
        theirs = np.setdiff1d(_codes(every), _codes(others), assume_unique=True)
        found.update(map(chr, np.setxor1d(theirs, _codes(_kept(kind, every))).tolist()))
    return re.compile(f"[{''.join(map(re.escape, sorted(found)))}]")


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _kept(pattern: str, text: str) -> str:
    """The part of a text that fits a pattern, as tiktoken finds it."""
    import tiktoken

    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=ranks, special_tokens={_MARK: 256})
    kept: str = encoding.decode(encoding.encode_ordinary(text))
    return kept
