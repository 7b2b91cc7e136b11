"""Mixtures: exact shares, and an order in which neither ranks nor a ramp of the batch nor a new phase show."""

import json
from collections import Counter
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.data import IGNORED, Batches, DataConfig, Mixture, prepare
from retnet.data.config import MixturePhase
from retnet.data.mixture import Phase
from retnet.settings import UserError, build, dump
from retnet.train.config import TrainConfig

SIZES = (23, 9, 31)  # documents of the three corpora
WEIGHTS = st.lists(
    st.integers(0, 50) | st.sampled_from([0.1, 0.7, 0.25, 1e-3]), min_size=3, max_size=3
).filter(any)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Three corpora of documents that are all different, in shards that their borders do not stop at."""
    home = tmp_path_factory.mktemp("mixture")
    for number, size in enumerate(SIZES):
        texts = [f"{number}.{i} " + "abc" * (i % 9) for i in range(size)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (home / f"{number}.jsonl").write_text(lines)
    (home / "v.txt").write_text("v")
    corpora = tuple(str(home / f"{number}.jsonl") for number in range(3))
    config = DataConfig(corpus=corpora, validation=str(home / "v.txt"), cache=str(home / "cache"))
    return prepare(config, shard_tokens=150)


@given(weights=WEIGHTS, rows=st.integers(0, 10**12))
def test_shares_are_exact_at_each_period_and_within_a_row_or_two_between(weights, rows):
    mixture, total = Mixture([Phase(0, weights)]), sum(weights)
    here, after = mixture.before(rows), mixture.before(rows + 1)
    assert sum(here) == rows
    assert sorted(b - a for a, b in zip(here, after, strict=True)) == [0, 0, 1]
    for count, weight in zip(here, weights, strict=True):
        assert abs(count - rows * weight / total) <= 1.5 + 1e-3
        assert weight or not count
    period = sum(mixture._weights[0])
    assert mixture.before(period) == mixture._weights[0]
    assert mixture.before(7 * period) == [7 * weight for weight in mixture._weights[0]]


@given(
    phases=st.lists(st.tuples(st.integers(0, 90), WEIGHTS), max_size=3),
    first=WEIGHTS,
    start=st.integers(0, 200),
)
def test_each_corpus_goes_on_where_it_stopped(phases, first, start):
    later = sorted(phases, key=lambda phase: phase[0])
    mixture = Mixture([Phase(0, first), *(Phase(*phase) for phase in later)])
    corpora, numbers = mixture.places(0, 300)
    for corpus in range(3):
        mine = numbers[corpora == corpus].tolist()
        assert mine == list(range(len(mine)))
        assert bool(mine) <= mixture.uses(corpus)
    again = mixture.places(start, 50)
    assert again[0].tolist() == corpora[start : start + 50].tolist()
    assert again[1].tolist() == numbers[start : start + 50].tolist()


def rows_of(batch):
    """The rows of a batch: their documents, and their targets, of which no two windows have the same."""
    T = batch.tokens.shape[1]
    begins = batch.cu_seqlens.tolist()[:-1]
    ids = [
        [d for cut, d in zip(begins, batch.documents, strict=True) if cut // T == row]
        for row in range(len(batch.tokens))
    ]
    return [(tuple(i), tuple(t)) for i, t in zip(ids, batch.targets.tolist(), strict=True)]


@settings(deadline=None, max_examples=12)
@given(
    weights=WEIGHTS.filter(all),
    phases=st.lists(st.tuples(st.integers(1, 18), WEIGHTS.filter(all)), max_size=2, unique_by=lambda p: p[0]),
    ramp=st.integers(1, 15),
    worlds=st.lists(st.sampled_from([1, 2, 4]), min_size=3, max_size=8),
    seed=st.integers(0, 99),
)
def test_no_document_comes_twice_or_not_at_all(prepared, weights, phases, ramp, worlds, seed):
    """A run whose ranks change again and again reads, step by step, what one that never stopped reads, each window once."""
    train = TrainConfig(seq_len=16, batch_size=3, accumulate=8, ramp_steps=ramp, ramp_from=4, seed=seed)
    later = tuple(MixturePhase(step, tuple(w)) for step, w in sorted(phases))
    data = DataConfig(corpus=("a", "b", "c"), weights=tuple(weights), phases=later)
    mixture = Mixture.of(data, lambda step: train.passes_before(step) * train.batch_size)
    batches = Batches(prepared.train, seq_len=16, batch_size=3, seed=seed, mixture=mixture)
    steps = 20
    rows_at = cache(lambda place: rows_of(batches.batch(place)))
    whole = [row for place in range(train.passes_before(steps)) for row in rows_at(place)]
    found = []
    for step in range(steps):
        world, first = worlds[step * len(worlds) // steps], train.passes_before(step)
        ranks = [range(first + rank, first + train.passes(step), world) for rank in range(world)]
        read = {place: rows_at(place) for places in ranks for place in places}
        found += [row for place in sorted(read) for row in read[place]]
    assert found == whole
    borders = [0, *(sum(SIZES[: i + 1]) for i in range(3))]
    alone = Counter(row for place in batches.in_order() for row in rows_of(place) if set(row[1]) != {IGNORED})
    for start, stop in pairwise(borders):
        mine = [row for row in whole if start <= row[0][0] < stop]
        once = {row for row in alone if start <= row[0][0] < stop}
        for epoch in range(len(mine) // len(once)):
            assert set(mine[epoch * len(once) : (epoch + 1) * len(once)]) == once
        assert set(mine) <= once
        assert {d for row in once for d in row[0] if d >= 0} == set(range(start, stop))
    times = batches.epochs(train.passes_before(steps))
    sizes = [sum(start <= row[0][0] < stop for row in alone) for start, stop in pairwise(borders)]
    read = [sum(start <= row[0][0] < stop for row in whole) for start, stop in pairwise(borders)]
    assert times == [count / size for count, size in zip(read, sizes, strict=True)]


def test_a_prepared_folder_knows_its_corpora(prepared):
    assert sum(prepared.train.corpora) == prepared.train.num_tokens
    bos = [prepared.train.document_span(start)[0] for start in (0, 23, 32)]
    assert bos == [0, prepared.train.corpora[0], sum(prepared.train.corpora[:2])]
    only = Batches(prepared.train, seq_len=8, batch_size=4, seed=0, mixture=Mixture([Phase(0, (0, 1, 0))]))
    assert {d for place in range(20) for d in only.batch(place).documents} - {-1} == set(range(23, 32))
    with pytest.raises(UserError, match="2 numbers, and the prepared text knows of 3 corpora"):
        Batches(prepared.train, seq_len=8, batch_size=4, seed=0, mixture=Mixture([Phase(0, (1, 1))]))


def test_a_corpus_that_another_holds_already_is_named(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "the same text"}\n')
    (tmp_path / "v.txt").write_text("v")
    a, b, validation = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "v.txt"))
    found = prepare(DataConfig(corpus=(a, b), validation=validation, cache=str(tmp_path / "cache")))
    with pytest.raises(
        UserError, match=r"data\.weights has 2 numbers.*knows of 1 corpora.*whose text another holds"
    ):
        Batches(found.train, seq_len=8, batch_size=4, seed=0, mixture=Mixture([Phase(0, (1, 1))]))


def test_mixtures_that_cannot_be_are_said(tmp_path):
    config = DataConfig(corpus=("a", "b"), weights=(0.7, 0.3), phases=(MixturePhase(5, (1.0, 0.0)),))
    import tomllib

    assert build(DataConfig, tomllib.loads(dump(config))) == config
    for wrong, said in (
        ({"corpus": ("a", "b"), "weights": (1.0,)}, "1 numbers for 2 corpora"),
        ({"corpus": ("a", "b"), "weights": (0.0, 0.0)}, "one of them must be above 0"),
        ({"corpus": ("a", "b"), "weights": (1.0, -1.0)}, "weights has an item that is -1.0"),
        ({"phases": (MixturePhase(5, (1.0,)),)}, r"give data\.weights"),
        (
            {"corpus": ("a", "b"), "weights": (1.0, 1.0), "phases": (MixturePhase(5, (1.0,)),)},
            "1 numbers for 2",
        ),
        (
            {"weights": (1.0, 1.0), "phases": (MixturePhase(5, (1.0,)),)},
            "the phase from step 5 on has 1 numbers for 2",
        ),
        (
            {"weights": (1.0,), "phases": (MixturePhase(9, (1.0,)), MixturePhase(5, (1.0,)))},
            "order of their steps",
        ),
    ):
        with pytest.raises(UserError, match=said):
            DataConfig(**wrong)
