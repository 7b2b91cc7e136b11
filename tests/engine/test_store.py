"""The prefix cache: which states are kept, found again and lost."""

import uuid
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.engine import Request
from retnet.engine.storage import open_storage
from retnet.engine.store import (
    BLOCK,
    StateStore,
    from_tensors,
    kept_positions,
    keys_of,
    state_size,
    to_tensors,
)
from retnet.errors import UserError
from retnet.mixers.softmax import SoftmaxState
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


# -- files ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "memory"])
def place(request, tmp_path):
    return str(tmp_path / "states") if request.param == "folder" else f"memory://{uuid.uuid4().hex}/states"


def filled(place, keys="abc"):
    """A store with room for one state, and its states, of which all but the last lie in files."""
    states = {key: (Memory(torch.full((1, 250), float(ord(key)))),) for key in keys}
    store = StateStore(states[keys[0]], 1000, place)
    store.hold("me", keys)
    for key, state in states.items():
        store.put(key, state)
    return store, states


def test_states_come_back_from_any_storage(place):
    store, states = filled(place)
    store.flush()
    other = StateStore(states["a"], 10_000, place)
    found, state = other.longest(["a", "b", "c", "d"])
    assert found == 3 * BLOCK
    assert torch.equal(state[0].x, states["c"][0].x)
    assert other.longest(["a", "x", "y"])[0] == BLOCK
    assert other.longest(["x", "y"]) == (0, None)
    store.hold("me", "c")
    assert open_storage(place).names() == ["c.safetensors"]


def test_the_states_of_one_owner_are_written_alone(place):
    state = (Memory(torch.zeros(1, 250)),)
    store = StateStore(state, 10_000, place)
    for key, owner in (("a", "one"), ("b", "two"), ("c", "one")):
        store.hold(owner, ["a", "c"] if owner == "one" else [key])
        store.put(key, state)
    store.flush("one")
    store.flush("nobody")
    assert open_storage(place).names() == ["a.safetensors", "c.safetensors"]
    store.flush()
    assert open_storage(place).names() == ["a.safetensors", "b.safetensors", "c.safetensors"]


def test_a_damaged_state_is_read_again_from_its_tokens(place):
    store, states = filled(place)
    store.flush()
    content = open_storage(place).read("a.safetensors")
    for damaged in (b"", content[:-5], content[:-5] + b"\x00\x00\x80\x3f\x00"):
        open_storage(place).write("a.safetensors", damaged)
        other = StateStore(states["a"], 10_000, place)
        assert other.get("a") is None
        assert open_storage(place).read("a.safetensors") is None
    assert store.longest(["a", "b", "c"])[0] == 3 * BLOCK


def test_what_a_killed_process_left_is_swept_and_what_is_wanted_stays(place):
    filled(place)[0].flush()  # and nobody says any more what is held
    other = StateStore((Memory(torch.zeros(1, 250)),), 10_000, place)
    other.hold("one", ["b", "z"])
    assert other.sweep(3600) == 0  # another may be about to say so
    assert other.sweep(0) == 2
    assert open_storage(place).names() == ["b.safetensors"]
    assert StateStore((Memory(torch.zeros(1, 250)),), 10_000).sweep(0) == 0


def test_a_storage_that_fails_costs_time_alone(place, caplog):
    store, states = filled(place)
    for verb in ("read", "write", "among", "sweep", "remove"):
        setattr(store._files, verb, lambda *given, **more: (_ for _ in ()).throw(OSError(5, "no answer")))
    assert store.get("a") is None
    assert store.longest(["a", "b", "c"])[0] == 3 * BLOCK
    store.put("d", states["a"])
    store.hold("me", "abcd")
    with pytest.raises(OSError, match="no answer"):  # whoever saves wants to know
        store.flush()
    store.hold("me", ())
    assert store.sweep(0) == 0
    assert caplog.text.count("no answer") == 1


@pytest.mark.parametrize("length", [[], [2.0], [-3], [3], [[2]]])
def test_a_cache_that_is_not_as_long_as_it_says_is_refused(length):
    def state(tokens, length):
        return SoftmaxState(torch.zeros(1, tokens, 2, 4), torch.zeros(1, tokens, 2, 4), length)

    template = (state(0, torch.zeros(1, dtype=torch.int64)),)
    length = torch.tensor(length) if length else torch.zeros(0, dtype=torch.int64)
    with pytest.raises(UserError, match=r"the state.s 0\.(length|keys) has shape"):
        from_tensors(to_tensors((state(2, length),)), template)
