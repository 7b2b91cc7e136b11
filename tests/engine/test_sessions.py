"""Exact results, kept states and sessions: nothing that was kept, lost or moved changes a bit."""

import json
import random
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.engine import ComposedDecoder, Engine, Request, Sampling, Session
from retnet.engine.store import BLOCK, StateStore, kept_positions, keys_of, state_size
from retnet.mixers import MIXERS
from retnet.model import LanguageModel, ModelConfig
from retnet.settings import UserError, build

MB = 1 << 20
GREEDY = Sampling(temperature=0)


def make(name="retention", seed=0):
    torch.manual_seed(seed)
    config = {"vocab_size": 257, "d_model": 32, "num_layers": 2, "mixer": {"name": name}}
    return LanguageModel(build(ModelConfig, config)).eval()


@pytest.fixture(scope="module")
def model():
    return make()


def engine(model, tokenizer, **options):
    return Engine(model, tokenizer, **{"slots": 4, "exact": True, "cache_bytes": 64 * MB} | options)


def words(count, seed=0):
    return "".join(random.Random(seed).choices("abcdefgh .", k=count))


def bits(completion):
    """What must be the same: tokens, and log-probabilities to the last bit."""
    return completion.tokens, [(found.logprob, found.top) for found in completion.logprobs]


# -- exact ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXERS)
def test_company_arrival_and_cache_change_no_bit(name, tokenizer):
    model = make(name)
    long = words(700)
    asked = [
        Request(text, max_tokens=6, seed=i, sampling=sampling, logprobs=4, samples=1 + i % 2)
        for i, (text, sampling) in enumerate(
            [
                (long, Sampling()),
                (words(3, 1), Sampling(top_p=0.9)),
                (long[:500] + words(300, 2), GREEDY),
                (long, Sampling(top_k=40, repetition_penalty=1.2)),
                (long[:127], Sampling(min_p=0.1)),
                (long[:128], Sampling()),
            ]
        )
    ]
    want = [
        list(map(bits, Engine(model, tokenizer, exact=True, slots=2).complete(request))) for request in asked
    ]
    for order, cache in ((asked, 0), (asked[::-1], 64 * MB)):
        running = engine(model, tokenizer, cache_bytes=cache, prefill_tokens=300)
        numbers, got, waiting = {}, {}, list(order)
        while waiting or running.busy:
            if waiting:
                request = waiting.pop(0)
                numbers[running.submit(request)] = asked.index(request)
            for event in (event for _ in range(2) for event in running.step()):
                if event.completion:
                    got[numbers[event.request], event.sample] = event.completion
        for i, rows in enumerate(want):
            assert [bits(got[i, sample]) for sample in range(len(rows))] == rows
        cached = {i: got[i, 0].cached_tokens for i in range(len(asked))}
        assert (sum(cached.values()) > 0) == bool(cache)


def test_without_exact_only_rounding_differs(model, tokenizer):
    request = Request(words(400), max_tokens=5, sampling=GREEDY, logprobs=2)
    (exact,) = engine(model, tokenizer).complete(request)
    (packed,) = Engine(model, tokenizer, slots=3).complete(request)
    assert [found.logprob for found in packed.logprobs] == pytest.approx(
        [found.logprob for found in exact.logprobs], abs=1e-4
    )


# -- what is kept ---------------------------------------------------------------------------------------------


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


# -- sessions -------------------------------------------------------------------------------------------------

TURN = {"max_tokens": 30, "sampling": Sampling(temperature=0.8), "logprobs": 2}


def fresh(model, tokenizer, tokens, **options):
    """What a new session says that reads the same tokens from their start, with nothing kept."""
    return bits(engine(model, tokenizer, cache_bytes=0).complete(Request(tokens, **options))[0])


def test_a_session_is_one_that_read_the_same_text_from_its_start(model, tokenizer):
    session = Session(engine(model, tokenizer))
    for turn in range(8):
        session.append(words(90, turn))
        tokens = [*session.tokens]
        got = session.generate(seed=turn, **TURN)
        assert bits(got) == fresh(model, tokenizer, tokens, seed=turn, **TURN)
        assert session.tokens == [*tokens, *got.tokens]
        assert len(tokens) - got.cached_tokens < 90 + 30 + BLOCK
    assert session.text == tokenizer.decode(session.tokens)


