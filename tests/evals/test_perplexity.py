import json
import math
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from retnet.data import Tokenizer
from retnet.evals.corpus import Corpus
from retnet.evals.perplexity import measure
from retnet.evals.readers import CachedReader, RecurrentReader
from retnet.mixers import MIXERS
from retnet.model import LanguageModel, ModelConfig
from retnet.settings import UserError
from tests.evals.by_hand import by_hand, tiny_llama, words
from tests.helpers.fast import few_fast

BATCHES = [1, 30, 8192]  # from everything piece by piece to everything at once


@pytest.fixture
def corpus(tmp_path, documents):
    lines = [json.dumps({"text": text}) for text in documents]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines) + "\n")
    return Corpus([str(tmp_path / "documents.jsonl")])


def check(measured, logits_of, tokenizer, documents, tolerance):
    """Every number of every result against the documents read one window at a time."""
    tokens = np.array([len(tokenizer.encode(text)) for text in documents])
    bytes_ = np.array([len(text.encode()) for text in documents])
    assert (measured.documents, measured.tokens) == (len(documents), tokens.sum())
    assert measured.bytes == bytes_.sum()
    for result in measured.results:
        nats, buckets = by_hand(logits_of, tokenizer, documents, result.length)
        loss = nats.sum() / tokens.sum()
        assert result.refused is None
        assert result.nats_per_token.value == pytest.approx(loss, rel=tolerance)
        assert result.perplexity.value == pytest.approx(math.exp(loss), rel=10 * tolerance)
        bits = nats.sum() / math.log(2) / bytes_.sum()
        assert result.bits_per_byte.value == pytest.approx(bits, rel=tolerance)
        spread = nats - loss * tokens
        error = math.sqrt(len(nats) / (len(nats) - 1) * (spread**2).sum()) / tokens.sum()
        assert result.nats_per_token.standard_error == pytest.approx(error, rel=1e-4)
        assert len(result.by_context) == len(buckets)
        for row in result.by_context:
            want, count = buckets[math.ceil(math.log2(row.greatest))]
            assert row.tokens == count
            assert row.nats_per_token == pytest.approx(want / count, rel=10 * tolerance)


@pytest.mark.parametrize("batch_tokens", few_fast(BATCHES))
def test_every_cut_and_batch_gives_the_windows_read_alone(
    batch_tokens, corpus, model, byte_tokenizer, documents
):
    reader = RecurrentReader(model, batch_tokens)
    some = 4 if batch_tokens == 1 else len(documents)  # a call of the model for every token takes its time
    measured = measure(reader, byte_tokenizer, corpus, lengths=(1, 7, 64, 10_000), max_documents=some)
    check(measured, model, byte_tokenizer, documents[:some], 1e-10)


@pytest.mark.parametrize("name", few_fast(MIXERS, "retention"))
def test_every_mixer(name, corpus, byte_tokenizer, documents):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=257, d_model=32, num_layers=1, mixer=MIXERS[name].Config())
    model = LanguageModel(config).eval()
    measured = measure(
        RecurrentReader(model, 200), byte_tokenizer, corpus, lengths=(33, 4096), max_documents=5
    )
    check(measured, model, byte_tokenizer, documents[:5], 1e-4)


def test_a_vocabulary_of_words(corpus, model, documents):
    """Tokens of several bytes: bits per byte are of the text's bytes."""
    tokenizer = Tokenizer.train(documents, 290)
    torch.manual_seed(0)
    words_model = LanguageModel(ModelConfig(vocab_size=300, d_model=16, num_layers=1)).double().eval()
    measured = measure(RecurrentReader(words_model, 40), tokenizer, corpus, lengths=(9,))
    assert measured.tokens < measured.bytes / 1.2
    check(measured, words_model, tokenizer, documents, 1e-10)


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(257, 4096).double().eval()


@pytest.mark.parametrize("batch_tokens", few_fast([30, 8192], 30))
def test_a_model_with_a_cache(batch_tokens, corpus, llama, byte_tokenizer, documents):
    reader = CachedReader(llama, 257, 4096, batch_tokens)
    measured = measure(reader, byte_tokenizer, corpus, lengths=(7, 3000))
    check(measured, lambda tokens: llama(tokens).logits, byte_tokenizer, documents, 1e-9)


