"""Batches: a function of seed and position, every token a target exactly once, boundaries where documents begin."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.data import IGNORED, Batches
from retnet.settings import UserError

BOS = 256
RANDOM = np.random.default_rng(0)
TEXTS = ["".join(RANDOM.choice(list("abcdefgh"), n)) for n in RANDOM.integers(1, 40, 35)]
STREAM = [token for text in TEXTS for token in [BOS, *text.encode()]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The documents of TEXTS in many small shards, so that windows and documents cross them."""
    import json

    from retnet.data import DataConfig, prepare

    folder = tmp_path_factory.mktemp("batches")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "v.txt").write_text("v")
    config = DataConfig(corpus=str(folder / "a.jsonl"), validation=str(folder / "v.txt"), cache=str(folder))
    prepared = prepare(config, shard_tokens=100)
    assert len(prepared.manifest.train.shards) > 5
    return prepared.train


def equal(a, b):
    assert a.documents == b.documents
    for x, y in zip(a[:3], b[:3], strict=True):
        assert torch.equal(x, y)


def test_the_stream(shards):
    assert shards.tokens(0, shards.num_tokens).tolist() == STREAM
    assert shards.tokens(-5, 7).tolist() == STREAM[:7]
    assert shards.tokens(len(STREAM) - 3, len(STREAM) + 9).tolist() == STREAM[-3:]
    assert shards.tokens(9, 9).tolist() == shards.tokens(len(STREAM), len(STREAM) + 1).tolist() == []


@settings(deadline=None, max_examples=40)
@given(start=st.integers(0, len(STREAM)), length=st.integers(0, 400))
def test_any_slice_of_the_stream(shards, start, length):
    assert shards.tokens(start, start + length).tolist() == STREAM[start : start + length]


