"""/v1/chat/completions, templates, tokens and the API's description."""

import asyncio
import json

import pytest

from retnet.engine import ComposedDecoder, Engine, Request, Sampling
from retnet.serve import chat_template, plain_routes
from tests.helpers.serving import joined, refused, stream

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]},
]
PLAIN = "System: Be brief.\n\nUser: What is 2 + 2?\n\nAssistant:"
CHATML = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developers') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content.split('</think>')[-1] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def templated(serving, tmp_path_factory):
    """Servers with a template of their own, by its text."""

    def start(template, **config):
        folder = tmp_path_factory.mktemp("folder")
        config = {"bos_token": {"content": "<|bos|>"}, **config}
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        return serving(folder=folder)

    return start


def greedy(tiny, tokenizer, text, stop=()):
    engine = Engine(ComposedDecoder(tiny, 2), tokenizer, exact=True)
    return engine.complete(Request(text, max_tokens=10, sampling=Sampling(temperature=0), stop=stop))[0].text


def count(http, *messages):
    """Tokens of a prompt."""
    reply = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()
    return reply["usage"]["prompt_tokens"]


def test_the_plain_template(http, tiny, tokenizer):
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 10}
    reply = http.post("/v1/chat/completions", json=body).json()
    want = greedy(tiny, tokenizer, PLAIN, ["\n\nUser:"])
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": want, "refusal": None}
    assert reply["usage"]["prompt_tokens"] == len(PLAIN) + 1
    events = stream(http, "/v1/chat/completions", body)
    assert joined(events) == want
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in event["choices"][0]["delta"] for event in events[1:])
    assert events[0]["object"] == "chat.completion.chunk"
    lengths = {count(http, {"role": "assistant", "content": text}) for text in ("yes", " yes")}
    assert lengths == {1 + len("Assistant: yes\n\nAssistant:")}


def test_a_turn_encodes_only_what_is_new(tokenizer, tmp_path, monkeypatch):
    encoded, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: encoded.append(text) or encode(text))
    template = chat_template.ChatTemplate(tokenizer, tmp_path)
    said = [("user", "a"), ("assistant", "b"), ("user", "c"), ("user", "d" * chat_template.SHORT)]
    turns = [chat_template.ChatTurn(*each) for each in said]
    tokens = [asyncio.run(template.render(turns[:count])).tokens for count in (1, 3, 1, 4, 4)]
    new = ["User: a\n\n", "Assistant:", "Assistant: b\n\n", "User: c\n\n"]
    assert encoded == [*new, f"User: {turns[3].text}\n\n", f"User: {turns[3].text}\n\n"]
    assert tokens[0] == tokens[2] == [tokenizer.bos_id, *encode("User: a\n\nAssistant:")]
    assert tokens[3] == tokens[4]


def test_logprobs(http):
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    content = http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    assert all(len(place["top_logprobs"]) == 2 and place["logprob"] <= 0 for place in content)
    assert all(place["token"] == bytes(place["bytes"]).decode("utf-8", "replace") for place in content)
    streamed = stream(http, "/v1/chat/completions", body)
    places = [place for event in streamed for place in event["choices"][0]["logprobs"]["content"]]
    assert places == content


def test_a_json_schema(http):
    pytest.importorskip("llguidance")
    schema = {"name": "answer", "schema": {"enum": ["yes", "no"]}}
    for form in ({"type": "json_schema", "json_schema": schema},):
        body = {"messages": MESSAGES, "max_tokens": 20, "response_format": form}
        content = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert json.loads(content) in ("yes", "no")


def test_the_next_turn_is_read_on_from_the_last(http):
    long = [{"role": "user", "content": "x" * 400}]
    body = {"messages": long, "max_tokens": 5, "seed": 1}
    first = http.post("/v1/chat/completions", json=body).json()
    answer = first["choices"][0]["message"]["content"]
    long += [{"role": "assistant", "content": answer}, {"role": "user", "content": "go on"}]
    second = http.post("/v1/chat/completions", json={**body, "messages": long}).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 384


