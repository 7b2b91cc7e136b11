"""Tokenizers: lossless, deterministic, and never a special id from text."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from retnet.data import DataConfig, Tokenizer, prepare, readers
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


def test_texts_of_other_libraries_models_end_where_these_write_an_end(tmp_path, plain):
    word_level(tmp_path, ["<s>", "</s>", "<|im_end|>", "<a>"])
    assert Tokenizer.load(tmp_path).end_ids == (5, 6, 7)  # that a text begins, and two ends
    assert plain.end_ids == (plain.bos_id,)


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


PROSE = (
    "The quick brown fox jumps over  the lazy dog. It's 12 o'clock,\nsaid Ann;\tand then? Über allen Gipfeln."
)


def with_marks(form):
    """Tokenizers whose tokens hold a mark for the space before them, and that put one before a text."""
    mark, specials = "▁", ["<unk>", "<s>"]
    if form == "Llama 2":  # no pre-tokenizer: merges over the whole text
        inner = Library(models.BPE(unk_token="<unk>", fuse_unk=True))
        inner.normalizer = normalizers.Sequence([normalizers.Prepend(mark), normalizers.Replace(" ", mark)])
        words = Library(models.BPE())
        words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        words.train_from_iterator([PROSE] * 9, trainers.BpeTrainer(vocab_size=120, special_tokens=specials))
        model = json.loads(words.to_str())["model"]
        merges = [tuple(merge) for merge in model["merges"]]
        inner.model = models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True)
        inner.add_special_tokens([AddedToken(token, special=True) for token in specials])
    else:
        unigram = form.startswith("Unigram")
        inner = Library(models.Unigram() if unigram else models.BPE(unk_token="<unk>"))
        scheme = "first" if "first" in form else "always"
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        if "T5" in form:
            inner.normalizer = normalizers.Sequence(
                [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
            )
            split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
            inner.pre_tokenizer = pre_tokenizers.Sequence(split)
        if unigram:
            trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=specials, unk_token="<unk>")
        else:
            trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=specials)
        inner.train_from_iterator([PROSE] * 9, trainer)
    inner.decoder = decoders.Metaspace()
    return Tokenizer(inner, "<s>")


FORMS = ["Llama 2", "BPE, first", "BPE, always", "Unigram, always", "Unigram as T5"]


@pytest.mark.parametrize("form", FORMS)
class TestMarksOfBeginnings:
    def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(self, form, monkeypatch):
        tokenizer, text = with_marks(form), " ".join([PROSE] * 20)
        assert tokenizer.marks_beginnings != (form == "Unigram as T5")  # which marks every word alike
        monkeypatch.setattr(readers, "PIECE", 100)
        before, pieces = zip(*readers.pieces([text]), strict=True)
        assert len(pieces) > 15
        whole = tokenizer.encode(text)
        batch = tokenizer.encode_batch(pieces, np.uint16, before)
        assert np.concatenate(batch).tolist() == whole
        assert [
            i for b, piece in zip(before, pieces, strict=True) for i in tokenizer.encode(piece, b)
        ] == whole
        alone = [i for ids in tokenizer.encode_batch(pieces) for i in ids]
        assert (alone == whole) == (form != "Llama 2")  # the others put no space before one that is there

    def test_prepared_it_is_the_same(self, form, tmp_path, monkeypatch):
        monkeypatch.setattr(readers, "PIECE", 100)
        with_marks(form).save(tmp_path / "tokenizer.json")
        (tmp_path / "a.txt").write_text(" ".join([PROSE] * 20))
        (tmp_path / "b.txt").write_text(PROSE)
        config = DataConfig(
            corpus=str(tmp_path / "a.txt"),
            validation=str(tmp_path / "b.txt"),
            tokenizer=str(tmp_path / "tokenizer.json"),
            cache=str(tmp_path / "cache"),
        )
        shards = prepare(config).train
        found = shards.tokens(0, shards.num_tokens).tolist()
        tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
        assert found == [1, *tokenizer.encode(" ".join([PROSE] * 20))]

    def test_what_follows_a_prompt_keeps_its_space(self, form):
        tokenizer = with_marks(form)
        ids = tokenizer.encode("The quick brown fox")
        for cut in range(1, len(ids)):
            stream = tokenizer.stream(ids[:cut])
            text = "".join(map(stream.push, ids[cut:])) + stream.finish()
            assert tokenizer.decode(ids[:cut]) + text == tokenizer.decode(ids)


@pytest.mark.parametrize("form", FORMS)
def test_names_of_special_tokens_in_a_text_are_text(form):
    """A Unigram model has them among its pieces, and would take them whatever the library is told."""
    tokenizer = with_marks(form)
    text = "say <s> and <s><s>, then </s> <unk"
    ids = tokenizer.encode(text)
    assert tokenizer.bos_id not in ids
    assert tokenizer.encode_batch([text, PROSE])[0].tolist() == ids
    assert (
        tokenizer.encode(" and <s>", "say")
        == tokenizer.encode_batch([" and <s>"], before=["say"])[0].tolist()
    )


def test_a_text_that_no_place_divides_loses_nothing(monkeypatch):
    tokenizer, text = with_marks("BPE, always"), "thequickbrownfox" * 30
    monkeypatch.setattr(readers, "PIECE", 100)
    before, pieces = zip(*readers.pieces([text]), strict=True)
    found = [i for ids in tokenizer.encode_batch(pieces, before=before) for i in ids]
    assert tokenizer.decode(found).replace(" ", "") == text


def test_another_form_of_a_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15")
    for spec in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(
            UserError, match=r"tokenizer\.model is another form of one, which transformers turns"
        ):
            Tokenizer.load(spec)


def test_a_text_the_tokenizer_has_no_ids_for_is_said(tmp_path):
    inner = Library(models.WordLevel({"a": 0, "<s>": 1}))  # no token for unknown words
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(inner, "<s>")
    assert tokenizer.encode("a a") == [0, 0]
    for call in (lambda: tokenizer.encode("b"), lambda: tokenizer.encode_batch(["a", "b"])):
        with pytest.raises(UserError, match=r"the tokenizer \(WordLevel\) has no ids for this text"):
            call()
