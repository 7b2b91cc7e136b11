"""A tokenizer learned from the text it is for: from which part of it, once, and what is refused."""

from dataclasses import replace
from importlib import import_module

import pytest

from retnet.data import DataConfig, Tokenizer, prepare, tokenizer_text
from retnet.data.split import share, text_share
from retnet.settings import UserError

DOCUMENTS = [f"the document {i} of many documents, and the words of document {i} " * 3 for i in range(100)]
HELD_OUT = [text for text in DOCUMENTS if text_share(text) < 0.2]
KEPT = [text for text in DOCUMENTS if text_share(text) >= 0.2]


@pytest.fixture
def learned(config, corpus, jsonl):
    """A corpus of records, and the configuration that learns 300 tokens from four fifths of it."""
    jsonl(corpus / "a.jsonl", DOCUMENTS)
    return replace(config, tokenizer="bpe:300", validation_fraction=0.2)


def test_what_is_held_out_does_not_show(learned):
    prepared = prepare(learned)
    assert HELD_OUT
    assert prepared.tokenizer.fingerprint == Tokenizer.train(KEPT, 300).fingerprint
    assert prepared.tokenizer.fingerprint != Tokenizer.train(DOCUMENTS, 300).fingerprint
    assert prepared.manifest.vocab_size == 300
    assert prepared.train.num_tokens < prepared.train.num_bytes / 2
    assert prepared.validation.num_documents == len(HELD_OUT)


def test_nor_does_a_validation_corpus_of_its_own(learned, jsonl, tmp_path):
    other = jsonl(tmp_path / "v.jsonl", ["zebra " * 1000])
    prepared = prepare(replace(learned, validation=str(other)))
    assert prepared.tokenizer.fingerprint == Tokenizer.train(DOCUMENTS, 300).fingerprint


def test_files_of_text_are_split_by_name(config, corpus):
    texts = {f"{i}.txt": f"file {i} with words and more words\n" * 9 for i in range(40)}
    for name, text in texts.items():
        (corpus / name).write_text(text)
    prepared = prepare(replace(config, tokenizer="bpe:280", validation_fraction=0.3))
    kept = [texts[name] for name in sorted(texts) if share(name) >= 0.3]
    assert 0 < len(kept) < 40
    assert prepared.tokenizer.fingerprint == Tokenizer.train(kept, 280).fingerprint


def test_it_is_learned_once(learned, monkeypatch):
    """Also when the first one to prepare is stopped right after learning: its tokens must not be of two tokenizers."""
    seen = []

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(import_module("retnet.data.prepare"), "Segments", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(learned, on_progress=seen.append)
    assert seen[0].words == "learning the tokenizer"
    assert 0 < seen[0].bytes_read < seen[0].bytes_total
    monkeypatch.setattr(Tokenizer, "train", None)
    prepared = prepare(learned)
    assert prepared.manifest.vocab_size == 300
    assert prepare(learned).directory == prepared.directory


def test_another_size_is_another_folder(learned):
    assert prepare(learned).directory != prepare(replace(learned, tokenizer="bpe:301")).directory


def test_no_more_is_read_than_it_takes(learned, monkeypatch):
    monkeypatch.setattr(tokenizer_text, "MAX_BYTES", 2000)
    few = [text for i, text in enumerate(KEPT) if sum(len(t) for t in KEPT[:i]) < 2000]
    assert 5 < len(few) < len(KEPT)
    assert prepare(learned).tokenizer.fingerprint == Tokenizer.train(few, 300).fingerprint


def test_problems_are_told_once(learned, corpus):
    with open(corpus / "a.jsonl", "a") as file:
        file.write("{\n")
    seen = []
    prepare(learned, on_problem=seen.append)
    assert [problem.kind for problem in seen] == ["bad JSON"]


@pytest.mark.parametrize("size", ["", "x", "-5", "256", "٣٠٠", "4e3", "99999999999"])
def test_sizes_that_are_none(size):
    with pytest.raises(UserError, match=f"tokenizer 'bpe:{size}' has no size from 257"):
        DataConfig(tokenizer=f"bpe:{size}")


def test_a_prepared_folder_has_its_own(learned):
    first = prepare(learned)
    with pytest.raises(UserError, match="another tokenizer"):
        prepare(replace(learned, corpus=str(first.directory)))
