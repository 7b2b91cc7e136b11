"""`retnet serve` as a process: mistakes in one line, signals, a kill between two saves."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
import torch

from retnet.data import Tokenizer
from retnet.engine.storage import DirectoryStorage
from retnet.engine.versioned_files import VersionedFiles
from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.model.checkpoint import model_files, write_checkpoint
from tests.helpers.serving import refused, stream, until

RETNET = [sys.executable, "-c", "from retnet.cli import main; main()"]
NO_PROMPT = {"prompt": None}
LONG = {"prompt": "a", "max_tokens": 60_000, "logit_bias": {"256": -1000}, "stream": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    config = ModelConfig(vocab_size=257, d_model=32, num_layers=2, mixer=RetentionConfig(num_heads=2))
    path = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = Tokenizer.load("bytes")
    write_checkpoint(path, {**model_files(LanguageModel(config)), "tokenizer.json": tokenizer.save})
    return path


@contextmanager
def started(checkpoint, *options, **streams):
    words = [*RETNET, "serve", str(checkpoint), "--port", "0", "--slots", "4", *map(str, options)]
    if "stdin" in streams and streams.pop("stdin") is None:
        words = ["bash", "-c", 'exec "$@" <&-', "bash", *words]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, **streams)
    try:
        url, said = None, ""
        while url is None:
            line = process.stderr.readline()
            said += line
            assert line, said
            url = re.search(r"http://127\.0\.0\.1:\d+", line)
        reading = threading.Thread(target=process.stderr.read)  # so that it never blocks
        reading.start()
        with httpx.Client(base_url=url[0], timeout=60) as http:
            end = time.monotonic() + 120
            while True:
                try:
                    if http.get("/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                assert time.monotonic() < end
                time.sleep(0.05)
            yield process, http
    finally:
        process.kill()
        process.wait()
        if url is not None:
            reading.join()
        process.stderr.close()


@pytest.mark.slow
def test_the_first_signal_lets_streams_end_and_nobody_in(checkpoint, tmp_path):
    options = ("--shutdown-seconds", "1.5", "--sessions", tmp_path)
    with started(checkpoint, *options) as (process, http), ThreadPoolExecutor(2) as pool:
        name = http.post("/v1/sessions", json={"text": "abc"}).json()["id"]
        kept = pool.submit(
            stream, http, f"/v1/sessions/{name}/generate", {**LONG, "temperature": 0} | NO_PROMPT
        )
        whole = pool.submit(http.post, "/v1/completions", json={**LONG, "stream": False})
        with http.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            until(lambda: "retnet_texts_running 3.0" in http.get("/metrics").text)
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            text = "\n".join(lines)
        assert 1 < time.monotonic() - began < 6
        assert "the server is shutting down" in text
        assert text.rstrip().endswith("[DONE]")
        *_, cut, told = kept.result(10)  # a session keeps what it said
        assert cut["choices"][0]["finish_reason"] == "interrupted"
        assert "no time left" in refused(whole.result(10), 503)
        assert process.wait(20) == 0
    content = VersionedFiles(DirectoryStorage(tmp_path), "records").load(name).content
    assert len(json.loads(content)["tokens"]) == told["session"]["position"] > 4
    assert any((tmp_path / "states").iterdir())  # and need not read it again


@pytest.mark.slow
def test_what_ends_in_time_ends_as_ever(checkpoint):
    with started(checkpoint) as (process, http):
        short = {**LONG, "max_tokens": 300}
        with http.stream("POST", "/v1/completions", json=short) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            text = "\n".join(lines)
        assert '"finish_reason":"length"' in text
        assert "error" not in text
        assert process.wait(20) == 0


@pytest.mark.slow
def test_a_second_signal_ends_at_once(checkpoint):
    with (
        started(checkpoint, "--shutdown-seconds", "60") as (process, http),
        http.stream("POST", "/v1/completions", json=LONG) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 1
        assert time.monotonic() - began < 5


@pytest.mark.slow
def test_a_signal_while_the_model_is_read_is_heard():
    """Without a handler it would be lost where the server is the first process of a container."""
    code = """
import os, signal, sys, time
import retnet.engine
def open_run(*given, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
retnet.engine.open_run = open_run
from retnet.cli import main
sys.argv = ["retnet", "serve", "x", "--port", "0"]
main()
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.slow
def test_killed_between_two_saves_it_has_every_session_again(checkpoint, tmp_path):
    text, greedy = "It was a dark and stormy night. " * 10, {"temperature": 0, "max_tokens": 20}
    with started(checkpoint, "--sessions", tmp_path, "--exact") as (process, http):
        session = http.post("/v1/sessions", json={"text": text}).json()["id"]
        http.post(f"/v1/sessions/{session}/save", json={})
        first = http.post(f"/v1/sessions/{session}/generate", json=greedy).json()["choices"][0]["text"]
        fork = http.post(f"/v1/sessions/{session}/fork", json={}).json()["id"]
        want = http.post(f"/v1/sessions/{fork}/generate", json=greedy).json()["choices"][0]["text"]
        process.send_signal(signal.SIGKILL)
        process.wait()
    with started(checkpoint, "--sessions", tmp_path, "--exact") as (process, http):
        assert http.get(f"/v1/sessions/{session}").json()["text"] == text + first
        assert http.get(f"/v1/sessions/{fork}").json()["text"] == text + first + want
        again = http.post(f"/v1/sessions/{session}/generate", json=greedy).json()["choices"][0]["text"]
        assert again == want


@pytest.mark.slow
def test_a_hugging_face_folder_with_its_chat_template(checkpoint, tmp_path):
    folder = tmp_path / "folder"
    subprocess.run([*RETNET, "convert", str(checkpoint), str(folder)], check=True, capture_output=True)
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    with started(folder) as (_, http):
        (model,) = http.get("/v1/models").json()["data"]
        assert (model["id"], model["chat_template"]) == ("folder", "of the model")
        body = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 3}
        assert http.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"] == 1 + len(
            "[abc]"
        )


@pytest.mark.slow
def test_keys_of_a_file(checkpoint, tmp_path):
    (tmp_path / "keys").write_text("sk-0123456789\n")
    with started(checkpoint, "--api-key-file", tmp_path / "keys") as (_, http):
        refused(http.get("/v1/models"), 401)
        assert http.get("/v1/models", headers={"Authorization": "Bearer sk-0123456789"}).status_code == 200


@pytest.mark.slow
def test_without_standard_input_and_with_an_output_that_takes_nothing(checkpoint):
    with open("/dev/full", "w") as full, started(checkpoint, stdin=None, stdout=full) as (process, http):
        body = {"prompt": "a", "max_tokens": 3, "logit_bias": {"256": -1000}}
        assert http.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
