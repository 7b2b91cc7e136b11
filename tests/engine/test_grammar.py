import json
import re
import sys

import pytest
import torch

from retnet.data import Tokenizer
from retnet.engine import Engine, Grammar, Request, Sampling
from retnet.settings import UserError

HOT = Sampling(temperature=5.0)  # a grammar must hold whatever the model likes
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def complete(decoder, tokenizer, grammar, **options):
    return Engine(decoder, tokenizer).complete(
        Request("a", grammar=grammar, **{"max_tokens": 400, "sampling": HOT} | options)
    )


@pytest.mark.parametrize("schema", [PERSON, json.dumps(PERSON)])
def test_json_follows_its_schema(toy, tokenizer, schema):
    for seed in range(4):
        (only,) = complete(toy, tokenizer, Grammar(json_schema=schema), seed=seed)
        assert only.finish == "end"
        value = json.loads(only.text)
        assert set(value) == {"name", "age", "kind"}
        assert len(value["name"]) <= 8
        assert 0 <= value["age"] <= 150
        assert value["kind"] in ("cat", "dog")


def test_a_regular_expression_is_matched_whole(toy, tokenizer):
    texts = [row.text for row in complete(toy, tokenizer, Grammar(regex="(ab|c[0-9é])+X"), samples=12)]
    assert all(re.fullmatch("(ab|c[0-9é])+X", text) for text in texts)
    assert len(set(texts)) > 3


def test_choices_are_kept_to_and_all_of_them_happen(toy, tokenizer):
    choices = ("yes", "no", "no way", 'a "quote"\n', "é\\d")
    rows = complete(toy, tokenizer, Grammar(choice=choices), samples=80)
    assert {row.text for row in rows} == set(choices)
    assert {row.finish for row in rows} == {"end"}


def test_tokens_of_several_characters(toy_model, decoder_of):
    tokenizer = Tokenizer.train(["true false null 12 34 hello world", '{"a": [1, 2]}'] * 9, 280)
    model = type(toy_model)(vocab_size=tokenizer.vocab_size)
    (only,) = complete(decoder_of(model), tokenizer, Grammar(json_schema=PERSON))
    assert set(json.loads(only.text)) == {"name", "age", "kind"}


def test_others_are_not_bound_by_it(toy, tokenizer):
    engine = Engine(toy, tokenizer)
    free = Request("b", max_tokens=30)
    (want,) = engine.complete(free)
    bound = engine.submit(Request("a", grammar=Grammar(choice=["xyz" * 20]), max_tokens=100))
    assert engine.complete(free) == [want]
    (last,) = [event.completion for event in engine.events() if event.completion]
    assert (last.text, bound) == ("xyz" * 20, 1)


def test_the_limit_cuts_it(toy, tokenizer):
    (only,) = complete(toy, tokenizer, Grammar(choice=["abcdef"]), max_tokens=3)
    assert (only.text, only.finish) == ("abc", "length")


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ({}, "got none of them"),
        ({"regex": "a", "choice": ["b"]}, "got regex, choice"),
        ({"regex": 5}, "regex must be a string, got 5"),
        ({"regex": "(a"}, "unclosed group"),
        ({"choice": []}, "list of strings that are not empty"),
        ({"choice": ["a", ""]}, "list of strings that are not empty"),
        ({"choice": "abc"}, "list of strings"),
        ({"json_schema": "{bad"}, "json_schema is not JSON"),
        ({"json_schema": {"type": "nonsense"}}, "nonsense"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "Unsatisfiable schema"),
        ({"json_schema": {"a": {1, 2}}}, "json_schema is not JSON"),
    ],
)
def test_mistakes_are_named(toy, tokenizer, grammar, message):
    with pytest.raises(UserError, match=message):
        Engine(toy, tokenizer).submit(Request("a", grammar=Grammar(**grammar)))


def test_min_tokens_is_another_wish(toy, tokenizer):
    with pytest.raises(UserError, match="opposite things"):
        Request("a", grammar=Grammar(regex="a"), min_tokens=3)


def test_without_the_library_it_says_what_to_install(toy, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install 'retnet\[grammar\]'"):
        Engine(toy, tokenizer).submit(Request("a", grammar=Grammar(regex="a")))


def test_a_grammar_that_takes_too_much_work_fails_its_own_request_alone(toy, tokenizer):
    from retnet.engine.grammar import Constraint

    class Heavy(Constraint):
        def __init__(self, fails):
            self.fails = fails

        def copy(self):
            return self

        def forbidden(self, vocab_size):
            if self.fails == "mask":
                raise UserError("too complex")
            return torch.zeros(vocab_size, dtype=torch.bool)

        def push(self, token):
            raise UserError("too complex")

    for fails in ("mask", "push"):
        engine = Engine(toy, tokenizer)
        engine.submit(Request("a", max_tokens=5))
        engine._queue[0].streams[0].constraint = Heavy(fails)
        engine.submit(Request("b", max_tokens=5))
        events = [event for _ in range(9) for event in engine.step()]
        done = {event.request: event.completion for event in events if event.completion}
        assert (done[0].finish, done[0].error, done[0].tokens) == ("failed", "too complex", ())
        assert done[1].finish == "length"
