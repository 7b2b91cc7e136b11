"""Sessions and requests at random: every text is what it is alone, and nothing is left behind."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.engine import ComposedDecoder, Request, Sampling, Session
from retnet.engine.store import state_size
from tests.helpers.sessions import TURN, bits, engine, fresh, make, words


@pytest.fixture(scope="module")
def model():
    return make()


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
