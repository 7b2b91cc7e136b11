"""Bad bodies are answered with 4xx and a sentence, while another stream's tokens stay what they are."""

import json

import pytest
from pydantic import ValidationError

from retnet.serve.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    SamplingBody,
    SessionBody,
    SessionGenerateBody,
    parse,
)
from retnet.serve.conversation_bodies import MessagesBody, ResponsesBody
from retnet.serve.errors import ApiError
from tests.helpers.serving import refused

NAN = float("nan")


def content(body):
    return json.dumps(body).encode("utf-8", "surrogatepass")


def post(http, url, body, **headers):
    return http.post(url, content=content(body), headers={"Content-Type": "application/json", **headers})


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_tokns": 3}, "there is no field 'max_tokns'; did you mean 'max_tokens'"),
        ({"best_of": 3}, "best_of is not supported"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty must be greater than or equal to 0.000001"),
        ({"stop": ["x"] * 1000}, "stop must be a string, or up to 16"),
        ({"prompt": 3}, "prompt must be a string, a list of strings"),
        ({"stop": "x" * 10**6}, "stop must be a string, or up to 16, each of 1 to 1,024"),
        ({"prompt": [""] * 2049}, "of at most 2,048 texts"),
        ({f"field_{i}": 1 for i in range(101)}, "the body must have at most 100 fields, got 101"),
        ({"stop": ["x" * 10**6]}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"logit_bias": {"abc": 1.0}}, "'abc' for a token id"),
        ({"logit_bias": {"999": 1.0}}, "token id 999"),
        ({"logit_bias": {"-1": 1.0}}, "'-1' for a token id"),
        ({"logit_bias": {"1": NAN}}, "logit_bias"),
        ({"prompt": [257]}, "token id 257"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"stop_token_ids": [257]}, "token id 257"),
        ({"min_tokens": 17}, "min_tokens 17 is above max_tokens 16"),
        ({"stream_options": {"include_usage": True}}, "needs stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "no field 'x'"),
        ({"echo": True, "prompt": [[1], [257]]}, "token id 257"),
        ({"echo": True, "logprobs": 1}, "echo with logprobs"),
    ],
)
def test_bad_bodies(http, body, message):
    assert message in refused(post(http, "/v1/completions", body))


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize("temperature", [5e-324, 1000])
@pytest.mark.parametrize("top_p", [5e-324, 1])
@pytest.mark.parametrize("repetition_penalty", [1e-6, 1000])
@pytest.mark.parametrize("penalty", [-1000, 1000])
def test_extreme_values_are_values(http, temperature, top_p, repetition_penalty, penalty):
    body = {
        "prompt": "abc",
        "temperature": temperature,
        "top_p": top_p,
        "top_k": 2**31 - 1,
        "min_p": 5e-324,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": penalty,
        "frequency_penalty": penalty,
        "logit_bias": {"65": penalty, "66": -penalty},
        "max_tokens": 4,
    }
    assert post(http, "/v1/completions", body).status_code == 200


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b'"x"',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"temperature": NaN}',
        b'{"temperature": 1e999}',
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b"[" * 10_000,
        b'{"a":' * 10_000,
        b'{"json_schema":' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001,
        b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    ],
    ids=range(15),
)
def test_bodies_that_are_no_request(http, content):
    refused(http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"}))


@pytest.mark.usefixtures("undisturbed")
def test_huge_bodies(http):
    head = {"Content-Type": "application/json"}
    most = 16_777_216
    assert "bytes" in refused(http.post("/v1/completions", content=b"x" * (most + 1), headers=head), 413)
    refused(http.post("/v1/completions", content=b"[" * most, headers=head))
    refused(post(http, "/v1/completions", {"prompt": [1] * 1_100_000}))


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages is missing"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{}]}, "messages[0].role is missing"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role must be"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "tool_calls is not supported"),
        ({"tools": []}, "tools is not supported"),
        ({"top_logprobs": 3}, "logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "give one"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "no json_schema"),
        ({"n": 0}, "n must be"),
    ],
)
def test_bad_conversations(http, body, message):
    good = {} if body in ({},) else {"messages": [{"role": "user", "content": "a"}]}
    assert message in refused(post(http, "/v1/chat/completions", good | body))


MANY = 10_000


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionBody, {"prompt": [None] * MANY}),
        (CompletionBody, {"prompt": [[None] * MANY] * 3}),
        (CompletionBody, {"prompt": [""] * MANY}),
        (CompletionBody, {"stop": [1] * MANY, "stop_token_ids": [""] * MANY, "choice": [1] * MANY}),
        (CompletionBody, {"logit_bias": {str(i): "x" for i in range(MANY)}}),
        (CompletionBody, {str(i): 1 for i in range(MANY)}),
        (ChatBody, {"messages": [{}] * MANY}),
        (ChatBody, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
        (EmbeddingBody, {"input": [None] * MANY}),
        (DetokenizeBody, {"tokens": [None] * MANY}),
        (MessagesBody, {"messages": [{}] * MANY, "max_tokens": 1, "system": [{}] * MANY}),
        (ResponsesBody, {"input": [{}] * MANY}),
        (SessionBody, {"tokens": [None] * MANY}),
    ],
)
def test_of_many_faults_few_are_looked_at(kind, body):
    """Each is an object with a dictionary: a body of 16 MB has room for millions."""
    with pytest.raises(ValidationError) as found:
        kind.model_validate_json(content(body))
    assert found.value.error_count() < 40
    with pytest.raises(ApiError):
        parse(kind, content(body))


def test_all_bodies_share_the_sampling_fields():
    for kind in (CompletionBody, ChatBody, SessionGenerateBody):
        assert SamplingBody.model_fields.keys() <= kind.model_fields.keys()
