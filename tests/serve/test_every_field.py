"""Every field of every route with values that it may not have: 4xx and a sentence that names it, and nobody is disturbed."""

import copy
import json
import socket

import pytest

from retnet.serve.bodies import (
    AppendBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EditBody,
    EmbeddingBody,
    EmptyBody,
    RewindBody,
    SessionBody,
    SessionGenerateBody,
    TokenizeBody,
    _bodies_in,
)
from retnet.serve.conversation_bodies import CountBody, MessagesBody, ResponsesBody
from tests.helpers.fast import few_fast
from tests.helpers.serving import refused

NAN = float("nan")
VALUES = [-1, 0, 2**63, 1e12, "abc", True, 1.5, NAN, [], {}, [[]], "\ud800", "\0", None]
# What each field may be, of these values, by its name or by that of its body too; everything else is refused.
TEXT = ["abc", "\0"]
FINE = {
    "model": [],
    "temperature": [0, 1.5],
    "MessagesBody.temperature": [0],
    "top_p": [],
    "top_k": [0],
    "min_p": [0],
    "presence_penalty": [-1, 0, 1.5],
    "frequency_penalty": [-1, 0, 1.5],
    "repetition_penalty": [1.5],
    "logit_bias": [{}],
    "stop": [*TEXT, []],
    "stop_token_ids": [[]],
    "stop_sequences": [[]],
    "min_tokens": [0],
    "seed": [0],
    "stream": [True],
    "stream_options": [{}],
    "include_usage": [True],
    "continuous_usage_stats": [True],
    "ignore_eos": [True],
    "user": TEXT,
    "cache": [True],
    "json_schema": [{}],
    "ResponseFormat.json_schema": [],
    "regex": TEXT,
    "choice": [],
    "prompt": TEXT,
    "max_tokens": [],
    "max_completion_tokens": [],
    "max_output_tokens": [],
    "n": [],
    "logprobs": [0],
    "ChatBody.logprobs": [True],
    "top_logprobs": [0],
    "echo": [True],
    "messages": [],
    "role": [],
    "content": [*TEXT, []],
    "name": TEXT,
    "type": [],
    "text": TEXT,
    "response_format": [],
    "strict": [True],
    "schema": [{}],
    "input": TEXT,
    "encoding_format": [],
    "add_special_tokens": [True],
    "tokens": [],
    "DetokenizeBody.tokens": [[]],
    "position": [],
    "system": [*TEXT, []],
    "instructions": TEXT,
    "previous_response_id": [],
    "store": [True],
}
PARTS = [{"type": "text", "text": "a"}]
SAID = [{"role": "user", "content": "a"}, {"role": "user", "content": PARTS}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {"type": "integer"}}}
ITEMS = [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]
# Good bodies, which have every inner one somewhere.
ROUTES = {
    "/v1/completions": (
        CompletionBody,
        [{"prompt": "a", "max_tokens": 1, "stream": True, "stream_options": {"include_usage": True}}],
    ),
    "/v1/chat/completions": (
        ChatBody,
        [
            {"messages": SAID, "max_tokens": 1, "stream": True, "stream_options": {}},
            {"messages": SAID[:1], "max_tokens": 1, "response_format": SCHEMA},
        ],
    ),
    "/v1/embeddings": (EmbeddingBody, [{"input": "a"}]),
    "/v1/messages": (MessagesBody, [{"messages": SAID, "max_tokens": 1, "system": PARTS}]),
    "/v1/messages/count_tokens": (CountBody, [{"messages": SAID, "system": PARTS}]),
    "/v1/responses": (ResponsesBody, [{"input": ITEMS, "max_output_tokens": 1}]),
    "/tokenize": (TokenizeBody, [{"prompt": "a"}]),
    "/detokenize": (DetokenizeBody, [{"tokens": [1]}]),
    "/v1/sessions": (SessionBody, [{"text": "a"}, {"tokens": [1]}]),
    "/v1/sessions/{session}/append": (AppendBody, [{"text": "a"}, {"tokens": [1]}]),
    "/v1/sessions/{session}/rewind": (RewindBody, [{"position": 4}]),
    "/v1/sessions/{session}/edit": (EditBody, [{"position": 4, "text": "a"}, {"position": 4, "tokens": [1]}]),
    "/v1/sessions/{session}/fork": (EmptyBody, [{}]),
    "/v1/sessions/{session}/save": (EmptyBody, []),  # without --sessions it is refused
    "/v1/sessions/{session}/generate": (
        SessionGenerateBody,
        [{"max_tokens": 1, "stream": True, "stream_options": {"include_usage": True}}],
    ),
}

LONG = {
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/messages",
    "/v1/responses",
    "/v1/sessions/{session}/generate",
}  # seconds each