@settings(deadline=None, max_examples=30)
@given(
    seq_len=st.integers(3, 1500),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 9),
    epochs=st.integers(1, 3),
)
def test_each_epoch_has_every_window_once(shards, seq_len, batch_size, seed, epochs):
    batches = Batches(shards, seq_len=seq_len, batch_size=batch_size, seed=seed)
    rows = []
    for position in range(-(-epochs * batches.num_windows // batch_size)):
        batch = batches.batch(position)
        assert batch.tokens.shape == batch.targets.shape == (batch_size, seq_len)
        rows += [tuple(row) for row in batch.targets.tolist()]
    windows = batches.num_windows
    expected = sorted(targets_of(window, seq_len) for window in range(windows))
    for epoch in range(epochs):
        assert sorted(rows[epoch * windows : (epoch + 1) * windows]) == expected


def targets_of(window, T):
    targets = STREAM[window * T + 1 : window * T + T + 1]
    return (*targets, *[IGNORED] * (T - len(targets)))


@settings(deadline=None, max_examples=40)
@given(seq_len=st.integers(1, 1500), batch_size=st.integers(1, 9))
def test_in_order_every_token_but_the_first_is_a_target_once(shards, seq_len, batch_size):
    batches = Batches(shards, seq_len=seq_len, batch_size=batch_size, seed=0)
    found = list(batches.in_order())
    assert len(found) == len(batches)
    assert {tuple(batch.tokens.shape) for batch in found} == {(batch_size, seq_len)}
    targets = [target for batch in found for target in batch.targets.flatten().tolist()]
    assert [target for target in targets if target != IGNORED] == STREAM[1:]
    tokens = [token for batch in found for token in batch.tokens.flatten().tolist()]
    assert tokens[: len(STREAM) - 1] == STREAM[:-1]


def owners():
    return [document for document, text in enumerate(TEXTS) for _ in range(len(text) + 1)]


@settings(deadline=None, max_examples=60)
@given(seq_len=st.integers(1, 1500), batch_size=st.integers(1, 6), position=st.integers(0, 50))
def test_no_segment_crosses_a_document_or_a_row(shards, seq_len, batch_size, position):
    batches = Batches(shards, seq_len=seq_len, batch_size=batch_size, seed=3)
    owner = owners()
    ordered = list(batches.in_order())
    for first, batch in (
        (None, batches.batch(position)),
        (position % len(ordered), ordered[position % len(ordered)]),
    ):
        cu, tokens = batch.cu_seqlens, batch.tokens.flatten()
        assert cu.dtype == torch.int32
        assert cu[0] == 0
        assert cu[-1] == tokens.numel() == batch_size * seq_len
        assert (cu.diff() > 0).all()
        assert set(range(0, tokens.numel(), seq_len)) <= set(cu.tolist())
        assert len(batch.documents) == len(cu) - 1
        for start, stop, document in zip(cu[:-1].tolist(), cu[1:].tolist(), batch.documents, strict=True):
            segment = tokens[start:stop].tolist()
            if document == -1:
                assert set(segment) == {BOS}
                assert set(batch.targets.flatten()[start:stop].tolist()) == {IGNORED}
                continue
            assert BOS not in segment[1:]
            stream = [BOS, *TEXTS[document].encode()]
            assert any(stream[i : i + len(segment)] == segment for i in range(len(stream)))
            if first is not None:  # in order, the place in the stream is known
                place = first * tokens.numel() + start
                assert {owner[i] for i in range(place, place + len(segment))} == {document}


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_any_number_of_ranks_sees_the_same_batch(shards, world_size):
    batches = Batches(shards, seq_len=16, batch_size=6, seed=5)
    again = Batches(shards, seq_len=16, batch_size=6, seed=5)
    share = 6 // world_size
    for position in (17, 0, 400):
        whole = batches.batch(position)
        equal(whole, again.batch(position))
        parts = [batches.batch(position, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
        assert sum((part.documents for part in parts), ()) == whole.documents
        ends = torch.cat([part.cu_seqlens[1:] + rank * share * 16 for rank, part in enumerate(parts)])
        assert torch.equal(ends.int(), whole.cu_seqlens[1:])
    in_order = [list(batches.in_order(rank=rank, world_size=world_size)) for rank in range(world_size)]
    for whole, *parts in zip(batches.in_order(), *in_order, strict=True):
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)


def test_seeds_and_epochs_differ(shards):
    one, two = (Batches(shards, seq_len=8, batch_size=4, seed=seed) for seed in (0, 1))
    assert not torch.equal(one.batch(0).tokens, two.batch(0).tokens)
    assert not torch.equal(one.batch(0).tokens, next(one.in_order()).tokens)
    single = Batches(shards, seq_len=8, batch_size=1, seed=0)
    rows = [single.batch(position).tokens for position in range(2 * len(single))]
    same = [torch.equal(a, b) for a, b in zip(rows[: len(single)], rows[len(single) :], strict=True)]
    assert sum(same) < len(same) / 4


def test_a_corpus_shorter_than_a_window_is_padded(make_shards):
    batches = Batches(make_shards(["ab"]), seq_len=6, batch_size=2, seed=0)
    (batch,) = batches.in_order()
    assert batch.tokens.tolist() == [[BOS, 97, 98, BOS, BOS, BOS], [BOS] * 6]
    assert batch.targets.tolist() == [[97, 98, *[IGNORED] * 4], [IGNORED] * 6]
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 12]
    assert batch.documents == (0, -1, -1)
    assert batches.batch(7).targets.tolist() == [[97, 98, *[IGNORED] * 4]] * 2


def test_the_last_document_ends_and_the_next_begins(make_shards):
    batches = Batches(make_shards(["ab", "c"]), seq_len=2, batch_size=2, seed=0)
    (batch,) = batches.in_order()
    assert batch.tokens.tolist() == [[BOS, 97], [98, BOS]]
    assert batch.targets.tolist() == [[97, 98], [BOS, 99]]  # BOS is the end of text
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 4]
    assert batch.documents == (0, 0, 1)


def test_wrong_sizes_are_said(shards):
    for wrong in ({"seq_len": 0, "batch_size": 1}, {"seq_len": 1, "batch_size": 0}):
        with pytest.raises(UserError, match="at least 1, got 0"):
            Batches(shards, seed=0, **wrong)
    batches = Batches(shards, seq_len=4, batch_size=4, seed=0)
    with pytest.raises(UserError, match="batch_size 4 cannot be divided evenly over 3"):
        batches.batch(0, world_size=3)
    for wrong in ({"position": -1}, {"position": 0, "rank": 1}):
        with pytest.raises(ValueError, match="position"):
            batches.batch(**wrong)
