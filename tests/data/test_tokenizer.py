"""Tokenizers: lossless, deterministic, and never a special id from text."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from retnet.data import Tokenizer
from retnet.data.tokenizer import BOS
from retnet.settings import UserError

SAMPLE = [
    "The quick brown fox. Ünïcödé, 日本語, 🙂🙂!\n\n\tdef f(x):\r\n    return x\n",
    f"in text: {BOS} <|bos|>",
] * 20
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from(SAMPLE)


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train(SAMPLE, 320)


@pytest.fixture(scope="module")
def plain():
    return Tokenizer.load("bytes")


def test_bytes_are_their_own_ids(plain):
    assert (plain.vocab_size, plain.bos_id) == (257, 256)
    assert plain.encode("aé\n") == list("aé\n".encode())
    assert plain.decode_bytes(range(256)) == bytes(range(256))


@settings(deadline=None)
@given(text=TEXT)
def test_the_short_cut_for_bytes_gives_what_the_library_gives(plain, text):
    assert plain.encode(text) == plain._inner.encode(text, add_special_tokens=False).ids


@settings(deadline=None)
@given(text=TEXT)
@pytest.mark.parametrize("name", ["plain", "bpe"])
def test_round_trip_is_lossless(request, name, text):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.bos_id not in ids
    (batched,) = tokenizer.encode_batch([text], np.uint16)
    assert batched.tolist() == ids
    assert batched.dtype == np.uint16


@settings(deadline=None)
@given(text=TEXT)
@pytest.mark.parametrize("name", ["plain", "bpe"])
def test_streaming_gives_the_same_text_and_never_half_a_character(request, name, text):
    tokenizer = request.getfixturevalue(name)
    stream = tokenizer.stream()
    pushed = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pushed) + stream.finish() == text
    assert "\ufffd" in text or "\ufffd" not in "".join(pushed)


def test_streaming_bytes_that_are_no_text(plain):
    stream = plain.stream()
    assert [stream.push(b) for b in b"\xe6\x97"] == ["", ""]
    assert stream.push(ord("x")) == "\ufffdx"
    assert stream.push(0xE6) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_special_tokens_have_no_text(plain, bpe):
    for tokenizer in (plain, bpe):
        assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.bos_id]) == "hi"
        assert tokenizer.stream().push(tokenizer.bos_id) == ""


def test_ids_outside_the_vocabulary_are_refused(plain):
    for wrong in (-1, 257):
        with pytest.raises(ValueError, match=f"token id {wrong} .*257"):
            plain.decode([wrong])


def test_training_is_deterministic_and_bounded(bpe):
    assert Tokenizer.train(SAMPLE, 320).fingerprint == bpe.fingerprint
    assert bpe.vocab_size == 320
    assert Tokenizer.train(SAMPLE, 321).fingerprint != bpe.fingerprint
    assert len(bpe.encode(SAMPLE[0])) < len(SAMPLE[0].encode())
    with pytest.raises(UserError, match="at least 257"):
        Tokenizer.train(SAMPLE, 256)


@pytest.mark.parametrize("name", ["plain", "bpe"])
def test_saved_and_loaded_it_is_the_same(request, tmp_path, name):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path / "tokenizer.json")
    for spec in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        again = Tokenizer.load(spec)
        assert again.fingerprint == tokenizer.fingerprint
        assert (again.bos_id, again.vocab_size) == (tokenizer.bos_id, tokenizer.vocab_size)
        assert again.encode(SAMPLE[1]) == tokenizer.encode(SAMPLE[1])


def word_level(path, specials, **config):
    """A tokenizer as others make them: not byte-level, with special tokens of its own."""
    words = ["[UNK]", "hello", "world", "<a>", "<b>", "<s>"]
    inner = Library(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens([AddedToken(token, special=True) for token in specials])
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    inner.save(str(path / "tokenizer.json"))
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_folder_says_what_its_document_start_is(tmp_path):
    word_level(tmp_path, ["<a>", "<b>", "<s>"], bos_token={"content": "<b>"})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.bos_id == 4
    tokenizer.save(tmp_path / "saved.json")
    again = Tokenizer.load(tmp_path / "saved.json")
    assert (again.bos_id, again.fingerprint) == (4, tokenizer.fingerprint)
    word_level(tmp_path, ["<a>", "<b>", "<s>"], bos_token=None)
    assert Tokenizer.load(tmp_path).bos_id == 5  # the well-known name
    assert Tokenizer.load(tmp_path).fingerprint != tokenizer.fingerprint


def test_truncation_padding_and_special_words_of_others_do_no_harm(tmp_path):
    word_level(tmp_path, ["<a>", "<s>"])
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("hello world hello world") == [1, 2, 1, 2]
    assert not {3, 5} & set(tokenizer.encode("hello <a> <s>"))
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in [1, 2]) + stream.finish() == tokenizer.decode([1, 2])


def test_what_cannot_be_loaded_is_said(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer 'nowhere'.*tokenizer\.json"):
        Tokenizer.load("nowhere")
    with pytest.raises(UserError, match="no tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path)
    Library(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"no token that starts a document.*<s>"):
        Tokenizer.load(tmp_path)