def fields(kind, body, place=()):
    """Every field of a body and of those inside it: body, name, where it is."""
    for field, info in kind.model_fields.items():
        name = info.alias or field
        yield kind, name, (*place, name)
        inner = _bodies_in(info.annotation)
        value = body.get(name)
        found = enumerate(value) if isinstance(value, list) else [(None, value)]
        for number, each in found:
            if inner and isinstance(each, dict):
                here = (*place, name) if number is None else (*place, name, number)
                yield from fields(inner[0], each, here)


def replaced(body, place, value):
    body = copy.deepcopy(body)
    target = body
    for part in place[:-1]:
        target = target[part]
    target[place[-1]] = value
    return body


def is_fine(kind, name, value):
    allowed = FINE.get(f"{kind.__name__}.{name}", FINE.get(name))
    return any(type(value) is type(each) and value == each for each in allowed)


def post(http, url, body):
    content = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8", "surrogatepass")
    return http.post(url, content=content, headers={"Content-Type": "application/json"})


@pytest.fixture(scope="module")
def session(http):
    return http.post("/v1/sessions", json={"text": "abcdef"}).json()["id"]


def test_every_route_that_takes_a_body_is_walked(http):
    paths = http.get("/openapi.json").json()["paths"]
    taking = {path for path, verbs in paths.items() for verb in verbs.values() if "requestBody" in verb}
    assert taking == ROUTES.keys() | {"/v1/sessions/import"}


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize("route", few_fast(ROUTES, *(ROUTES.keys() - LONG)))
def test_bad_values_in_every_field(http, session, route):
    kind, goods = ROUTES[route]
    url = route.replace("{session}", session)
    seen = set()
    for good in goods:
        assert post(http, url, good).status_code in (200, 201), good
        for inner, name, place in fields(kind, good):
            for value in VALUES:
                case = place, repr(value), name in good
                if case not in seen:
                    seen.add(case)
                    check(http, url, replaced(good, place, value), inner, name, place, value, good)


def check(http, url, body, kind, name, place, value, good):
    response = post(http, url, body)
    without = copy.deepcopy(good)
    target = without
    for part in place[:-1]:
        target = target[part]
    target.pop(name, None)
    if value is None:
        expected = post(http, url, without)
        assert response.status_code == expected.status_code, (place, response.text)
        assert response.status_code < 500
        return
    if is_fine(kind, name, value) and not clashes(body):
        assert response.status_code in (200, 201), (place, value, response.text)
        return
    missing = name in ("model", "previous_response_id") and value in TEXT
    message = refused(response, 404 if missing else 400)
    told = missing or "JSON" in message or clashes(body)
    assert told or any(str(part) in message for part in place), (place, value, message)


def clashes(body):
    """Fields that are right alone, and not together."""
    both = "text" in body and "tokens" in body
    grammar = "response_format" in body and ("json_schema" in body or "regex" in body)
    return (
        both
        or grammar
        or ("max_tokens" in body and "max_completion_tokens" in body)
        or (body.get("stream_options") is not None and not body.get("stream"))
    )


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize("route", ROUTES)
def test_bodies_that_are_no_request(http, server, session, route):
    url = route.replace("{session}", session)
    _, goods = ROUTES[route]
    name = next(iter(goods[0])) if goods and goods[0] else "x"
    for content in (
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"%b": "\xff"}' % name.encode(),
        b'{"%b": "\\ud800"}' % name.encode(),
        b'{"%b": NaN}' % name.encode(),
        b'{"%b": %b}' % (name.encode(), b"9" * 5000),
        b"[" * 10_000,
        b'{"%b": ' % name.encode() + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"no such field": 1}',
        b"\xef\xbb\xbf{",
    ):
        refused(post(http, url, content))
    assert "application/json" in refused(
        http.post(url, content=b"{}", headers={"Content-Type": "text/plain"}), 415
    )
    length = 100 << 20
    with socket.create_connection(server.found.getsockname(), timeout=10) as connection:
        head = f"POST {url} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode())  # is not waited for
        assert b" 413 " in connection.recv(1 << 16).splitlines()[0]


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize(
    "value", ["x", "0" * 32, "..%2F..%2Fetc%2Fpasswd", "%00", "%FF", "%ED%A0%80", "a" * 5000, "-1"]
)
def test_names_in_paths(http, value):
    for path in ("/v1/models", "/v1/responses", "/v1/sessions"):
        refused(http.get(f"{path}/{value}"), 404)
    for path in ("/v1/responses", "/v1/sessions"):
        refused(http.delete(f"{path}/{value}"), 404)
    for route, (_, goods) in ROUTES.items():
        if "{session}" in route and goods:
            refused(post(http, route.replace("{session}", value), goods[0]), 404)


def test_values_in_a_query(http, session):
    for value in ("abc", "-1", "2", "%FF", "1.5", "%00"):
        assert "every" in refused(http.get(f"/v1/sessions/{session}/export?every={value}"))
