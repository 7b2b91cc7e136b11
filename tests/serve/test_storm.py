"""A random storm of requests, leaving clients and session verbs: every text is what it is alone, and nothing leaks."""

import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.helpers.serving import joined, stream, until

WORDS = ["It was a dark and stormy night. ", "def area(width, height):\n", "äöü ", "x" * 140]
GREEDY = {"temperature": 0, "logit_bias": {"256": -1000}}


def client(url, seed, alone):
    """What one client does; `alone` answers what a text is continued with by a server that nobody else asks."""
    rng = random.Random(seed)
    with httpx.Client(base_url=url, timeout=120) as http:
        text = rng.choice(WORDS) * rng.randint(1, 4)
        name = http.post("/v1/sessions", json={"text": text}).json()["id"]
        for _ in range(12):
            verb, count = rng.randrange(7), rng.randint(1, 20)
            body = {**GREEDY, "max_tokens": count}
            if verb == 0:  # a completion, streamed
                prompt = rng.choice(WORDS) * rng.randint(0, 3)
                said = joined(stream(http, "/v1/completions", {**body, "prompt": prompt}))
                assert said == alone(prompt, count)
            elif verb == 1:  # a client that leaves
                long = {**GREEDY, "prompt": text, "max_tokens": 50_000, "stream": True}
                with http.stream("POST", "/v1/completions", json=long) as response:
                    lines = response.iter_lines()
                    next(lines)
            elif verb == 2:
                reply = http.post(f"/v1/sessions/{name}/generate", json=body).json()
                said = reply["choices"][0]["text"]
                assert said == alone(text, count)
                text = http.get(f"/v1/sessions/{name}").json()["text"]
                tokens = http.get(f"/v1/sessions/{name}").json()["tokens"]
                if text.encode() != bytes(tokens[1:]):  # half a character: begin anew
                    text = WORDS[0]
                    http.post(f"/v1/sessions/{name}/edit", json={"position": 1, "text": text})
            elif verb == 3:
                fork = http.post(f"/v1/sessions/{name}/fork", json={}).json()["id"]
                http.delete(f"/v1/sessions/{name}")
                name = fork
            elif verb == 4:
                cut = rng.randint(0, len(text))
                http.post(f"/v1/sessions/{name}/rewind", json={"position": 1 + len(text[:cut].encode())})
                text = text[:cut]
            elif verb == 5:
                more = rng.choice(WORDS)
                http.post(f"/v1/sessions/{name}/append", json={"text": more})
                text += more
            else:
                content = http.get(f"/v1/sessions/{name}/export?every=true").content
                head = {"Content-Type": "application/octet-stream"}
                copy = http.post("/v1/sessions/import", content=content, headers=head).json()["id"]
                http.delete(f"/v1/sessions/{name}")
                name = copy
            assert http.get(f"/v1/sessions/{name}").json()["text"] == text
        http.delete(f"/v1/sessions/{name}")


@pytest.mark.slow
def test_a_storm_leaves_every_text_what_it_is_alone(serving, tmp_path):
    with (
        serving(slots=1, cache_bytes=1) as quiet,
        serving(slots=4, cache_bytes=100_000, sessions=tmp_path) as stormy,
    ):

        def alone(prompt, count):
            body = {**GREEDY, "prompt": prompt, "max_tokens": count}
            return httpx.post(f"{quiet.url}/v1/completions", json=body, timeout=120).json()["choices"][0][
                "text"
            ]

        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(client, stormy.url, seed, alone) for seed in range(24)]:
                done.result()
        engine = stormy.service.engine._engine
        until(lambda: not engine.busy)
        assert stormy.service.gate.texts == 0
        assert sorted(engine._free) == list(range(4))
        assert stormy.http.get("/v1/sessions").json()["data"] == []
        assert engine.store.bytes <= 100_000
        assert [file.name for file in tmp_path.iterdir() if file.is_file()] == []
        assert not list((tmp_path / "states").iterdir())
