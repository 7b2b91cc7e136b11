import pytest
import torch

from retnet.engine import Completion, Engine, Request, Sampling, generate, probabilities
from retnet.engine.sampling import NOT_FINITE
from retnet.model import LanguageModel, ModelConfig
from retnet.settings import UserError

GREEDY = Sampling(temperature=0)
BOS = 256


def run(decoder, tokenizer, prompts, *, slots=None, prefill_tokens=256, **options):
    """The engine, when it has made everything, and the completions."""
    engine = Engine(decoder, tokenizer, slots=slots, prefill_tokens=prefill_tokens)
    for prompt in prompts:
        engine.submit(Request(prompt, **options))
    return engine, finished(engine.events())


def finished(events):
    """Completions of each request, by sample."""
    done = {(event.request, event.sample): event.completion for event in events if event.completion}
    return [[done[key] for key in sorted(done) if key[0] == p] for p in sorted({p for p, _ in done})]


def texts(completions):
    return [[completion.text for completion in rows] for rows in completions]


def ids(completions):
    return [[completion.tokens for completion in rows] for rows in completions]


# -- what is generated ----------------------------------------------------------------------------------------


def test_greedy_decoding_equals_reading_everything_anew_for_each_token(toy, tokenizer):
    (only,) = generate(toy, tokenizer, ["héllo"], max_tokens=30, sampling=GREEDY)[0]
    read = [BOS, *"héllo".encode()]
    for token in only.tokens:
        logits, _ = toy.model.prefill(torch.tensor([read]), toy.model.init_state(1))
        assert token == logits[0, -1].argmax()
        read.append(token)
    assert len(only.tokens) == 30
    assert only.finish == "length"
    assert only.prompt_tokens == 7


def test_samples_follow_the_distribution(toy, tokenizer):
    sampling = Sampling(temperature=2, top_k=5)
    logits, _ = toy.model.prefill(torch.tensor([[BOS, 65]]), toy.model.init_state(1))
    expected = probabilities(logits[:, -1], sampling)[0]
    n = 4000
    rows = generate(toy, tokenizer, ["A"], max_tokens=1, sampling=sampling, samples=n)[0]
    counts = torch.bincount(torch.tensor([row.tokens[0] for row in rows]), minlength=257)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi2 = ((counts - n * expected)[kept] ** 2 / (n * expected[kept])).sum()
    assert kept.sum() == 5
    assert chi2 < 23.5  # 4 degrees of freedom: probability 1e-4


def test_a_sample_depends_on_prompt_seed_and_its_number_only(toy, tokenizer):
    def ids_of(prompts, **options):
        return ids(generate(toy, tokenizer, prompts, max_tokens=20, **options))

    three = ids_of(["ab"], samples=3)[0]
    assert ids_of(["ab"], samples=1)[0] == three[:1]
    assert ids_of(["ab"], samples=8)[0][:3] == three
    assert ids_of(["other", "ab", ""], samples=3)[1] == three
    assert len(set(three)) == 3
    assert ids_of(["ab"], samples=3, seed=1)[0] != three
    assert len({*three, *ids_of(["ab"], samples=3, seed=1)[0]}) == 6
    for slots in (1, 2, 5):
        _, got = run(toy, tokenizer, ["x", "ab"], max_tokens=20, samples=3, slots=slots)
        assert ids(got)[1] == three


@pytest.mark.parametrize("size", [1, 7, 50])
def test_a_prompt_in_pieces_is_the_prompt(toy, tokenizer, size):
    prompt = "It is a truth universally acknowledged, " * 4
    whole = generate(toy, tokenizer, [prompt], max_tokens=12)
    engine = Engine(toy, tokenizer, prefill_tokens=size)
    engine.submit(Request("running", max_tokens=1000))  # so that a step reads no more than this
    engine.step()
    toy.prefills.clear()
    number = engine.submit(Request(prompt, max_tokens=12))
    events = []
    while not any(event.completion for event in events):
        events = [event for event in engine.step() if event.request == number]
    assert events[0].completion == whole[0][0]
    assert max(max(lengths) for lengths in toy.prefills) == size
    assert sum(sum(lengths) for lengths in toy.prefills) == whole[0][0].prompt_tokens == 161


def test_a_prompt_is_read_once_for_all_its_samples(toy, tokenizer):
    run(toy, tokenizer, ["abc", ""], max_tokens=3, samples=5, slots=2)
    assert toy.prefills == [[4, 1]]


