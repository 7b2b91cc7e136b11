"""The fast encoder gives the ids of `tokenizers`, or leaves a text or a tokenizer to it."""

import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from retnet.data import Tokenizer
from retnet.data.byte_level import byte_characters
from retnet.data.fast_bpe import _OTHER_PATTERNS, FastBpe
from tests.helpers.fast import few_fast

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
    mixed = ["".join(rng.choices(WORDS, k=rng.randrange(60))) for _ in range(150)]
    letters = [chr(c) for c in (*range(0xD800), *range(0xE000, sys.maxunicode + 1))]
    return mixed + ["".join(rng.choices(letters, k=200)) for _ in range(50)]


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


@pytest.mark.parametrize("pattern", few_fast([None, *_OTHER_PATTERNS], None))
def test_ids_are_those_of_tokenizers_on_any_characters(texts, pattern):
    tokenizer = trained(texts, pattern)
    fast = FastBpe.of(plan_of(tokenizer))
    texts = [*texts, "", "a\0b", "", "a "]  # the second holds what is put between texts
    found = fast.encode(texts)
    assert sum(ids is not None for ids in found) > 150
    assert found[-3] is None
    for text, ids in zip(texts, found, strict=True):
        assert ids is None or ids.tolist() == tokenizer.encode(text)
    assert fast.encode([]) == []
    together = tokenizer.encode_batch([*texts, "word " * 200_000])
    assert [ids.tolist() for ids in together[:-1]] == [tokenizer.encode(text) for text in texts]


def test_threads_make_one_encoder(texts, monkeypatch):
    tokenizer, made = trained(texts), []
    monkeypatch.setattr("retnet.data.tokenizer._WORTH_IT", 1)
    monkeypatch.setattr(FastBpe, "of", lambda plan: (made.append(plan), time.sleep(0.05))[1])
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(tokenizer.encode_batch, [["word"]] * 4))) == 4
    assert len(made) == 1


@pytest.mark.slow
def test_every_character_is_divided_alike_or_left():
    """Whatever tables of Unicode the two libraries have; planes without characters are left out."""
    tokenizer = trained(["a b 1"])
    fast = FastBpe.of(plan_of(tokenizer))
    every = [chr(c) for c in (*range(0xD800), *range(0xE000, 0x33480), *range(0xE0000, 0xE01F0))]
    kept = [c for c in every if not fast._left.search(c)]
    assert len(kept) > len(every) - 20_000
    text = "".join(f"a{c}1 " for c in kept)
    (found,) = fast.encode([text])
    assert found.tolist() == tokenizer.encode(text)


def test_what_a_token_does_not_tell_is_left_to_tokenizers(texts):
    plan = plan_of(trained(["abc abc abc"]))
    vocab = {c: i for i, c in enumerate(sorted(BYTE_OF))}

    def changed(merges, **more):
        tokens = vocab | {"".join(m): 256 + i for i, m in enumerate(merges)}
        return {**plan, "model": {**plan["model"], "vocab": tokens, "merges": merges, **more}}

    (found,) = FastBpe.of(changed([["a", "b"], ["ab", "c"]])).encode(["abc"])
    assert found.tolist() == [257]
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
    before, fast, after = FastBpe.of(plan_of(tokenizer)).encode(["a b", text, "b  "])
    assert fast is None or fast.tolist() == tokenizer.encode(text)
    assert (before.tolist(), after.tolist()) == (tokenizer.encode("a b"), tokenizer.encode("b  "))
