"""Several servers on one storage: a session goes on wherever it is asked for, and none is lost when one is killed."""

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import msgspec
import pytest

from retnet.engine import ComposedDecoder, Engine, Sampling, Session
from retnet.engine.storage import DirectoryStorage
from retnet.engine.versioned_files import VersionedFiles
from tests.helpers.fast import few_fast
from tests.helpers.served_processes import started_many, write_tiny
from tests.helpers.serving import refused, until

TEXT = "It was a dark and stormy night. " * 10
GREEDY = {"temperature": 0, "max_tokens": 20, "logit_bias": {"256": -1000}}
PAGE = Path(__file__).parents[2] / "docs/serving.md"


@pytest.fixture(params=few_fast(["directory", "memory"], "directory"))
def shared(request, tmp_path):
    """A place for sessions: a directory, or a URL of fsspec."""
    return tmp_path if request.param == "directory" else f"memory://{tmp_path.name}"


@pytest.fixture
def pair(serving, shared):
    with serving(sessions=shared) as one, serving(sessions=shared) as other:
        yield one.http, other.http


def asked(http, name, verb, **body):
    response = http.post(f"/v1/sessions/{name}/{verb}", json=body)
    assert response.status_code in (200, 201), response.text
    return response.json()


def solo(model, tokenizer, tokens):
    """What one engine writes that has the text to itself."""
    session = Session(Engine(ComposedDecoder(model, 1), tokenizer, exact=True, cache_bytes=1 << 24))
    session.append(TEXT)
    bias = {256: -1000.0}
    return session.generate(max_tokens=tokens, sampling=Sampling(temperature=0, logit_bias=bias)).text


def test_a_session_goes_on_at_any_server(pair, tiny, tokenizer):
    one, other = pair
    name = one.post("/v1/sessions", json={"text": TEXT}).json()["id"]
    said = [
        asked(http, name, "generate", **GREEDY)["choices"][0]["text"] for http in (one, other, other, one)
    ]
    assert "".join(said) == solo(tiny, tokenizer, 80)
    fork = asked(other, name, "fork")["id"]
    asked(one, fork, "rewind", position=1 + len(TEXT))
    assert asked(other, fork, "generate", **GREEDY)["choices"][0]["text"] == said[0]
    assert [each["id"] for each in one.get("/v1/sessions").json()["data"]] == [name, fork]
    assert one.get(f"/v1/sessions/{name}").json() == other.get(f"/v1/sessions/{name}").json()
    other.delete(f"/v1/sessions/{name}")
    refused(one.get(f"/v1/sessions/{name}"), 404)
    assert [each["id"] for each in one.get("/v1/sessions").json()["data"]] == [fork]


def test_of_two_changes_at_once_one_is_refused_and_nothing_is_mixed(pair):
    name = pair[0].post("/v1/sessions", json={"text": TEXT}).json()["id"]
    asked(pair[1], name, "append", text="")  # both know it
    barrier = threading.Barrier(2)

    def ask(http):
        barrier.wait()
        return http.post(f"/v1/sessions/{name}/generate", json={**GREEDY, "max_tokens": 200})

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(ask, pair))
    won = [response.json() for response in found if response.status_code == 200]
    lost = [response for response in found if response.status_code != 200]
    for response in lost:  # where they were really at once
        assert "changed through another server" in refused(response, 409)
    texts = [http.get(f"/v1/sessions/{name}").json()["text"] for http in pair]
    assert texts == [TEXT + "".join(each["choices"][0]["text"] for each in won)] * 2


def test_a_record_that_is_damaged_or_of_another_model_is_left_out(serving, tmp_path, caplog):
    with serving(sessions=tmp_path) as server:
        name, other = (server.http.post("/v1/sessions", json={"text": t}).json()["id"] for t in "ab")
    (record,) = (tmp_path / "records" / other).iterdir()
    record.write_bytes(record.read_bytes()[:-1])
    for path, content in (("x", b"{}"), ("0" * 32, b"\0" * 100), ("1" * 32, b"")):
        (tmp_path / "records" / path).mkdir()
        (tmp_path / "records" / path / "0000000001").write_bytes(content)
    with serving(sessions=tmp_path) as server:
        assert [each["id"] for each in server.http.get("/v1/sessions").json()["data"]] == [name]
        refused(server.http.get(f"/v1/sessions/{other}"), 404)
        foreign = server.http.post("/v1/sessions", json={"text": "c"}).json()["id"]
    files = VersionedFiles(DirectoryStorage(tmp_path), "records")
    kept = files.load(foreign)
    record = msgspec.json.decode(kept.content) | {"model": "0" * 64}
    files.save(foreign, msgspec.json.encode(record), kept.generation)
    with serving(sessions=tmp_path) as server:
        assert f"session {foreign} was left out: it is of another model" in caplog.text
        assert [each["id"] for each in server.http.get("/v1/sessions").json()["data"]] == [name]
        assert "of another model" in refused(server.http.get(f"/v1/sessions/{foreign}"), 409)
    assert files.load(foreign)