def test_ids_beyond_the_tokenizer_are_never_chosen(script, decoder_of, tokenizer):
    class Wide(script):
        def _logits(self, state):
            logits = super()._logits(state)
            logits[:, 257:] = 100.0
            return logits

    model = decoder_of(Wide({"a": b"xyz"}, vocab_size=320))
    assert texts(generate(model, tokenizer, ["a"], max_tokens=9)) == [["xyz"]]


def test_the_penalty_knows_prompt_and_output_but_not_the_beginning(script, decoder_of, tokenizer):
    class Fixed(script):
        """Likes 1, 2, 3, 4, then BOS, whatever was said."""

        def step(self, tokens, state):
            return self._logits(state), state

        def _logits(self, state):
            logits = torch.zeros(len(state[0]), 257)
            logits[:, [1, 2, 3, 4, BOS]] = torch.tensor([9.0, 8, 7, 6, 5])
            return logits

    sampling = Sampling(temperature=0, repetition_penalty=100)
    (only,) = generate(decoder_of(Fixed({})), tokenizer, ["\x02"], max_tokens=9, sampling=sampling)[0]
    assert only.tokens == (1, 3, 4)
    assert only.finish == "end"


# -- how texts end --------------------------------------------------------------------------------------------


def test_rows_that_end_leave_the_batch_and_change_nothing_for_the_others(scripted, tokenizer):
    scripts = {"a": b"1", "b": b"22222", "c": b"333", "d": b"", "e": b"4444444"}
    model = scripted(scripts)
    got = generate(model, tokenizer, list(scripts), max_tokens=6)
    assert got == [
        [Completion(text, tuple(text.encode()), finish, 2)]
        for text, finish in [
            ("1", "end"),
            ("22222", "end"),
            ("333", "end"),
            ("", "end"),
            ("444444", "length"),
        ]
    ]
    assert model.steps == [4, 3, 3, 2, 2]


def test_waiting_rows_take_the_places_of_those_that_ended(scripted, tokenizer):
    scripts = {"a": b"1", "b": b"22222", "c": b"333", "d": b"", "e": b"4444444"}
    model = scripted(scripts)
    _, got = run(model, tokenizer, list(scripts), max_tokens=9, samples=2, slots=3)
    assert texts(got) == [[text.decode()] * 2 for text in scripts.values()]
    assert max(model.steps) == 3


def test_a_stop_string_over_several_tokens_is_never_shown(scripted, tokenizer):
    model = scripted({"a": b"one\n\ntwo\n\n\nthree"})
    shown = []
    got = generate(
        model, tokenizer, ["a"], max_tokens=50, stop=["\n\n\n", "zzz"], on_text=lambda p: shown.append(p.text)
    )
    assert got[0][0].text == "".join(shown) == "one\n\ntwo"
    assert got[0][0].finish == "stop"
    assert got[0][0].tokens == tuple(b"one\n\ntwo\n\n\n")
    assert shown == ["o", "n", "e", "", "", "\n\nt", "w", "o", "", "", ""]  # held back, then let go


@pytest.mark.parametrize(("limit", "finish"), [(3, "length"), (9, "end")])
def test_what_was_held_back_comes_out_at_the_end(scripted, tokenizer, limit, finish):
    model = scripted({"a": b"xST"})
    pieces = []
    generate(model, tokenizer, ["a"], max_tokens=limit, stop=["STOP"], on_text=pieces.append)
    assert "".join(piece.text for piece in pieces) == "xST"
    assert [piece.completion for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].completion == Completion("xST", tuple(b"xST"), finish, 2)


def test_a_stop_string_with_the_last_token_is_a_stop(scripted, tokenizer):
    got = generate(scripted({"a": b"xSTOP"}), tokenizer, ["a"], max_tokens=5, stop=["STOP"])
    assert got[0][0] == Completion("x", tuple(b"xSTOP"), "stop", 2)


def test_a_character_of_several_tokens_is_never_broken(scripted, tokenizer):
    text = "né 🦊\u200d🔥 漢"
    shown = []
    got = generate(
        scripted({"a": text.encode()}),
        tokenizer,
        ["a"],
        max_tokens=99,
        on_text=lambda p: shown.append(p.text),
    )
    assert [piece for piece in shown if piece] == list(text)
    assert got[0][0].text == text
    assert len(got[0][0].tokens) == len(text.encode())