@pytest.mark.parametrize("batch_tokens", few_fast([7, 8192], 8192))
def test_what_a_cache_cannot_hold_is_refused_and_the_rest_is_not(
    batch_tokens, corpus, llama, byte_tokenizer, documents
):
    reader = CachedReader(llama, 257, 100, batch_tokens)
    short, exact, long, carried = measure(reader, byte_tokenizer, corpus, lengths=(64, 100, 101)).results
    nats, _ = by_hand(lambda tokens: llama(tokens).logits, byte_tokenizer, documents, 100)
    assert short.refused is None
    assert exact.nats_per_token.value == pytest.approx(nats.sum() / sum(len(d.encode()) for d in documents))
    for result in (long, carried):
        assert "document 4" in result.refused
        assert "the model holds 100" in result.refused
        assert result.nats_per_token is result.perplexity is None


def test_a_model_without_a_cache_is_read_as_far_as_one_batch_goes(corpus, llama, byte_tokenizer):
    class Cacheless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama

        def forward(self, **words):
            return SimpleNamespace(logits=self.inner(**words).logits)

    reader = CachedReader(Cacheless(), 257, None, 64)
    short, carried = measure(reader, byte_tokenizer, corpus, lengths=(64,)).results
    assert short.refused is None
    assert "document 4 is too long" in carried.refused
    assert "no cache" in carried.refused


def test_an_interval_needs_two_documents_and_lies_around_the_value(corpus, model, byte_tokenizer):
    reader = RecurrentReader(model)
    (one,) = measure(reader, byte_tokenizer, corpus, modes=("carried",), max_documents=1).results
    assert one.nats_per_token.low is one.perplexity.low is None
    (all_,) = measure(reader, byte_tokenizer, corpus, modes=("carried",)).results
    assert all_.perplexity.low < all_.perplexity.value < all_.perplexity.high
    assert all_.perplexity.low == pytest.approx(math.exp(all_.nats_per_token.low))


def test_the_first_documents_only(corpus, model, byte_tokenizer, documents):
    measured = measure(RecurrentReader(model), byte_tokenizer, corpus, lengths=(64,), max_documents=4)
    check(measured, model, byte_tokenizer, documents[:4], 1e-10)


class Counting:
    """Reads nothing, quickly; remembers the most tokens it was given at once."""

    batch_tokens, piece, limit, widest = 2048, 1000, 6000, 0

    def score(self, sequences):
        self.widest = max(self.widest, sum(map(len, sequences)) - len(sequences))
        return [np.ones(len(sequence) - 1) for sequence in sequences]

    def carry(self, sequence, state):
        self.widest = max(self.widest, len(sequence) - 1)
        return np.ones(len(sequence) - 1), (state or 0) + len(sequence) - 1


@pytest.mark.slow
def test_a_document_of_any_length_in_constant_memory(tmp_path, byte_tokenizer):
    """Twice the text takes no more memory, and a model is never given much at once."""
    peaks = []
    for repeats in (1, 2):
        file = tmp_path / f"{repeats}.txt"
        file.write_text(words(400) * 1000 * repeats)
        reader = Counting()
        tracemalloc.start()
        measured = measure(reader, byte_tokenizer, Corpus([str(file)]), lengths=(512, 5000))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert measured.tokens == measured.bytes == file.stat().st_size > 2e6 * repeats
        assert reader.widest < 2048 + 512
        *windows, carried = measured.results
        assert [result.nats_per_token.value for result in windows] == [1, 1]
        assert carried.refused  # and what it cannot read does not pile up
    assert peaks[1] < peaks[0] + 1e6


def test_mistakes_end_in_one_sentence(corpus, model, byte_tokenizer, tmp_path):
    reader = RecurrentReader(model)
    with pytest.raises(UserError, match="unknown mode 'window'; did you mean 'windows'"):
        measure(reader, byte_tokenizer, corpus, modes=("window",))
    with pytest.raises(UserError, match="a window has 0 tokens"):
        measure(reader, byte_tokenizer, corpus, lengths=(0,))
    with pytest.raises(UserError, match="nothing to measure"):
        measure(reader, byte_tokenizer, corpus, lengths=(), modes=("windows",))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": ""}\n{"txt": "x"}\n{\n')
    empty = Corpus([str(tmp_path / "empty.txt"), str(tmp_path / "broken.jsonl")])
    with pytest.raises(
        UserError, match=r"no text to score in .*2 × empty document, 1 × no text, 1 × bad JSON"
    ):
        measure(reader, byte_tokenizer, empty)


def test_damaged_weights_are_named(corpus, byte_tokenizer):
    torch.manual_seed(0)
    damaged = LanguageModel(ModelConfig(vocab_size=257, d_model=8, num_layers=1)).eval()
    with torch.no_grad():
        damaged.norm.weight[0] = math.nan
    with pytest.raises(UserError, match="not a finite number in document 1"):
        measure(RecurrentReader(damaged), byte_tokenizer, corpus)
