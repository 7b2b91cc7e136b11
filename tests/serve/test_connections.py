"""Connections that stand still, readers and writers that are slow: they are ended in time, and hold up nobody."""

import asyncio
import json
import random
import re
import socket
import time
import tracemalloc
from collections import defaultdict
from contextlib import ExitStack, suppress

import httpx
import pytest

from retnet.engine import Completion, Event, Request, TokenLogprobs
from retnet.serve import access, connections, engine_thread
from retnet.serve import server as server_module
from retnet.serve.arrivals import Arrivals
from retnet.serve.engine_thread import EngineThread, Feed
from retnet.serve.service import _Deltas
from tests.helpers.serving import joined, not_reading, refused, request, stream, until

BODY = {"prompt": "abc", "max_tokens": 900, "seed": 3, "logit_bias": {"256": -1000}, "cache": False}
SHORT = BODY | {"max_tokens": 20}


def connected(server, **options):
    return socket.create_connection(("127.0.0.1", server.found.getsockname()[1]), timeout=20, **options)


def read_all(connection):
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def text_of(server, body=SHORT):
    return joined(stream(server.http, "/v1/completions", body))


@pytest.mark.slow
def test_a_thousand_idle_connections_hold_up_nobody(serving):
    if connections.most_connections() < 2_100:
        pytest.skip("this system allows fewer file descriptors")
    with serving() as server, ExitStack() as stack:
        want = text_of(server)
        idle = [stack.enter_context(connected(server)) for _ in range(1000)]
        for number, connection in enumerate(idle):
            connection.sendall(request(SHORT)[: number % 60])  # nothing, or part of a head
        until(lambda: len(server.uvicorn.server_state.connections) >= 1000)
        began = time.monotonic()
        assert text_of(server) == want
        with httpx.Client(base_url=server.url) as new:
            assert new.get("/ready").status_code == 200
        assert time.monotonic() - began < 5
        last = idle[-1]  # one of them goes on, and is answered
        last.sendall(request(SHORT)[999 % 60 :])
        assert b"200 OK" in last.recv(1 << 16)


def test_more_connections_than_there_are_descriptors_for_are_refused(serving, monkeypatch, caplog):
    monkeypatch.setattr(server_module, "most_connections", lambda: 6)
    monkeypatch.setattr(connections.WatchedConnection, "_refused", False)
    with serving() as server, ExitStack() as stack:
        for _ in range(6 - len(server.uvicorn.server_state.connections)):
            stack.enter_context(connected(server))
        until(lambda: len(server.uvicorn.server_state.connections) == 6)
        with httpx.Client(base_url=server.url) as other:
            response = other.get("/ready")
        assert "has its 6 connections" in refused(response, 503)
        assert response.headers["retry-after"] == "1"
        assert server.http.get("/ready").status_code == 200  # those that are there are served
        assert "ulimit -n" in caplog.text
        stack.close()
        until(lambda: len(server.uvicorn.server_state.connections) < 6)
        assert httpx.get(f"{server.url}/ready").status_code == 200


def test_a_connection_stays_open_for_longer_than_clients_keep_theirs(serving):
    """httpx keeps an idle one for 5 seconds, so the official clients do; load balancers keep it for up to a minute."""
    with serving() as server:
        assert 60 < server.uvicorn.config.timeout_keep_alive < connections.STILL_SECONDS


def test_what_never_becomes_a_request_is_closed(serving, monkeypatch):
    monkeypatch.setattr(connections, "STILL_SECONDS", 0.1)
    with serving() as server, ExitStack() as stack:
        silent, half = (stack.enter_context(connected(server)) for _ in range(2))
        half.sendall(request(SHORT)[:40])
        running = stack.enter_context(connected(server))
        running.sendall(request(BODY | {"max_tokens": 400}))  # is not still: the server is to answer
        assert silent.recv(1) == b""
        assert half.recv(1) == b""
        assert b"200 OK" in running.recv(1 << 16)