def test_a_stop_string_of_several_bytes(scripted, tokenizer):
    model = scripted({"a": "x🔥🦊🦊y".encode()})
    assert texts(generate(model, tokenizer, ["a"], max_tokens=99, stop=["🦊🦊"])) == [["x🔥"]]


def test_a_character_cut_by_the_limit_reads_as_decode_reads_it(scripted, tokenizer):
    model = scripted({"a": "x🦊".encode()})
    (only,) = generate(model, tokenizer, ["a"], max_tokens=3)[0]
    assert only.text == tokenizer.decode(only.tokens) == "x\ufffd"


def test_pieces_add_up_to_the_texts(toy, tokenizer):
    added = [["", ""], ["", ""]]
    last = {}

    def see(event):
        added[event.request][event.sample] += event.text
        last[event.request, event.sample] = event.completion

    got = generate(toy, tokenizer, ["a", "b"], max_tokens=40, samples=2, stop=["e"], on_text=see)
    assert added == texts(got)
    assert [[last[p, s] for s in (0, 1)] for p in (0, 1)] == got


# -- leaving early, counting, mistakes ------------------------------------------------------------------------


def test_leaving_early_keeps_what_was_made(scripted, tokenizer):
    engine = Engine(scripted({"a": b"xSTOP", "b": b"y"}), tokenizer)
    for prompt in "ab":
        engine.submit(Request(prompt, max_tokens=9, stop=["STOP"]))
    seen = []
    for event in engine.events():
        seen.append(event)
        if sum(event.request == 0 for event in seen) == 3:
            break
    assert engine.cancel(0)
    assert not engine.cancel(1)
    seen += engine.events()
    first, second = (rows[0] for rows in finished(seen))
    assert first == Completion("xST", tuple(b"xST"), "interrupted", 2)
    assert second.text == "y"
    assert "".join(event.text for event in seen if event.request == 0) == "xST"
    assert not engine.busy


def test_nothing_of_inference_mode_leaks_into_the_loop(toy, tokenizer):
    def see(event):
        assert not torch.is_inference_mode_enabled()
        assert (toy.model.embedding * 2).requires_grad

    generate(toy, tokenizer, ["a"], max_tokens=2, on_text=see)


def test_stats_count_every_token(toy, tokenizer):
    engine, got = run(toy, tokenizer, ["abc", ""], max_tokens=5, samples=2)
    total = sum(len(row.tokens) for rows in got for row in rows)
    assert total == 20
    assert engine.stats.prefill_tokens == 5
    assert engine.stats.decode_tokens == total - 4
    assert engine.stats.prefill_seconds > 0
    assert engine.stats.decode_seconds > 0


def test_no_prompts_give_no_completions(toy, tokenizer):
    assert generate(toy, tokenizer, [], max_tokens=5) == []


def test_a_model_in_training_mode_is_refused(tokenizer):
    model = LanguageModel(ModelConfig(vocab_size=257, d_model=32, num_layers=1)).train()
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        generate(model, tokenizer, ["a"], max_tokens=1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_without_meaning_fail_their_own_request_alone(script, decoder_of, tokenizer, bad):
    class Diverged(script):
        def _logits(self, state):
            logits = super()._logits(state)
            logits[state[0][:, 1] == 2] = bad
            return logits

    decoder = decoder_of(Diverged({"a": b"xyzuv", "b": b"s"}))
    engine = Engine(decoder, tokenizer)
    for prompt in "ab":
        engine.submit(Request(prompt, max_tokens=9))
    events = [event for _ in range(9) for event in engine.step()]
    assert finished(events) == [
        [Completion("xy", tuple(b"xy"), "failed", 2, error=NOT_FINITE)],
        [Completion("s", tuple(b"s"), "end", 2)],
    ]
    with pytest.raises(UserError, match="not finite"):
        generate(decoder, tokenizer, ["a"], max_tokens=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number of 1 or more, got 0"),
        ({"samples": 0}, "samples must be"),
        ({"seed": -1}, "seed must be a whole number of 0 or more, got -1"),
        ({"seed": 0.5}, "seed must be"),
        ({"stop": [""]}, "stop string"),
        ({"stop": "abc"}, "list of strings"),
        ({"prompts": "abc"}, "list of strings"),
    ],
)
def test_mistakes_are_named(toy, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        generate(toy, tokenizer, **{"prompts": ["a"], "max_tokens": 5, **options})
