"""The engine as a scheduler: who runs when, and that nobody's text depends on it."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.engine import ComposedDecoder, Engine, Request, Sampling
from retnet.engine.prompts import IDLE_TOKENS, share
from retnet.model import LanguageModel
from retnet.settings import UserError
from tests.helpers.fast import few_fast
from tests.helpers.kinds import KINDS, configured

GREEDY = Sampling(temperature=0)


def finished(events):
    return {(event.request, event.sample): event.completion for event in events if event.completion}


def alone(decoder, tokenizer, request):
    engine = Engine(decoder, tokenizer)
    engine.submit(request)
    return [completion for _, completion in sorted(finished(engine.events()).items())]


# -- fairness -------------------------------------------------------------------------------------------------


@given(left=st.lists(st.integers(1, 50), min_size=1, max_size=8), budget=st.integers(1, 60))
def test_shares_use_the_budget_and_give_the_oldest_half(left, budget):
    shares = share(left, budget)
    assert all(0 <= given <= want for given, want in zip(shares, left, strict=True))
    assert sum(shares) == min(budget, sum(left))
    assert shares[0] >= min(left[0], math.ceil(budget / 2))
    others = sorted(zip(left[1:], shares[1:], strict=True))
    cut = [want for want, given in others if given < want]  # who is not done ...
    assert all(
        given == want for want, given in others if cut and want < cut[0]
    )  # ... has none shorter before


def test_a_long_prompt_holds_running_streams_up_for_one_piece_a_step_at_most(toy, tokenizer):
    engine = Engine(toy, tokenizer, prefill_tokens=16)
    running = [engine.submit(Request(text, max_tokens=1000)) for text in "ab"]
    engine.step()
    toy.prefills.clear()
    long = engine.submit(Request("x" * 999, max_tokens=1))
    late = engine.submit(Request("y" * 9, max_tokens=1))
    steps, ended = 0, {}
    while long not in ended:
        steps += 1
        events = engine.step()
        assert sorted(event.request for event in events if event.request in running) == running
        ended |= {event.request: steps for event in events if event.completion}
    assert all(sum(lengths) <= 16 for lengths in toy.prefills)
    assert ended == {late: 2, long: math.ceil((1000 + 10) / 16)}


def test_nobody_waits_for_a_prompt_that_is_read_with_none_running(toy, tokenizer):
    engine = Engine(toy, tokenizer, prefill_tokens=16)
    engine.submit(Request("x" * IDLE_TOKENS, max_tokens=1))
    engine.step()
    assert toy.prefills == [[IDLE_TOKENS]]


def test_slots_are_given_in_the_order_of_arrival(toy, tokenizer):
    engine = Engine(toy, tokenizer, slots=2)
    for i in range(6):
        engine.submit(Request("p", max_tokens=3 + i % 2, samples=1 + (i == 1) * 3, sampling=GREEDY))
    order = []
    for event in engine.events():
        if (event.request, event.sample) not in order:
            order.append((event.request, event.sample))
    assert order == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (3, 0), (4, 0), (5, 0)]


def test_states_are_admitted_by_their_bytes(toy, tokenizer):
    engine = Engine(toy, tokenizer, max_state_bytes=2999)
    for prompt in "abcd":
        engine.submit(Request(prompt, max_tokens=4, samples=2))
    assert len(finished(engine.events())) == 8
    assert max(toy.steps) == 2
    with pytest.raises(
        UserError, match=r"a state of 1,000 bytes .* more than the 999 bytes of max_state_bytes"
    ):
        Engine(toy, tokenizer, max_state_bytes=999).submit(Request("a"))


@pytest.mark.parametrize("name", few_fast(["softmax", "retention+softmax"], "retention+softmax"))
def test_a_cache_counts_as_long_as_it_may_become_and_holds_no_more(name, tokenizer):
    decoder = ComposedDecoder(model(name), 8)
    size = decoder.state_bytes(64)  # there is room for multiples of that
    engine = Engine(decoder, tokenizer, max_state_bytes=3 * size)

    def step():
        """How many streams got a token."""
        count = len({event.request for event in engine.step()})
        lists = [part for pool in decoder.pools for part in pool.state if isinstance(part, list)]
        held = sum(cache.nbytes for caches in lists for cache in caches)
        used = decoder.slots - len(engine._free)
        assert (held > 0) == (used > 0)
        assert held + used * decoder.state_bytes(0) <= engine._bytes <= 3 * size
        return count

    for prompt in "abcdefgh":
        engine.submit(Request(prompt, max_tokens=30, min_tokens=30))
    assert [step() for _ in range(90)] == [3] * 60 + [2] * 30
    assert not engine.busy
    long = max(n for n in range(64, 1024, 64) if decoder.state_bytes(n) <= 3 * size) - 2
    for prompt, count in (
        ("a", long),
        ("b" * 100, 26),
        ("c", 62),
    ):  # these two wait for the first, and are read together
        engine.submit(Request(prompt, max_tokens=count, min_tokens=count))
    assert [step() for _ in range(long + 62)] == [1] * long + [2] * 26 + [1] * 36
    assert engine._bytes == 0


# -- a text depends on its request alone ----------------------------------------------------------------------


def model(name, vocab_size=257):
    torch.manual_seed(0)
    return LanguageModel(configured(name, vocab_size=vocab_size, d_model=32, num_layers=2)).double().eval()


SAMPLINGS = [
    GREEDY,
    Sampling(),
    Sampling(temperature=0.7, top_k=20),
    Sampling(top_p=0.8, repetition_penalty=1.3),
    Sampling(temperature=1.5, min_p=0.02, presence_penalty=0.5),
    Sampling(temperature=0, frequency_penalty=2.0),
    Sampling(logit_bias={101: 4.0, 102: -4.0}),
]


def requests(count, seed=0):
    """Random ones, but for a text of their own."""
    rng = random.Random(seed)
    return [
        Request(
            "".join(rng.choices("abcdefgh ", k=rng.choice([0, 1, 7, 40, 150]))),
            max_tokens=rng.randint(1, 25),
            sampling=rng.choice(SAMPLINGS),
            samples=rng.choice([1, 1, 1, 3]),
            seed=rng.randint(0, 5),
            stop=rng.choice([(), ("e",), ("ab", "q")]),
            stop_tokens=rng.choice([(), (102,)]),
            min_tokens=rng.choice([0, 0, 1]),
            logprobs=rng.choice([None, None, 0, 3]),
        )
        for _ in range(count)
    ]


def same(one, two):
    """Equal, log-probabilities but for rounding."""
    assert one._replace(logprobs=()) == two._replace(logprobs=())
    assert len(one.logprobs) == len(two.logprobs)
    for a, b in zip(one.logprobs, two.logprobs, strict=True):
        assert a.token == b.token
        assert a.logprob == pytest.approx(b.logprob, abs=1e-9)
        assert [value for _, value in a.top] == pytest.approx([value for _, value in b.top], abs=1e-9)


@pytest.mark.parametrize("name", few_fast(KINDS, "retention+softmax", "hyena"))
def test_every_mixer_gives_every_request_what_it_gives_it_alone(name, tokenizer):
    decoder = ComposedDecoder(model(name), 4)
    asked = requests(10)
    engine = Engine(decoder, tokenizer, prefill_tokens=13)
    waiting, events = list(asked), []
    while waiting or engine.busy:
        if waiting and (len(waiting) % 2 == len(events) % 2 or not engine.busy):
            engine.submit(waiting.pop(0))
        events += engine.step()
    got = finished(events)
    assert len(got) == sum(request.samples for request in asked)
    for number, request in enumerate(asked):
        for sample, completion in enumerate(alone(decoder, tokenizer, request)):
            same(got[number, sample], completion)


@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_random_arrivals_and_cancellations_change_nobody_else(data, toy_model, decoder_of, tokenizer):
    """Free slots hold nothing here: whoever used one would fail."""
    asked = requests(12, seed=data.draw(st.integers(0, 10)))
    decoder = decoder_of(toy_model, 5)
    engine = Engine(decoder, tokenizer, prefill_tokens=data.draw(st.integers(1, 40)))
    waiting, events, cancelled = list(enumerate(asked)), [], set()
    while waiting or engine.busy:
        match data.draw(st.integers(0, 4)):
            case 0 | 1 if waiting:
                number, request = waiting.pop(0)
                assert engine.submit(request) == number
            case 2 if len(waiting) < len(asked):
                number = data.draw(st.integers(0, len(asked) - len(waiting) - 1))
                if engine.cancel(number):
                    cancelled.add(number)
            case _:
                events += engine.step()
        for slot in engine._free:
            decoder.states[slot] = None
    got, texts = finished(events), {}
    for event in events:
        texts[event.request, event.sample] = texts.get((event.request, event.sample), "") + event.text
    assert sorted(got) == sorted((n, s) for n, request in enumerate(asked) for s in range(request.samples))
    assert texts == {key: completion.text for key, completion in got.items()}
    for number, request in enumerate(asked):
        for sample, want in enumerate(alone(decoder_of(toy_model), tokenizer, request)):
            have = got[number, sample]
            if have.finish == "interrupted":
                assert number in cancelled
                assert have.tokens == want.tokens[: len(have.tokens)]
            else:
                same(have, want)
    assert sorted(engine._free) == list(range(5))
    assert engine._bytes == 0


# -- what a request can ask for -------------------------------------------------------------------------------


def test_stop_tokens_end_a_text_and_are_no_part_of_it(scripted, tokenizer):
    (only,) = alone(scripted({"a": b"wxyz"}), tokenizer, Request("a", stop_tokens=[ord("y"), 3]))
    assert (only.text, only.tokens, only.finish) == ("wx", tuple(b"wx"), "stop")


def test_before_min_tokens_nothing_ends_a_text(toy, tokenizer):
    (free,) = alone(toy, tokenizer, Request("a", max_tokens=40, seed=1))
    stop = (free.tokens[3], free.tokens[20])
    (short,) = alone(toy, tokenizer, Request("a", max_tokens=40, seed=1, stop_tokens=stop))
    (long,) = alone(toy, tokenizer, Request("a", max_tokens=40, seed=1, stop_tokens=stop, min_tokens=12))
    assert len(short.tokens) == 3
    assert len(long.tokens) >= 12
    assert not {256, *stop} & {*long.tokens[:12]}


def test_stop_strings_count_after_min_tokens_alone(scripted, tokenizer):
    model = scripted({"a": b"xSTOPySTOPz"})
    (only,) = alone(model, tokenizer, Request("a", stop=["STOP"], min_tokens=5))
    assert (only.text, only.finish) == ("xSTOPy", "stop")


def test_logprobs_are_those_of_the_model_itself(toy, tokenizer):
    request = Request("ab", max_tokens=6, logprobs=3, sampling=Sampling(0.5, top_k=9, repetition_penalty=2))
    engine = Engine(toy, tokenizer)
    engine.submit(request)
    events = list(engine.events())
    completion = events[-1].completion
    read = [256, *b"ab"]
    assert len(completion.logprobs) == len(completion.tokens) == 6
    for token, found in zip(completion.tokens, completion.logprobs, strict=True):
        logits, _ = toy.model.prefill(torch.tensor([read]), toy.model.init_state(1))
        want = logits[0, -1].log_softmax(-1)
        assert found.token == token
        assert found.logprob == pytest.approx(want[token].item(), abs=1e-12)
        assert [i for i, _ in found.top] == want.topk(3).indices.tolist()
        read.append(token)
    assert tuple(event.logprobs for event in events) == completion.logprobs
    assert [event.token for event in events] == list(completion.tokens)


def test_echo_begins_with_the_prompt(scripted, tokenizer):
    engine = Engine(scripted({"a": b"xy", "b": b""}), tokenizer)
    engine.submit(Request("a", echo=True))
    engine.submit(Request([256, ord("a")], echo=True))
    engine.submit(Request("b", echo=True))
    events = list(engine.events())
    assert [completion.text for _, completion in sorted(finished(events).items())] == ["axy", "axy", "b"]
    assert "".join(event.text for event in events if event.request == 0) == "axy"


def test_token_ids_are_read_as_they_are(toy, tokenizer):
    text = Request("abc", max_tokens=9, sampling=GREEDY)
    ids = Request([256, *b"abc"], max_tokens=9, sampling=GREEDY)
    assert alone(toy, tokenizer, ids) == alone(toy, tokenizer, text)
    assert alone(toy, tokenizer, Request([*b"abc"], max_tokens=9)) != alone(toy, tokenizer, text)


def test_an_error_inside_ends_what_had_a_slot_and_nothing_else(toy, tokenizer):
    engine = Engine(toy, tokenizer, slots=2)
    for prompt in "abc":
        engine.submit(Request(prompt, max_tokens=4, sampling=GREEDY))
    engine.step()
    step, toy.step = toy.step, None
    with pytest.raises(TypeError):
        engine.step()
    toy.step = step
    events = [event for _ in range(9) for event in engine.step()]
    got = finished(events)
    assert [got[n, 0].finish for n in range(3)] == ["failed", "failed", "length"]
    assert got[2, 0] == alone(toy, tokenizer, Request("c", max_tokens=4, sampling=GREEDY))[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "prompt has no tokens"),
        ({"prompt": [1, -2]}, "prompt must be whole numbers of 0 or more, got -2"),
        ({"prompt": [True]}, "got True"),
        ({"prompt": [257]}, "prompt has the token id 257, but the vocabulary ends with 256"),
        ({"prompt": "a\ud800"}, "prompt is no text: character 1 is the lone surrogate"),
        ({"max_tokens": True}, "max_tokens must be a whole number of 1 or more, got True"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10, "min_tokens": 11}, "min_tokens 11 is above max_tokens 10"),
        ({"logprobs": -1}, "logprobs must be a whole number of 0 or more, got -1"),
        ({"stop_tokens": [2**63]}, f"stop_tokens has the token id {2**63}"),
        ({"sampling": Sampling(logit_bias={300: 1})}, "logit_bias has the token id 300"),
    ],
)
def test_mistakes_are_named(toy, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        Engine(toy, tokenizer).submit(Request(**{"prompt": "a", **options}))
