"""The prefix cache: which states are kept, found again and lost."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.engine import Request
from retnet.engine.store import BLOCK, StateStore, kept_positions, keys_of, state_size
from tests.helpers.sessions import GREEDY, engine, make, words


@given(length=st.integers(0, 200_000), place=st.integers(0, 200_000))
def test_what_is_kept_grows_with_the_logarithm_and_leaves_no_gap_beyond_a_quarter(length, place):
    kept = kept_positions(length)
    assert len(kept) <= 9 * max(1, length).bit_length()
    assert all(p % BLOCK == 0 and 0 < p <= length for p in kept)
    place = min(place, length)
    last = max((p for p in kept if p <= place), default=0)
    assert place - last <= BLOCK + (length - last) // 4


@given(length=st.integers(0, 100_000), more=st.integers(0, 100_000))
def test_what_a_longer_text_wants_kept_the_shorter_one_had_kept(length, more):
    assert {p for p in kept_positions(length + more) if p <= length} <= set(kept_positions(length))


def test_marks_are_kept_at_the_block_before_them():
    assert {BLOCK * 3, BLOCK * 17} <= set(kept_positions(60_000, [BLOCK * 3 + 5, BLOCK * 17, 70_000, 1]))
    assert 0 not in kept_positions(60_000, [1])


@given(
    a=st.lists(st.integers(0, 300), min_size=BLOCK * 3, max_size=BLOCK * 3),
    at=st.integers(0, BLOCK * 3 - 1),
)
@settings(max_examples=20)
def test_keys_tell_texts_and_models_apart(a, at):
    b = [*a]
    b[at] += 1
    keys, others = keys_of("m", a), keys_of("m", b)
    assert [x == y for x, y in zip(keys, others, strict=True)] == [at >= end for end in (128, 256, 384)]
    assert keys_of("m", [*a, 1, 2]) == keys
    assert not set(keys) & set(keys_of("n", a))


class Memory(NamedTuple):
    x: torch.Tensor


def test_the_store_keeps_to_its_budget_and_loses_the_least_recently_used(tmp_path):
    state = (Memory(torch.zeros(1, 250)),)
    assert state_size(state) == 1000
    store = StateStore(state, 3000, tmp_path)
    for key in "abc":
        store.put(key, (Memory(torch.full((1, 250), float(ord(key)))),))
    store.hold("me", "ab")
    assert store.get("a") is not None
    store.put("d", state)
    store.put("e", state)
    assert store.bytes == 3000
    assert [file.stem for file in tmp_path.iterdir()] == ["b"]  # held, so it went to disk; "c" is gone
    assert store.get("c") is None
    assert store.get("b")[0][0][0, 0] == ord("b")
    assert store.bytes == 3000
    store.hold("me", ())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def model():
    return make()


def test_hits_are_reported_and_off_is_off(model, tokenizer):
    running = engine(model, tokenizer)
    text = words(1000)
    ask = {"max_tokens": 2, "sampling": GREEDY}
    assert [running.complete(Request(text, **ask))[0].cached_tokens for _ in range(2)] == [0, 896]
    read = running.stats.prefill_tokens
    (same,) = running.complete(Request(text, **ask))
    assert running.stats.prefill_tokens - read == 1001 - 896
    assert running.complete(Request(text, cache=False, **ask))[0] == same._replace(cached_tokens=0)
    other = text[:600] + "X" + text[601:]
    assert running.complete(Request(other, **ask))[0].cached_tokens == 512
    none = engine(model, tokenizer, cache_bytes=0)
    assert none.store is None
    assert [none.complete(Request(text, **ask))[0].cached_tokens for _ in range(2)] == [0, 0]
    unused = engine(model, tokenizer)
    unused.complete(Request(text, cache=False, **ask))
    assert len(unused.store) == 0
