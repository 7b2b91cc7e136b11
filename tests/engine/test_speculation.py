"""Prompt-lookup speculation: the same tokens in fewer steps, and no passes where they cannot pay."""

import itertools

import pytest
import torch

from retnet.engine import Engine, Request, Sampling, Session, choose_decoder, speculation
from retnet.engine.speculation import LEAST, LOSS, PATIENCE, PromptLookup
from retnet.engine.streams import Stream
from retnet.mixers import MIXERS
from retnet.settings import UserError
from tests.helpers.fast import few_fast
from tests.helpers.sessions import GREEDY, MB, make, words


def counted(decoder):
    """The decoder, which notes the tokens of its passes over drafts and its steps in `passes` and `steps`."""
    passes, steps = [], []
    verify, step = decoder.prefill_logits, decoder.step
    decoder.prefill_logits = lambda tokens, slot: (passes.append(len(tokens)), verify(tokens, slot))[1]
    decoder.step = lambda tokens, slots: (steps.append(len(tokens)), step(tokens, slots))[1]
    decoder.passes, decoder.steps = passes, steps
    return decoder


def run(model, tokenizer, request, draft_tokens, slots=2):
    decoder = counted(choose_decoder(model, slots))
    engine = Engine(decoder, tokenizer, draft_tokens=draft_tokens)
    engine.submit(request)
    events = list(engine.events())
    return events, decoder


@pytest.mark.parametrize("name", few_fast(MIXERS, "retention"))
def test_every_mixer_says_the_same(name, tokenizer, monkeypatch):
    """A model with random weights soon repeats itself, which is what drafts are for."""
    monkeypatch.setattr(
        speculation.time, "perf_counter", itertools.count(1.0).__next__
    )  # a pass costs a step
    model = make(name)
    request = Request(words(50), max_tokens=200, sampling=GREEDY, min_tokens=0)
    want, plain = run(model, tokenizer, request, 0)
    got, drafted = run(model, tokenizer, request, 12)
    assert got == want
    assert not plain.passes
    assert len(drafted.steps) + len(drafted.passes) <= len(plain.steps)
    if name == "retention":
        assert len(drafted.steps) + len(drafted.passes) < len(plain.steps) / 2


def test_texts_end_where_they_would(tokenizer):
    model = make()
    full = run(model, tokenizer, Request(words(50), max_tokens=150, sampling=GREEDY), 0)[0][-1].completion
    repeated = full.text[60:63]
    for options in (
        {"max_tokens": 97},
        {"stop_tokens": [full.tokens[77]]},
        {"stop": [repeated]},
        {"min_tokens": 40},
        {"echo": True},
    ):
        request = Request(words(50), **{"max_tokens": 150, "sampling": GREEDY} | options)
        assert run(model, tokenizer, request, 12)[0] == run(model, tokenizer, request, 0)[0]


def test_two_near_ones_are_decided_by_a_step(tokenizer):
    """All tokens are equally likely: no pass may decide, so every token is a step's."""
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    request = Request(b"abcabcabcabcabc".decode(), max_tokens=30, sampling=GREEDY)
    want, plain = run(model, tokenizer, request, 0)
    got, drafted = run(model, tokenizer, request, 12)
    assert got == want
    assert len(drafted.steps) == len(plain.steps) == 29


@pytest.mark.parametrize(
    "options",
    [
        {"sampling": Sampling()},
        {"sampling": Sampling(temperature=0, presence_penalty=1)},
        {"sampling": Sampling(temperature=0, logit_bias={5: 1})},
        {"logprobs": 1},
        {"min_tokens": 60},
    ],
)
def test_only_plain_greedy_texts_are_drafted(tokenizer, options):
    request = Request("ab" * 40, **{"max_tokens": 60, "sampling": GREEDY} | options)
    assert not run(make(), tokenizer, request, 12)[1].passes


@pytest.mark.slow
def test_whoever_comes_and_goes_changes_nothing(tokenizer):
    model = make()
    asked = [Request(words(40, seed), max_tokens=120, sampling=GREEDY) for seed in range(4)]
    want = [run(model, tokenizer, request, 0)[0][-1].completion for request in asked]
    engine = Engine(counted(choose_decoder(model, 2)), tokenizer, draft_tokens=12)
    got, waiting, steps = {}, [*enumerate(asked)], 0
    while waiting or engine.busy:
        if waiting and steps % 30 == 0:
            assert engine.submit(waiting.pop(0)[1]) is not None
        if steps == 32:
            assert engine.cancel(1)
        steps += 1
        for event in engine.step():
            if event.completion:
                got[event.request] = event.completion
    assert engine._decoder.passes
    for number, completion in got.items():
        assert completion.tokens == want[number].tokens[: len(completion.tokens)]
        assert completion == want[number] or number == 1


def test_sessions_and_their_cache_know_nothing_of_it(tokenizer):
    model, texts = make(), []
    for draft in (0, 12):
        session = Session(Engine(model, tokenizer, cache_bytes=MB * 16, draft_tokens=draft))
        for turn in range(3):
            session.append(words(70, turn))
            session.generate(max_tokens=150, sampling=GREEDY)
        texts.append(session.tokens)
    assert texts[0] == texts[1]


def test_it_is_not_for_exact_engines(tokenizer):
    with pytest.raises(UserError, match="draft_tokens is not for exact engines"):
        Engine(make(), tokenizer, exact=True, draft_tokens=8)
    with pytest.raises(UserError, match="draft_tokens must be a whole number of 0 or more, got -1"):
        Engine(make(), tokenizer, draft_tokens=-1)


# -- drafts -----------------------------------------------------------------------------------------------------


def stream_of(tokenizer, prompt, max_tokens=1000):
    stream = Stream(0, Request(prompt, max_tokens=max_tokens), 0, tokenizer)
    stream.prompt = tuple(prompt)
    return stream


def test_a_draft_is_what_followed_the_last_tokens_before(tokenizer):
    lookup = PromptLookup(6)
    stream = stream_of(tokenizer, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 50])
    for token, want in ((2, []), (3, []), (4, [5, 6, 7, 8, 9, 10])):
        stream.tokens.append(token)
        assert lookup.draft(stream) == want
    for token in (5, 99, 2, 3, 4):  # the last time counts
        stream.tokens.append(token)
    assert lookup.draft(stream) == [5, 99, 2, 3, 4, 5]  # and what repeats goes on repeating
    assert PromptLookup(6).draft(stream_of(tokenizer, [1])) == []
    assert PromptLookup(6).draft(stream_of(tokenizer, [1, 2, 3] * 3, LEAST)) == []


def test_wrong_drafts_become_rare(tokenizer):
    lookup, stream, drafts = PromptLookup(8), stream_of(tokenizer, [1, 2, 3] * 4), []
    for step in range(500):
        if lookup.draft(stream):
            drafts.append(step)
            lookup.learn(1, 4.0)
    gaps = [b - a for a, b in itertools.pairwise(drafts)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == 4.0 / LOSS > PATIENCE
    for _ in range(200):
        lookup.draft(stream)
    lookup.learn(8, 4.0)
    assert lookup.draft(stream)