def test_a_body_that_does_not_arrive_is_timed_out(serving, monkeypatch):
    monkeypatch.setattr(access, "BODY_SECONDS", 0.3)
    with serving() as server, connected(server) as slow:
        want = text_of(server)
        slow.sendall(request(SHORT, length=5000))
        assert text_of(server) == want
        answer = slow.recv(1 << 16)
        assert b"408" in answer.splitlines()[0]
        assert b"did not arrive within 0.3 seconds" in answer


@pytest.mark.parametrize("lines", [b"a" * 1000, b"X-%d: 1\r\n" * 100])
def test_a_head_that_does_not_end_is_refused(serving, lines):
    """Nobody has been asked for a key yet, and what has come waits in memory."""
    with serving() as server, connected(server) as endless:
        with suppress(ConnectionError):
            endless.sendall(b"GET /ready HTTP/1.1\r\nX: ")
            for _ in range(4000):
                endless.sendall(lines)
        with suppress(ConnectionError):
            assert read_all(endless).startswith(b"HTTP/1.1 431 ")
        until(lambda: len(server.uvicorn.server_state.connections) <= 1)
        assert server.http.get("/ready", headers={"X": "a" * 50_000}).status_code == 200
        assert server.http.post("/tokenize", json={"prompt": "a" * 500_000}).json()["count"] == 500_001


def test_what_is_no_http_is_told_so_with_the_envelope(serving):
    with serving() as server, connected(server) as wrong:
        wrong.sendall(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")  # such as TLS
        head, _, content = read_all(wrong).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert "no HTTP" in json.loads(content)["error"]["message"]


@pytest.mark.slow
def test_a_slow_reader_gets_everything_and_holds_up_nobody(serving, monkeypatch):
    monkeypatch.setattr(engine_thread, "TOGETHER", 0.0)  # many events, which no buffer has room for
    with serving() as server:
        want = text_of(server, BODY)
        engine, gate = server.service.engine._engine, server.service.gate
        with not_reading(server, request(BODY | {"stream": True})) as slow:
            until(lambda: gate.texts == 1)
            assert text_of(server, BODY) == want
            until(lambda: not engine.busy)
            assert gate.texts == 1  # made, and not sent
            parts = [b""]
            while b"[DONE]" not in parts[-2:][0] + parts[-1]:
                parts.append(slow.recv(3000))
        events = re.findall(rb"data: (\{.*\})", b"".join(parts).replace(b"\r\n", b""))
        assert joined([json.loads(event) for event in events]) == want
        assert len(events) < 900  # what waited came together


@pytest.mark.slow
def test_a_reader_that_takes_nothing_is_given_up(serving, monkeypatch):
    monkeypatch.setattr(connections, "STILL_SECONDS", 0.5)
    monkeypatch.setattr(engine_thread, "TOGETHER", 0.0)
    endless = BODY | {"stream": True, "max_tokens": 60_000}
    with serving() as server:
        gate, state = server.service.gate, server.uvicorn.server_state
        with not_reading(server, request(endless)):
            until(lambda: gate.texts == 1)
            until(lambda: gate.texts == 0, 30)
        until(lambda: not server.service.engine._engine.busy)
        server.http.close()
        until(lambda: not state.connections)
        whole = request({"prompt": "x" * 500_000}, "/tokenize")  # an answer that no buffer has room for
        with not_reading(server, whole):
            until(lambda: state.connections)
            until(lambda: not state.connections, 30)


def test_what_waits_for_a_reader_takes_no_more_than_its_text():
    arrivals, count = Arrivals(), 20_000
    tracemalloc.start()
    for step in range(count):
        arrivals.put(0, Event(0, step % 4, f"{step} ", step))
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken < 2 * 6 * count + 10_000
    assert len(arrivals) == 4


def test_reading_goes_on_after_a_wait_that_was_cancelled():
    async def main():
        arrivals = Arrivals()
        deltas = _Deltas(arrivals, 1, lambda *said: None)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(deltas), 0.01)
        arrivals.put(0, Event(0, 0, "a", 1))
        arrivals.put(0, Event(0, 0, "b", 2, None, Completion("ab", (), "length", 2)))
        return [delta.text async for _, delta in deltas], deltas.left

    assert asyncio.run(main()) == (["ab"], 0)


