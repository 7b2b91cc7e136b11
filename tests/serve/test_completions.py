"""/v1/completions: what is streamed is what the engine makes, whoever else is served; limits and leaving clients."""

import threading

import httpx
import pytest

from retnet.engine import ComposedDecoder, Engine, Request, Sampling
from tests.helpers.serving import joined, refused, stream, until

CASES = [
    {"prompt": "def ", "temperature": 0, "max_tokens": 20},
    {"prompt": "x" * 300, "seed": 3, "max_tokens": 12, "top_k": 40, "top_p": 0.9},
    {"prompt": "zwölf Bäume \x00", "seed": 4, "max_tokens": 9, "min_p": 0.01, "repetition_penalty": 1.2},
    {
        "prompt": [256, 1, 2, 3],
        "seed": 5,
        "max_tokens": 7,
        "presence_penalty": 1.0,
        "logit_bias": {"65": 5.0},
    },
    {"prompt": "", "seed": 6, "max_tokens": 5, "frequency_penalty": 0.5, "temperature": 1.5},
]


@pytest.fixture(scope="module")
def alone(tiny, tokenizer):
    """What the engine makes of a case with nobody else there."""

    def run(case):
        names = (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        sampling = {name: case[name] for name in names if name in case}
        bias = {int(token): value for token, value in case.get("logit_bias", {}).items()}
        engine = Engine(ComposedDecoder(tiny, 2), tokenizer, exact=True)
        request = Request(
            case["prompt"],
            max_tokens=case["max_tokens"],
            seed=case.get("seed", 0),
            sampling=Sampling(**sampling, logit_bias=bias),
            samples=case.get("n", 1),
        )
        return engine.complete(request)

    return run


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_streams_what_the_engine_makes(http, alone, case):
    (want,) = alone(case)
    events = stream(http, "/v1/completions", {**case, "stream_options": {"include_usage": True}})
    assert joined(events) == want.text
    *chunks, last = events
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == want.prompt_tokens
    assert last["usage"]["completion_tokens"] == len(want.tokens)
    assert last["usage"]["total_tokens"] == want.prompt_tokens + len(want.tokens)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert {chunk["id"] for chunk in events} == {last["id"]}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    whole = http.post("/v1/completions", json=case).json()
    assert whole["choices"][0]["text"] == want.text
    assert whole["object"] == "text_completion"


def test_many_at_once_get_what_each_gets_alone(http, alone):
    cases = CASES * 4  # more than there are slots
    found = [None] * len(cases)

    def ask(number):
        found[number] = joined(stream(http, "/v1/completions", cases[number]))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone(case)[0].text for case in CASES] * 4


def test_several_prompts_and_samples(http, alone):
    case = {"prompt": ["ab", "cd"], "n": 2, "seed": 1, "max_tokens": 6}
    choices = http.post("/v1/completions", json=case).json()["choices"]
    want = [completion.text for prompt in ("ab", "cd") for completion in alone({**case, "prompt": prompt})]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["text"] for choice in choices] == want
    events = stream(http, "/v1/completions", case)
    assert [joined(events, index) for index in range(4)] == want


def test_logprobs_echo_and_stop(http):
    body = {"prompt": "ab", "max_tokens": 5, "temperature": 0, "logprobs": 3}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    places = choice["logprobs"]
    assert len(places["tokens"]) == len(places["token_logprobs"]) == len(places["top_logprobs"]) == 5
    assert all(logprob <= 0 for logprob in places["token_logprobs"])
    assert places["text_offset"][0] == 0
    streamed = stream(http, "/v1/completions", body)
    assert [t for e in streamed for t in e["choices"][0]["logprobs"]["tokens"]] == places["tokens"]
    random = body | {"max_tokens": 40, "temperature": 2, "seed": 1}  # bytes that are no characters among them
    places = http.post("/v1/completions", json=random).json()["choices"][0]["logprobs"]
    assert any(name.startswith("bytes:") for name in places["tokens"])
    streamed = [e["choices"][0]["logprobs"] for e in stream(http, "/v1/completions", random)]
    assert [place for each in streamed if each for place in each["text_offset"]] == places["text_offset"]
    echoed = http.post("/v1/completions", json={**body, "logprobs": None, "echo": True}).json()["choices"][0]
    assert echoed["text"] == "ab" + choice["text"]
    stop = choice["text"][2]
    cut = http.post("/v1/completions", json={**body, "stop": stop}).json()["choices"][0]
    assert cut["text"] == choice["text"].partition(stop)[0]
    assert cut["finish_reason"] == "stop"


def test_structured_output(http):
    pytest.importorskip("llguidance")
    body = {"prompt": "a", "max_tokens": 20, "choice": ["yes", "no"], "seed": 1}
    assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] in ("yes", "no")
    assert "grammar" in refused(http.post("/v1/completions", json={"regex": "("}))
    assert "one of" in refused(http.post("/v1/completions", json={"regex": "a", "choice": ["a"]}))


@pytest.mark.slow
def test_a_grammar_that_takes_gigabytes_is_refused(http):
    """No limit of the library's ends it; the engine's thread never sees it."""
    pytest.importorskip("llguidance")
    heavy = {"allOf": [{"pattern": f"(a|b)*c{{{n}}}"} for n in range(1, 100)]}
    message = refused(http.post("/v1/completions", json={"json_schema": heavy, "max_tokens": 3}))
    assert "takes more than 2 seconds or 1024 MiB" in message
    assert http.post("/v1/completions", json={"choice": ["yes"], "max_tokens": 3}).status_code == 200


