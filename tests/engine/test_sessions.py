"""Exact results, kept states and sessions: nothing that was kept, lost or moved changes a bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from retnet.engine import ComposedDecoder, Engine, Request, Sampling, Session
from retnet.engine.session_archive import SessionArchive
from retnet.engine.store import BLOCK, state_size
from retnet.settings import UserError
from tests.helpers.fast import few_fast
from tests.helpers.kinds import KINDS
from tests.helpers.sessions import GREEDY, MB, TURN, altered, bits, engine, fresh, make, words

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    return make()


# -- exact ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", few_fast(KINDS, "retention+softmax"))
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


def test_an_edit_is_no_beginning_of_a_text(model, tokenizer, monkeypatch):
    """Some tokenizers put a space before a text that is one."""
    session, seen, real = Session(engine(model, tokenizer)), [], type(tokenizer).encode
    session.append("abcdef")
    monkeypatch.setattr(
        type(tokenizer),
        "encode",
        lambda self, text, before="": seen.append(before) or real(self, text, before),
    )
    session.edit(4, "x")
    session.append("y")
    assert (seen, session.text) == (["abc", "abcx"], "abcxy")


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


@pytest.mark.slow
def test_a_cache_that_holds_next_to_nothing_loses_no_session(model, tokenizer, tmp_path):
    small = state_size(ComposedDecoder(model, 1).read(torch.tensor([0]))) * 2
    for directory in (tmp_path / "states", None):
        running = engine(model, tokenizer, cache_bytes=small, state_directory=directory)
        sessions = [Session(running) for _ in range(3)]
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
def test_it_goes_on_from_a_file_in_another_process(model, tokenizer, forks, tmp_path):
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
    done = forks.run([code], tmp_path, code=True)
    session.append("and then")
    here = session.generate(**TURN)
    assert json.loads(done.stdout) == [
        "mine",
        768,
        list(here.tokens),
        [found.logprob for found in here.logprobs],
    ]


@pytest.mark.slow
def test_a_process_killed_between_two_saves_loses_what_came_after_the_first_alone(model, tokenizer, tmp_path):
    """SIGKILL while it generates: the file is that of the last save, and goes on as a text that nobody has interrupted."""
    from retnet.model.checkpoint import model_files, write_checkpoint

    write_checkpoint(tmp_path / "model", {**model_files(model), "tokenizer.json": tokenizer.save})
    code = f"""
from retnet.engine import Engine, Sampling, Session, open_run
from tests.helpers.kinds import KINDS
from tests.helpers.sessions import TURN, words
run = open_run({str(tmp_path / "model")!r})
session = Session(Engine(run.model, run.tokenizer, exact=True, cache_bytes=1 << 26), name="mine")
for turn in range(10**6):
    session.append(words(90, turn))
    session.generate(seed=turn, **TURN)
    session.save({str(tmp_path / "session")!r})
    print(turn, flush=True)
"""
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    for turn in range(3):
        assert writer.stdout.readline() == b"%d\n" % turn
    writer.kill()
    writer.wait()
    writer.stdout.close()
    found = Session.load(engine(model, tokenizer), tmp_path / "session")
    again, turn = Session(engine(model, tokenizer)), 0
    while len(again.tokens) < len(found.tokens):
        again.append(words(90, turn))
        again.generate(seed=turn, **TURN)
        turn += 1
    assert turn >= 3
    assert (found.tokens, found.marks) == (again.tokens, again.marks)
    for session in (found, again):
        session.append("and then")
    assert bits(found.generate(**TURN)) == bits(again.generate(**TURN))


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


def test_of_a_file_only_the_state_that_is_wanted_is_read(model, tokenizer, tmp_path, monkeypatch, caplog):
    """A damaged one is no loss but of time."""
    session, path, read = Session(engine(model, tokenizer)), tmp_path / "session", []
    session.append(words(700))
    session.generate(max_tokens=1)
    session.save(path)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + json.loads(content[8:header])["256.1.kv"]["data_offsets"][0]] ^= 1
    path.write_bytes(content)
    real = SessionArchive.state
    monkeypatch.setattr(
        SessionArchive, "state", lambda self, at, like: read.append(at) or real(self, at, like)
    )
    other = Session.load(engine(model, tokenizer), path)
    assert read == []
    for back, tried, reused in ((400, [384], 384), (300, [256, 128], 128)):
        for one in (session, other):
            one.edit(back, "x")
        here, there = session.generate(**TURN), other.generate(**TURN)
        assert bits(here) == bits(there)
        assert (there.cached_tokens, read) == (reused, tried)
        read.clear()
    assert "its state at 256: the session is damaged" in caplog.text
    content[header + json.loads(content[8:header])["tokens"]["data_offsets"][0]] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="the session is damaged"):
        Session.load(engine(model, tokenizer), path)


@pytest.mark.parametrize("name", few_fast(KINDS, "retention+softmax"))
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
        (lambda h, t: h.update(format=99), "format 99; this version reads 2"),
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