def test_what_is_put_together_stays_in_order():
    """Texts, log-probabilities and ends; an error comes behind all that waits, and nothing after it."""
    rng, arrivals = random.Random(1), Arrivals()
    want, got = defaultdict(list), defaultdict(list)
    places, ends, pieces = defaultdict(list), {}, 0

    async def take():
        nonlocal pieces
        number, piece = await arrivals.get()
        key = number, piece.sample
        got[key].append(piece.text)
        places[key] += piece.logprobs
        assert key not in ends
        if piece.completion is not None:
            ends[key] = piece.completion
        pieces += 1

    async def main():
        for step in range(5000):
            number, sample, text = rng.randrange(2), rng.randrange(2), f"{step} "
            last = Completion(text, (), "length", 1) if step >= 4990 and (number, sample) == (0, 1) else None
            if (0, 1) in done and (number, sample) == (0, 1):
                continue
            if last is not None:
                done.add((0, 1))
            arrivals.put(number, Event(0, sample, text, step, TokenLogprobs(step, -1.0, ()), last))
            want[number, sample].append(text)
            for _ in range(rng.choice((0, 0, 3)) if step % 500 < 250 else 0):
                if len(arrivals):
                    await take()
        arrivals.fail(ValueError("the last"))
        arrivals.put(0, Event(0, 0, "too late"))
        while len(arrivals):
            await take()
        with pytest.raises(ValueError, match="the last"):
            await arrivals.get()

    done = set()
    asyncio.run(main())
    assert {key: "".join(parts) for key, parts in got.items()} == {
        key: "".join(parts) for key, parts in want.items()
    }
    assert {key: [f"{place.token} " for place in each] for key, each in places.items()} == dict(want)
    assert ends.keys() == done
    assert pieces < 5000


class Ticking:
    """An engine whose one request gets a token every so many seconds."""

    def __init__(self, seconds, tokens):
        self.seconds, self.tokens, self.left = seconds, tokens, 0

    busy = property(lambda self: self.left > 0)

    def submit(self, request):
        self.left = self.tokens
        return 7

    def step(self):
        time.sleep(self.seconds)
        self.left -= 1
        return [Event(7, 0, "x", 1, None, None if self.left else Completion("", (), "length", 1))]


class Panic(BaseException):
    """What libraries in Rust raise is no Exception."""


def test_a_panic_does_not_end_the_thread():
    def panic(*given):
        raise Panic("at the disco")

    async def main():
        engine = Ticking(0, 3)
        thread, arrivals = EngineThread(engine), Arrivals()
        thread.start()
        with pytest.raises(RuntimeError, match="at the disco"):
            await asyncio.wait_for(thread.call(panic), 5)
        step, engine.step = engine.step, panic
        engine.cancel = lambda number: None
        await thread.submit(Feed(arrivals, 0, Request("a")))
        until(lambda: thread.error)
        engine.step = step
        assert (await asyncio.wait_for(arrivals.get(), 5))[1].text
        assert thread.stop(5)

    asyncio.run(main())


@pytest.mark.parametrize(("seconds", "count", "apart"), [(0.0005, 40, False), (0.03, 12, True)])
def test_tokens_that_come_soon_after_one_another_are_sent_together(seconds, count, apart):
    """The first at once; none waits for longer than it may, nor for a step that takes longer."""
    found = []

    async def main():
        thread, arrivals = EngineThread(Ticking(seconds, count)), Arrivals()
        thread.start()
        await thread.submit(Feed(arrivals, 0, Request("a")))
        while not found or found[-1].completion is None:
            found.append((await arrivals.get())[1])
        assert thread.stop(5)

    asyncio.run(main())
    sizes = [len(piece.text) for piece in found]
    assert sum(sizes) == count
    assert sizes[0] == 1
    if apart:
        assert sizes == [1] * count
    else:
        assert len(sizes) < count / 2