def test_the_same_session_generates_on_without_anything_new(model, tokenizer):
    session = Session(engine(model, tokenizer))
    session.append(words(200))
    for turn in range(3):
        tokens = [*session.tokens]
        assert bits(session.generate(seed=turn, **TURN)) == fresh(model, tokenizer, tokens, seed=turn, **TURN)


def test_forks_know_nothing_of_each_other(model, tokenizer):
    one = Session(engine(model, tokenizer))
    one.append(words(500))
    one.generate(**TURN)
    two = one.fork()
    one.append("first")
    two.append("second")
    before = [*two.tokens]
    assert [fork.generate(**TURN).cached_tokens for fork in (one, two)] == [
        384,
        512,
    ]  # what one read, two finds
    assert two.tokens[: len(before)] == before
    assert one.tokens[: len(before)] != before


@pytest.mark.parametrize("back", [1999, 1990, 1024, 1000, 10, 1])
def test_rewinding_reads_again_from_the_nearest_kept_state(model, tokenizer, back):
    session = Session(engine(model, tokenizer))
    session.append(words(2000))
    session.generate(**TURN)
    session.edit(back, "something else")
    tokens = [*session.tokens]
    got = session.generate(**TURN)
    assert bits(got) == fresh(model, tokenizer, tokens, **TURN)
    assert back - got.cached_tokens <= BLOCK + (2031 - got.cached_tokens) // 4


def test_a_cache_that_holds_next_to_nothing_loses_no_session(model, tokenizer, tmp_path):
    small = state_size(ComposedDecoder(model, 1).read(torch.tensor([0]))) * 3
    for directory in (tmp_path / "states", None):
        running = engine(model, tokenizer, cache_bytes=small, state_directory=directory)
        sessions = [Session(running) for _ in range(5)]
        for turn in range(3):
            for number, session in enumerate(sessions):
                session.append(words(300, 10 * turn + number))
                tokens = [*session.tokens]
                got = session.generate(**TURN)
                assert bits(got) == fresh(model, tokenizer, tokens, **TURN)
                assert running.store.bytes <= small
                if directory is not None and turn:
                    assert len(tokens) - got.cached_tokens < 300 + 30 + BLOCK
    for session in sessions:
        session.close()


