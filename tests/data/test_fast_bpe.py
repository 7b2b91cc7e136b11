"""The fast encoder gives the ids of `tokenizers`, or leaves a text or a tokenizer to it."""

import json
import random
import sys

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from retnet.data import Tokenizer
from retnet.data.byte_level import byte_characters
from retnet.data.fast_bpe import _OTHER_PATTERNS, FastBpe

BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}
WORDS = [
    "the ",
    "naïve",
    "ſ's",
    "'LL",
    "don't",
    "\r\n",
    "\n\n",
    "   ",
    "\t",
    "１２",
    "½",
    "Ⅷ",
    "漢字",
    "🙂🏽",
    "e\u0301",
    "\u00a0",
    "\u2028",
]
WORDS += [
    "<|bos|>",
    "a",
    "1234567",
    "...",
    "\x85",
    "\x1c",
    "\u200b",
    "ﬁ",
    "K",
    "__init__",
    "()",
    "ab" * 40,
    "x" * 300,
]


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    mixed = ["".join(rng.choices(WORDS, k=rng.randrange(60))) for _ in range(400)]
    letters = [chr(c) for c in (*range(0xD800), *range(0xE000, sys.maxunicode + 1))]
    return mixed + ["".join(rng.choices(letters, k=200)) for _ in range(100)]


def plan_of(tokenizer):
    return json.loads(tokenizer._json)


def trained(texts, pattern=None):
    """A BPE as ours, or one that divides texts by another pattern, as Llama 3's."""
    if pattern is None:
        return Tokenizer.train(texts, 1500)
    inner = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    )
    return Tokenizer(inner, "<|begin_of_text|>")


@pytest.mark.parametrize("pattern", [None, *_OTHER_PATTERNS])
def test_ids_are_those_of_tokenizers_on_any_characters(texts, pattern):
    tokenizer = trained(texts, pattern)
    fast = FastBpe.of(plan_of(tokenizer))
    found = [fast.encode(text) for text in texts]
    assert sum(ids is not None for ids in found) > 300
    for text, ids in zip(texts, found, strict=True):
        assert ids is None or ids.tolist() == tokenizer.encode(text)
    together = tokenizer.encode_batch([*texts, "word " * 200_000])
    assert [ids.tolist() for ids in together[:-1]] == [tokenizer.encode(text) for text in texts]


def test_every_character_is_divided_alike_or_left(texts):
    """Whatever tables of Unicode the two libraries have."""
    tokenizer = trained(["a b 1"])
    fast, encode = FastBpe.of(plan_of(tokenizer)), tokenizer._raw
    left = 0
    for start in range(0, sys.maxunicode, 4096):
        here = [chr(c) for c in range(start, start + 4096) if not 0xD800 <= c < 0xE000]
        kept = [c for c in here if fast.encode(c) is not None]
        left += len(here) - len(kept)
        text = "".join(f" a{c}1{c} " for c in kept)
        assert not kept or fast.encode(text).tolist() == encode(text)
    assert left < 20_000


def test_what_a_token_does_not_tell_is_left_to_tokenizers(texts):
    plan = plan_of(trained(["abc abc abc"]))
    vocab = {c: i for i, c in enumerate(sorted(BYTE_OF))}

    def changed(merges, **more):
        tokens = vocab | {"".join(m): 256 + i for i, m in enumerate(merges)}
        return {**plan, "model": {**plan["model"], "vocab": tokens, "merges": merges, **more}}

    assert FastBpe.of(changed([["a", "b"], ["ab", "c"]])).encode("abc").tolist() == [257]
    # bc is joined first, so that no text ever has ab and c: tiktoken would make abc of a and bc
    assert FastBpe.of(changed([["b", "c"], ["a", "b"], ["ab", "c"]])) is None
    for different in ({"dropout": 0.1}, {"continuing_subword_prefix": "##"}, {"type": "Unigram"}):
        assert FastBpe.of(changed([["a", "b"]], **different)) is None
    assert FastBpe.of({**plan, "normalizer": {"type": "NFC"}}) is None
    other = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    assert FastBpe.of({**plan, "pre_tokenizer": other}) is None


def test_a_stretch_of_white_space_that_stops_tiktoken_is_left(texts):
    tokenizer = trained(texts)
    text = " " * 2_000_000 + "x"
    fast = FastBpe.of(plan_of(tokenizer)).encode(text)
    assert fast is None or fast.tolist() == tokenizer.encode(text)
