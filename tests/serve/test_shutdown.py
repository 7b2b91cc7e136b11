"""What is under way when a server that shuts down has no time left: kept by a session, else an error to ask again."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
import uvicorn

from retnet.engine import ComposedDecoder, Run
from retnet.serve import engine_thread, gate
from retnet.serve import server as server_module
from retnet.serve.app import make_app
from retnet.serve.server import config_of, listen
from tests.helpers.fast import few_fast
from tests.helpers.serving import not_reading, refused, request, until

LONG = {"max_tokens": 60_000, "temperature": 0, "logit_bias": {"256": -1000}}
TALK = {"messages": [{"role": "user", "content": "abc"}]}


def end_all(server):
    """What a server does when `--shutdown-seconds` have passed since SIGTERM."""
    gate = server.service.gate

    def end():
        gate.close()
        gate.end_all()

    server.service.engine._loop.call_soon_threadsafe(end)


def cut_short(server, url, body):
    """The lines of a stream that has begun when everything is ended."""
    with server.http.stream("POST", url, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        said = [next(lines) for _ in range(20)]
        end_all(server)
        return [*said, *lines]


@pytest.mark.parametrize(
    ("url", "body"),
    [
        pytest.param("/v1/completions", {"prompt": "abc", **LONG}, marks=pytest.mark.slow),
        ("/v1/chat/completions", {**TALK, **LONG}),
        pytest.param(
            "/v1/responses",
            {"input": "abc", "max_output_tokens": 60_000, "temperature": 0},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_streams_of_openai_end_with_its_error(serving, url, body):
    with serving() as server:
        said = [line.removeprefix("data: ") for line in cut_short(server, url, body) if "data: " in line]
        error = json.loads(next(line for line in said if line.startswith('{"error"')))["error"]
        assert (error["code"], error["type"]) == ("shutting_down", "server_error")
        refused(server.http.post(url, json=body), 503)


def test_streams_of_anthropic_end_with_its_error(serving):
    with serving() as server:
        said = cut_short(server, "/v1/messages", {**TALK, "max_tokens": 60_000, "temperature": 0})
        assert said[-3] == "event: error"
        error = json.loads(said[-2].removeprefix("data: "))
        assert (error["type"], error["error"]["type"]) == ("error", "overloaded_error")


@pytest.mark.parametrize("url", ["/v1/completions", "/v1/embeddings"])
def test_whole_answers_are_refused_with_a_time_to_come_back(serving, url):
    body = {"prompt": "abc", **LONG} if url == "/v1/completions" else {"input": "abcd " * 40_000}
    with serving() as server:
        found = []
        thread = threading.Thread(
            target=lambda: found.append(httpx.post(server.url + url, json=body, timeout=60))
        )
        thread.start()
        until(lambda: server.service.gate.texts == 1)
        end_all(server)
        thread.join(30)
        assert "shutting down" in refused(found[0], 503)
        assert found[0].headers["retry-after"] == "5"
        until(lambda: server.service.gate.texts == 0)


@pytest.mark.parametrize("whole", few_fast([False, True], False))
def test_a_session_keeps_what_was_sent(serving, whole, tmp_path):
    with serving(sessions=tmp_path) as server:
        name = server.http.post("/v1/sessions", json={"text": "abc"}).json()["id"]
        place = f"/v1/sessions/{name}"
        if whole:
            found = []
            thread = threading.Thread(
                target=lambda: found.append(
                    httpx.post(f"{server.url}{place}/generate", json=LONG, timeout=60).json()
                )
            )
            thread.start()
            until(lambda: server.service.engine._engine.stats.decode_tokens > 20)
            end_all(server)
            thread.join(30)
            text, last = found[0]["choices"][0]["text"], found[0]
            assert found[0]["choices"][0]["finish_reason"] == "interrupted"
        else:
            said = [
                line.removeprefix("data: ") for line in cut_short(server, f"{place}/generate", LONG) if line
            ]
            assert said.pop() == "[DONE]"
            events = [json.loads(line) for line in said]
            assert events[-2]["choices"][0]["finish_reason"] == "interrupted"
            text, last = "".join(event["choices"][0]["text"] for event in events[:-1]), events[-1]
        tokens = server.http.get(place).json()["tokens"]
        assert last["session"]["position"] == len(tokens) == 4 + last["usage"]["completion_tokens"]
        assert bytes(tokens[4:]).decode("utf-8", "replace").startswith(text)
        assert len(text) > 10
    with serving(sessions=tmp_path) as server:  # and goes on as if nothing had happened
        kept = server.http.get(place).json()["tokens"]
        assert kept == tokens
        server.http.post(f"{place}/generate", json=LONG | {"max_tokens": 20})
        more = server.http.get(place).json()["tokens"]
        server.http.post(f"{place}/rewind", json={"position": 4})
        server.http.post(f"{place}/generate", json=LONG | {"max_tokens": len(more) - 4})
        assert server.http.get(place).json()["tokens"] == more


@pytest.mark.slow
def test_a_session_keeps_what_a_reader_that_stands_still_has_not_taken(serving, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_thread, "TOGETHER", 0.0)  # many events, which no buffer has room for
    monkeypatch.setattr(server_module, "GRACE", 1)
    with serving(sessions=tmp_path, shutdown_seconds=1) as server:
        name = server.http.post("/v1/sessions", json={"text": "abc"}).json()["id"]
        place, stats = f"/v1/sessions/{name}", server.service.engine._engine.stats
        with not_reading(server, request(LONG | {"stream": True}, f"{place}/generate")):
            until(lambda: stats.decode_tokens > 1200, 60)
            end_all(server)
            until(lambda: server.service.gate.ended)
            server.uvicorn.should_exit = True
            until(lambda: server.service.gate.texts == 0, 30)
    with serving(sessions=tmp_path) as server:
        tokens = server.http.get(place).json()["tokens"]
        assert len(tokens) > 1200
        server.http.post(f"{place}/rewind", json={"position": 4})
        server.http.post(f"{place}/generate", json=LONG | {"max_tokens": 50})
        assert server.http.get(place).json()["tokens"] == tokens[:54]


class FailingDecoder(ComposedDecoder):
    """One that cannot generate."""

    def prefill(self, *given):
        raise RuntimeError("no kernel")


def test_a_server_that_cannot_generate_still_writes_its_states(tiny, tokenizer, tmp_path, monkeypatch):
    app = make_app(
        Run(tiny, tokenizer, tmp_path, "last"), "tiny", sessions=tmp_path, decoder=FailingDecoder(tiny, 2)
    )
    service, flushed = app.state.service, []
    real = service.sessions.flush

    async def flush():
        flushed.append(await real())

    monkeypatch.setattr(service.sessions, "flush", flush)
    with listen("127.0.0.1", 0) as found:
        server = uvicorn.Server(config_of(app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [found]})
        thread.start()
        until(lambda: server.started and service.gate.texts == 0 and service.engine._engine._submitted == 1)
        time.sleep(0.1)
        assert service.why_not_ready()
        server.should_exit = True
        thread.join(30)
    assert flushed == [None]
    assert not service.engine.alive


class StuckDecoder(ComposedDecoder):
    """One that reads its first prompt for as long as kernels may be compiled."""

    ready = threading.Event()

    def prefill(self, *given):
        self.ready.wait(60)
        return super().prefill(*given)


def test_a_server_that_is_not_ready_yet_ends_at_once(tiny, tokenizer, tmp_path):
    run = Run(tiny, tokenizer, tmp_path, "last")
    app = make_app(run, "tiny", sessions=tmp_path, decoder=StuckDecoder(tiny, 2))
    with listen("127.0.0.1", 0) as found:
        server = uvicorn.Server(config_of(app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [found]})
        thread.start()
        until(lambda: server.started and app.state.service.gate.texts == 1)
        began = time.monotonic()
        server.should_exit = True
        thread.join(30)
        assert time.monotonic() - began < 5
    engine = app.state.service.engine
    assert engine.alive  # the process ends it
    StuckDecoder.ready.set()
    until(lambda: not engine.alive)


@pytest.mark.slow
def test_official_clients_ask_again_until_the_server_is_back(serving, monkeypatch):
    """By their own retries, of a whole answer; of a stream, half of which has been read, they raise the error."""
    openai = pytest.importorskip("openai")
    anthropic = pytest.importorskip("anthropic")
    monkeypatch.setattr(gate, "RETRY_SECONDS", 1)
    ask = {"model": "tiny", "prompt": "a", "logit_bias": {"256": -100}}
    talk = {"model": "tiny", "messages": TALK["messages"], "extra_body": {"temperature": 0}}
    with ThreadPoolExecutor(2) as pool, ExitStack() as clients:
        with serving() as server:
            url = server.url
            one = clients.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=8))
            other = clients.enter_context(anthropic.Anthropic(base_url=url, api_key="none", max_retries=8))
            completion = pool.submit(one.completions.create, max_tokens=1000, **ask)
            message = pool.submit(other.messages.create, max_tokens=1000, **talk)
            completions = one.completions.create(max_tokens=60_000, stream=True, **ask)
            messages = other.messages.create(max_tokens=60_000, stream=True, **talk)
            for broken in (completions, messages):
                next(iter(broken))
            until(lambda: server.service.gate.texts == 4)
            end_all(server)
            with pytest.raises(openai.APIError, match="no time left") as error:
                list(completions)
            assert error.value.code == "shutting_down"
            with pytest.raises(anthropic.APIStatusError, match="no time left"):
                list(messages)
        with serving(port=int(url.rpartition(":")[2])):
            assert completion.result(60).usage.completion_tokens == 1000
            assert message.result(60).usage.output_tokens == 1000