def test_sessions_of_older_formats_are_told_of_and_left_as_they_are(serving, tmp_path, caplog):
    old = tmp_path / f"{'0' * 32}.session.json"
    old.write_text('{"format": 1}')
    with serving(sessions=tmp_path) as server:
        assert server.http.get("/v1/sessions").json()["data"] == []
        name = server.http.post("/v1/sessions", json={"text": "abc"}).json()["id"]
    said = [record.getMessage() for record in caplog.records if "older format" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path} has 1 sessions of an older format (files *.session.json)")
    assert "(POST /v1/sessions)" in said[0]  # what that version exports is of an older format as well
    assert old.read_text() == '{"format": 1}'
    files = VersionedFiles(DirectoryStorage(tmp_path), "records")
    kept = files.load(name)
    files.save(name, kept.content.replace(b'"format":2', b'"format":9'), kept.generation)
    caplog.clear()
    with serving(sessions=tmp_path):
        assert f"session {name} was left out: its record has format 9; this version reads 2" in caplog.text


def test_states_that_nobody_needs_are_swept_at_the_start(serving, tmp_path):
    with serving(sessions=tmp_path) as server:
        name = server.http.post("/v1/sessions", json={"text": TEXT}).json()["id"]
        asked(server.http, name, "generate", **GREEDY)
    kept = sorted((tmp_path / "states").iterdir())
    assert kept
    old, new = (
        tmp_path / "states" / f"{'0' * 64}.safetensors",
        tmp_path / "states" / f"{'1' * 64}.safetensors",
    )
    for file in (old, new):
        file.write_bytes(b"left by a server that was killed")
    for file in (old, *kept):
        os.utime(file, (time.time() - 7200,) * 2)
    with serving(sessions=tmp_path) as server:
        until(lambda: not old.exists())
        assert sorted((tmp_path / "states").iterdir()) == sorted(
            [*kept, new]
        )  # of the new one nobody knows yet
        assert (
            asked(server.http, name, "generate", **GREEDY)["usage"]["prompt_tokens_details"]["cached_tokens"]
            >= 256
        )


def free_ports(count):
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.mark.slow
def test_one_of_three_behind_haproxy_is_killed_under_load(tmp_path, tiny, tokenizer):
    """With the configuration of docs/serving.md: no session is lost, and every text is what it would be with one server."""
    if shutil.which("haproxy") is None:
        pytest.skip("haproxy is not installed (apt-get install haproxy)")
    (config,) = re.findall(r"```haproxy\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    port, *ports = free_ports(4)
    for number, each in enumerate((port, *ports)):
        config = config.replace(f":{8000 + number}", f":{each}")
    (tmp_path / "haproxy.cfg").write_text(config)
    folder = write_tiny(tmp_path / "tiny", tiny, tokenizer)
    options = ["--slots", "8", "--exact", "--sessions", tmp_path / "sessions"]
    with started_many(folder, ports, *options) as replicas:
        proxy = subprocess.Popen(["haproxy", "-f", str(tmp_path / "haproxy.cfg")])
        try:
            drive(f"http://127.0.0.1:{port}", replicas[0], tiny, tokenizer)
        finally:
            proxy.kill()
            proxy.wait()


def drive(url, victim, tiny, tokenizer):
    """Six clients write 12 × 20 tokens each, and ask again as client libraries do; the victim is killed meanwhile."""
    turns, failures = 12, []

    def again(ask):
        """Until it is answered: transport errors, 409, 429 and 5xx are asked again, as `openai` does."""
        end = time.monotonic() + 30
        while True:
            try:
                response = ask()
                if response.status_code < 400:
                    return response.json()
                assert response.status_code in (409, 429, 500, 502, 503, 504), response.text
                failures.append(response.status_code)
            except httpx.TransportError as error:
                failures.append(error)
            assert time.monotonic() < end, failures
            time.sleep(0.05)

    def write(_):
        transport = httpx.HTTPTransport(retries=3)  # of connections that are refused
        with httpx.Client(base_url=url, transport=transport, timeout=20) as http:
            name = again(lambda: http.post("/v1/sessions", json={"text": TEXT}))["id"]
            place = f"/v1/sessions/{name}"
            while (done := again(lambda: http.get(place))["position"] - 1 - len(TEXT)) < 20 * turns:
                assert done % 20 == 0  # each turn is there whole or not at all
                again(lambda: http.post(f"{place}/generate", json=GREEDY))
                made.append(name)
            return again(lambda: http.get(place))["text"]

    made = []
    want = TEXT + solo(tiny, tokenizer, 20 * turns + 80)
    with ThreadPoolExecutor(6) as pool:
        texts = [pool.submit(write, number) for number in range(6)]
        until(lambda: len(made) > 12, 30)
        victim.send_signal(signal.SIGKILL)
        for text in texts:
            found = text.result(60)
            assert len(found) >= len(TEXT) + 20 * turns
            assert want.startswith(found)
    assert victim.poll() == -signal.SIGKILL