@pytest.mark.slow
def test_it_goes_on_from_a_file_in_another_process(model, tokenizer, tmp_path):
    from retnet.model.checkpoint import model_files, write_checkpoint

    write_checkpoint(tmp_path / "model", {**model_files(model), "tokenizer.json": tokenizer.save})
    session = Session(engine(model, tokenizer), name="mine")
    session.append(words(777))
    session.generate(**TURN)
    session.save(tmp_path / "session")
    code = f"""
import json
from retnet.engine import Engine, Sampling, Session, open_run
run = open_run({str(tmp_path / "model")!r})
engine = Engine(run.model, run.tokenizer, exact=True, cache_bytes=1 << 26)
session = Session.load(engine, {str(tmp_path / "session")!r})
session.append("and then")
got = session.generate(max_tokens=30, sampling=Sampling(temperature=0.8), logprobs=2)
print(json.dumps([session.name, got.cached_tokens, got.tokens, [found.logprob for found in got.logprobs]]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    session.append("and then")
    here = session.generate(**TURN)
    assert json.loads(done.stdout) == [
        "mine",
        768,
        list(here.tokens),
        [found.logprob for found in here.logprobs],
    ]


@pytest.mark.parametrize(("back", "reused"), [(2001, 1920), (1990, 1920), (1000, 896), (10, 0)])
def test_a_saved_session_is_rewound_as_fast_after_a_restart(model, tokenizer, tmp_path, back, reused):
    session = Session(engine(model, tokenizer))
    session.append(words(2000))
    session.generate(max_tokens=1)
    session.save(tmp_path / "session")
    other = Session.load(engine(model, tokenizer), tmp_path / "session")
    for one in (session, other):
        one.edit(back, "x")
    here, there = session.generate(**TURN), other.generate(**TURN)
    assert bits(here) == bits(there)
    assert here.cached_tokens == there.cached_tokens == reused


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_has_sessions_that_survive_export(name, tokenizer):
    model = make(name)
    session = Session(engine(model, tokenizer))
    session.append(words(300))
    session.generate(**TURN)
    content = session.export()
    other = Session.from_bytes(engine(model, tokenizer), content)
    assert (other.tokens, other.marks, other.name) == (session.tokens, session.marks, session.name)
    one, two = session.generate(**TURN), other.generate(**TURN)
    assert bits(one) == bits(two)
    assert two.cached_tokens >= 256


def test_a_session_in_company(model, tokenizer):
    running = engine(model, tokenizer)
    number = running.submit(Request("others", max_tokens=20))
    session = Session(running)
    session.append(words(200))
    want = fresh(model, tokenizer, [*session.tokens], **TURN)
    assert bits(session.generate(**TURN)) == want
    events = list(running.events())
    assert {event.request for event in events} == {number}
    assert sum(event.token is not None for event in events) == 20


# -- bad files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def content(model, tokenizer):
    session = Session(engine(model, tokenizer))
    session.append(words(300))
    session.generate(**TURN)
    return session.export()


def altered(content, change):
    """The session with its tensors and header changed, and the hash made to fit."""
    from retnet.engine.sessions import _digest, _read

    header, tensors = _read(content)
    change(header, tensors)
    header["sha256"] = _digest(tensors)
    return safetensors.torch.save(tensors, {"retnet_session": json.dumps(header)})


def test_a_truncated_or_damaged_session_is_refused(model, tokenizer, content):
    target = engine(model, tokenizer)
    for end in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        with pytest.raises(UserError, match="cannot be read"):
            Session.from_bytes(target, content[:end])
    flipped = bytearray(content)
    flipped[-100] ^= 1
    with pytest.raises(UserError, match="its content is not what was written"):
        Session.from_bytes(target, bytes(flipped))
    with pytest.raises(UserError, match="cannot be read"):
        Session.from_bytes(target, safetensors.torch.save({"tokens": torch.zeros(3)}))
    assert len(target.store) == 0


def test_a_session_of_another_model_or_tokenizer_is_refused(tokenizer, content):
    with pytest.raises(UserError, match="of another model"):
        Session.from_bytes(engine(make(seed=1), tokenizer), content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: t["256.0.kv"].fill_(float("nan")), "not finite"),
        (lambda h, t: t.update({"256.0.kv": t["256.0.kv"][..., :-1].contiguous()}), "of another model"),
        (lambda h, t: t.update({"256.0.kv": t["256.0.kv"].double()}), "of another model"),
        (lambda h, t: t.pop("256.1.kv"), "other layers"),
        (lambda h, t: t["256.0.position"].fill_(5), "not that after its first 256 tokens"),
        (
            lambda h, t: t.update({"512.0.kv": t["256.0.kv"].clone()}),
            "state '512.0.kv', which is at no place of its 331",
        ),
        (lambda h, t: t.update({"3.0.kv": t["256.0.kv"].clone()}), "at no place"),
        (lambda h, t: t.update({"../x": t["256.0.kv"].clone()}), "at no place"),
        (lambda h, t: t["tokens"].fill_(257), "token id 257"),
        (lambda h, t: t["tokens"].fill_(-1), "token id -1"),
        (lambda h, t: h.update(marks="all"), "its name and marks"),
        (lambda h, t: h.update(name=3), "its name and marks"),
        (lambda h, t: h.update(format=99), "format 99; this version reads 1"),
        (lambda h, t: h.update(tokenizer="x"), "another tokenizer"),
    ],
)
def test_states_that_cannot_be_are_refused(model, tokenizer, content, change, message):
    target = engine(model, tokenizer)
    with pytest.raises(UserError, match=message):
        Session.from_bytes(target, altered(content, change))
    assert len(target.store) == 0


def test_mistakes_are_named(model, tokenizer, tmp_path):
    with pytest.raises(UserError, match="give it cache_bytes"):
        Session(engine(model, tokenizer, cache_bytes=0))
    session = Session(engine(model, tokenizer))
    with pytest.raises(UserError, match="position 2 is beyond the session's 1 tokens"):
        session.rewind(2)
    with pytest.raises(UserError, match="position must be a whole number of 1 or more, got 0"):
        session.rewind(0)
    with pytest.raises(UserError, match="no option 'samples'"):
        session.generate(samples=2)
    with pytest.raises(UserError, match="cannot read the session"):
        Session.load(engine(model, tokenizer), tmp_path / "none")
    with pytest.raises(UserError, match="cannot write the session"):
        session.save(tmp_path / "none" / "file")


# -- everything at random -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_thousand_random_submissions_cancellations_and_verbs(model, tokenizer, tmp_path):
    """One engine, free slots full of NaN, a cache of a few states: every text is what it is alone, and nothing is left."""
    rng = np.random.default_rng(2026)
    decoder = ComposedDecoder(model, 6)
    budget = state_size(decoder.read(torch.tensor([0]))) * 8
    running = engine(decoder, tokenizer, slots=6, cache_bytes=budget, state_directory=tmp_path)
    sessions, asked, events, cancelled = [Session(running)], {}, [], set()
    for operation in range(1000):
        session = sessions[rng.integers(len(sessions))]
        match rng.integers(12):
            case 0 | 1 | 2 | 3 | 4:
                request = Request(
                    words(600, int(rng.integers(4)))[: int(rng.integers(0, 600))],
                    max_tokens=int(rng.integers(1, 9)),
                    seed=int(rng.integers(99)),
                    sampling=Sampling(temperature=float(rng.uniform(0, 2)), top_p=float(rng.uniform(0.1, 1))),
                    samples=int(rng.integers(1, 4)),
                    logprobs=1,
                    cache=bool(rng.integers(4)),
                )
                asked[running.submit(request)] = request
            case 5 if asked:
                number = int(rng.integers(max(0, max(asked) - 8), max(asked) + 1))
                if running.cancel(number):
                    cancelled.add(number)
            case 6:
                session.append(words(int(rng.integers(1, 200)), operation))
            case 7:
                tokens, ask = [*session.tokens], TURN | {"seed": operation, "max_tokens": 6}
                assert bits(session.generate(**ask)) == fresh(model, tokenizer, tokens, **ask)
            case 8 if len(sessions) < 12:
                sessions.append(session.fork())
            case 9:
                session.rewind(int(rng.integers(1, len(session.tokens) + 1)))
            case 10 if len(sessions) > 1:
                content = session.export()
                session.close()
                sessions.remove(session)
                sessions.append(Session.from_bytes(running, content))
            case _:
                events += running.step()
        poison(decoder, running._free)
        assert running.store.bytes <= budget
    events += running.events()
    done = {(event.request, event.sample): event.completion for event in events if event.completion}
    assert len(done) == sum(request.samples for request in asked.values()) > 500
    single = engine(model, tokenizer, cache_bytes=0)
    for number, request in asked.items():
        for sample, alone in enumerate(single.complete(request)):
            got = done[number, sample]
            if got.finish == "interrupted":
                assert number in cancelled
                assert got.tokens == alone.tokens[: len(got.tokens)]
            else:
                assert bits(got) == bits(alone)
    for session in sessions:
        session.close()
    assert list(tmp_path.iterdir()) == []
    assert sorted(running._free) == list(range(6))
    assert not running.busy


def poison(decoder, slots):
    """Fills slots with NaN."""
    for pool in decoder.pools:
        for part in pool.state:
            part[slots] = float("nan") if part.is_floating_point() else 12345


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000))
def test_random_verbs_on_random_sessions(model, tokenizer, tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    directory = tmp_path_factory.mktemp("states")
    budget = state_size(ComposedDecoder(model, 1).read(torch.tensor([0]))) * 6
    running = engine(model, tokenizer, cache_bytes=budget, state_directory=directory)
    sessions = [Session(running)]
    for _ in range(14):
        session = sessions[rng.integers(len(sessions))]
        match rng.integers(7):
            case 0 | 1:
                session.append(words(int(rng.integers(1, 400)), int(rng.integers(1000))))
            case 2 | 3:
                tokens, ask = [*session.tokens], TURN | {"seed": int(rng.integers(9)), "max_tokens": 8}
                assert bits(session.generate(**ask)) == fresh(model, tokenizer, tokens, **ask)
            case 4:
                sessions.append(session.fork())
            case 5:
                session.rewind(int(rng.integers(1, len(session.tokens) + 1)))
            case 6:
                sessions.append(Session.from_bytes(running, session.export(), name=f"copy {len(sessions)}"))
        assert running.store.bytes <= budget
    for session in sessions:
        session.close()
    assert list(directory.iterdir()) == []
    assert sorted(running._free) == list(range(4))