def test_a_client_that_leaves_is_cancelled(server):
    body = {"prompt": "a", "max_tokens": 60_000, "logit_bias": {"256": -1000}, "stream": True}
    gate = server.service.gate
    with (
        httpx.Client(base_url=server.url) as http,
        http.stream("POST", "/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        assert gate.texts == 1
    until(lambda: gate.texts == 0)
    with httpx.Client(base_url=server.url, timeout=0.2) as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json={**body, "stream": False})
    until(lambda: gate.texts == 0)
    engine = server.service.engine._engine
    until(lambda: not engine.busy)
    assert sorted(engine._free) == list(range(engine.slots))


def test_what_has_no_room_is_told_when_to_come_back(serving):
    long = {"prompt": "a", "max_tokens": 60_000, "logit_bias": {"256": -1000}, "stream": True}
    with serving(slots=1, queue=1) as server:
        http = server.http
        assert "at most 2" in refused(http.post("/v1/completions", json={"n": 3}))
        with http.stream("POST", "/v1/completions", json=long) as first:
            lines = first.iter_lines()  # as long as it is there, so is the connection
            next(lines)
            with http.stream("POST", "/v1/completions", json=long) as waiting:
                until(lambda: server.service.gate.texts == 2)
                response = http.post("/v1/completions", json={"prompt": "b"})
                assert "there is no room" in refused(response, 429)
                assert response.headers["retry-after"] == "1"
                assert "retnet_texts_waiting 1.0" in http.get("/metrics").text
                waiting.close()
            first.close()
        until(lambda: server.service.gate.texts == 0)
        assert http.post("/v1/completions", json={"prompt": "b"}).status_code == 200


def test_limits(serving):
    with serving(max_tokens=10, max_prompt_tokens=20, max_body_bytes=1000, timeout=0.5) as server:
        http = server.http
        assert "at most 10" in refused(
            http.post("/v1/completions", json={"max_tokens": 11}), param="max_tokens"
        )
        assert "21 tokens" in refused(http.post("/v1/completions", json={"prompt": "x" * 20}), param="prompt")
        assert "1,000 bytes" in refused(http.post("/v1/completions", json={"prompt": "x" * 1000}), 413)

        def pieces():
            for _ in range(100):
                yield b"x" * 100

        kind = {"Content-Type": "application/json"}
        assert "1,000 bytes" in refused(http.post("/v1/completions", content=pieces(), headers=kind), 413)


def test_a_request_that_takes_too_long_is_ended(serving):
    long = {"prompt": "a", "max_tokens": 60_000, "logit_bias": {"256": -1000}}
    with serving(timeout=0.3) as server:
        assert "0.3 seconds" in refused(server.http.post("/v1/completions", json=long), 504)
        assert "0.3 seconds" in stream(server.http, "/v1/completions", long)[-1]["error"]["message"]
        until(lambda: server.service.gate.texts == 0)


def test_models_health_ready_metrics(server, http):
    assert http.get("/health").json() == {"status": "alive"}
    assert http.get("/ready").status_code == 200
    data = http.get("/v1/models").json()["data"]
    assert [model["id"] for model in data] == ["tiny"]
    assert http.get("/v1/models/tiny").json() == data[0]
    assert "'tiny'" in refused(http.get("/v1/models/gpt-4"), 404)
    assert "'tiny'" in refused(http.post("/v1/completions", json={"model": "gpt-4"}), 404, "model")
    http.post("/v1/completions", json={"prompt": "a"})
    text = http.get("/metrics").text
    assert 'retnet_requests_total{path="/v1/completions",status="200"}' in text
    assert "retnet_generated_tokens_total" in text
    assert "retnet_time_to_first_token_seconds_bucket" in text


def test_errors_of_the_framework_have_the_envelope(http):
    assert "/openapi.json" in refused(http.get("/v1/nothing"), 404)
    assert "GET" in refused(http.get("/v1/completions"), 405)
    assert "Content-Type: application/json" in refused(http.post("/v1/completions", content=b"{}"), 415)
    other = {"Origin": "https://example.com"}
    assert "origin" in refused(http.get("/v1/models", headers=other), 403)
    assert http.get("/v1/models", headers={"Origin": str(http.base_url).rstrip("/")}).status_code == 200


@pytest.mark.slow
def test_the_openai_client(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    body = {"model": "tiny", "prompt": "def ", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**body)
    chunks = list(client.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == 8
    messages = [{"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    pieces = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, temperature=0, stream=True
    )
    assert "".join(c.choices[0].delta.content or "" for c in pieces) == chat.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(model="tiny", messages=messages, tools=[])
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    client.close()


def test_ignore_eos_ends_a_text_at_max_tokens_alone(http):
    body = {"prompt": "abc", "max_tokens": 30, "logit_bias": {"256": 1000}, "temperature": 0}
    assert http.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 0
    ignored = body | {"ignore_eos": True, "stop": None}
    events = stream(http, "/v1/completions", ignored | {"stream_options": {"include_usage": True}})
    assert events[-1]["usage"]["completion_tokens"] == 30
    chat = {key: ignored[key] for key in ignored if key != "prompt"}
    chat["messages"] = [{"role": "user", "content": "abc"}]
    assert http.post("/v1/chat/completions", json=chat).json()["usage"]["completion_tokens"] == 30
    for other in ({"stop": "x"}, {"choice": ["a"]}, {"regex": "a+"}):
        message = refused(http.post("/v1/completions", json=ignored | other), param="ignore_eos")
        assert "writes to the last token" in message