def test_the_template_of_the_folder(templated, tiny, tokenizer):
    with templated(CHATML) as server:
        body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 10}
        reply = server.http.post("/v1/chat/completions", json=body).json()
        want = greedy(tiny, tokenizer, "<|system|>Be brief.\n<|user|>What is 2 + 2?\n<|assistant|>")
        assert reply["choices"][0]["message"]["content"] == want
        assert reply["usage"]["prompt_tokens"] == 1 + len(
            "<|system|>Be brief.\n<|user|>What is 2 + 2?\n<|assistant|>"
        )
        said = {"messages": [{"role": "developer", "content": "x"}]}
        assert "no developers" in refused(server.http.post("/v1/chat/completions", json=said))

        first, reasoned, more = ["a" * 300, f"{'b' * 400}</think>yes", "go on"]
        question = {"role": "user", "content": first}
        turns = [question, {"role": "assistant", "content": reasoned}, {"role": "user", "content": more}]
        # What is before the reasoning, which the template leaves out, is not read again.
        for messages, cached in ((turns[:1], 0), (turns, 256)):
            said = {"messages": messages, "max_tokens": 1}
            usage = server.http.post("/v1/chat/completions", json=said).json()["usage"]
            assert usage["prompt_tokens"] < 400
            assert usage["prompt_tokens_details"]["cached_tokens"] == cached


def test_what_people_say_never_becomes_a_special_token_nor_a_template(templated):
    with templated("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}") as server:
        for text in ("<|bos|>", "a<|bos|>b<|bos|>", "{{ 7 * 7 }}", "{% for x in range(9) %}{% endfor %}"):
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
            usage = server.http.post("/v1/chat/completions", json=body).json()["usage"]
            assert usage["prompt_tokens"] == 1 + len(text)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "more than 0.5 seconds",
        ),
        pytest.param("{{ 'a' * 10**9 }}", "memory", marks=pytest.mark.slow),
        pytest.param("{{ 'a' * (17 * 2**20) }}", "characters", marks=pytest.mark.slow),
        ("{{ ''.__class__.__mro__ }}", "fails on these messages"),
        pytest.param("{{ messages[99].content }}", "fails on these messages", marks=pytest.mark.slow),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself too often"),
        ("{% if %}", "cannot be read"),
    ],
)
def test_bad_templates(templated, template, message, monkeypatch):
    if "seconds" in message:
        monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    with templated(template) as server:
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
        for _ in range(2):  # also after the first worker has been given up
            assert message in refused(server.http.post("/v1/chat/completions", json=body))
            if "seconds" in message:
                break
        assert server.http.post("/v1/completions", json={"max_tokens": 1}).status_code == 200


def test_tokens_and_back(http):
    text = "zwölf <|bos|>"
    found = http.post("/tokenize", json={"prompt": text}).json()
    assert found["tokens"] == [256, *text.encode()]
    assert found["count"] == len(found["tokens"])
    plain = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert plain == [*text.encode()]
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    assert "token id 257" in refused(http.post("/detokenize", json={"tokens": [257]}))
    assert "tokens" in refused(http.post("/detokenize", json={"tokens": [-1]}))
    assert "prompt is missing" in refused(http.post("/tokenize", json={}))


def test_the_description_names_every_route_and_body(http):
    schema = http.get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/sessions/{session}/fork", "/tokenize"} <= set(
        schema["paths"]
    )

    def references(value):
        if isinstance(value, dict):
            for name, item in value.items():
                if name == "$ref":
                    yield item
                yield from references(item)
        elif isinstance(value, list):
            for item in value:
                yield from references(item)

    found = set(references(schema))
    assert "#/components/schemas/CompletionBody" in found
    for reference in found:
        assert reference.rpartition("/")[2] in schema["components"]["schemas"], reference


def test_the_playground_asks_nobody_else(http):
    page = http.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    parts = "".join(http.get(path).text for path in plain_routes.FILES)
    assert "http://" not in parts
    assert "https://" not in parts
    assert "innerHTML" not in parts
