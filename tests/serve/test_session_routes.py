"""/v1/sessions: what comes of them is what the engine's sessions give, also after a restart; bad states are refused."""

import shutil
import struct
import threading

import pytest
import torch

from retnet.engine import ComposedDecoder, Engine, Sampling, Session, storage
from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from tests.helpers.serving import joined, refused, stream, until
from tests.helpers.sessions import altered

TEXT = "It was a dark and stormy night; the rain fell in torrents. " * 6  # more than two blocks
GREEDY = {"temperature": 0, "max_tokens": 12, "logit_bias": {"256": -1000}}
BYTES = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def engine(tiny, tokenizer):
    return Engine(ComposedDecoder(tiny, 2), tokenizer, exact=True, cache_bytes=1 << 24)


def create(http, **body):
    response = http.post("/v1/sessions", json=body)
    assert response.status_code == 201, response.text
    return response.json()["id"]


def verb(http, name, what, **body):
    response = http.post(f"/v1/sessions/{name}/{what}", json=body)
    assert response.status_code in (200, 201), response.text
    return response.json()


def written(http, name):
    """What a greedy continuation of a session is."""
    return verb(http, name, "generate", **GREEDY)["choices"][0]["text"]


def expected(engine, text):
    session = Session(engine)
    session.append(text)
    bias = {256: -1000.0}
    return session.generate(max_tokens=12, sampling=Sampling(temperature=0, logit_bias=bias)).text


def test_all_verbs_give_what_the_engine_gives(http, engine):
    name = create(http, text=TEXT)
    first = written(http, name)
    assert first == expected(engine, TEXT)
    shown = http.get(f"/v1/sessions/{name}").json()
    assert shown["text"] == TEXT + first
    assert shown["position"] == len(shown["tokens"]) == 1 + len(TEXT) + 12
    other = verb(http, name, "fork")["id"]
    verb(http, name, "append", text=" and then")
    assert written(http, name) == expected(engine, TEXT + first + " and then")
    assert verb(http, other, "rewind", position=101)["position"] == 101
    assert written(http, other) == expected(engine, TEXT[:100])
    verb(http, other, "edit", position=51, text="NEW")
    assert written(http, other) == expected(engine, TEXT[:50] + "NEW")
    assert {name, other} <= {each["id"] for each in http.get("/v1/sessions").json()["data"]}
    for each in (name, other):
        assert http.delete(f"/v1/sessions/{each}").json()["deleted"]
        refused(http.get(f"/v1/sessions/{each}"), 404)


def test_streams_and_says_what_has_become_of_the_session(http, engine):
    name = create(http, text=TEXT)
    events = stream(http, f"/v1/sessions/{name}/generate", GREEDY)
    assert joined(events) == expected(engine, TEXT)
    assert events[-1]["session"]["position"] == 1 + len(TEXT) + 12
    assert events[-1]["usage"]["completion_tokens"] == 12


def test_a_client_that_leaves_leaves_the_session_as_it_was(server, http):
    name = create(http, text="abc")
    body = {**GREEDY, "max_tokens": 60_000, "stream": True}
    with http.stream("POST", f"/v1/sessions/{name}/generate", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert "being used" in refused(http.post(f"/v1/sessions/{name}/append", json={"text": "x"}), 409)
        assert http.get(f"/v1/sessions/{name}").json()["busy"]
    until(lambda: not http.get(f"/v1/sessions/{name}").json()["busy"])
    assert http.get(f"/v1/sessions/{name}").json()["position"] == 4


def test_a_session_is_being_used_until_it_is_written(serving, tmp_path, monkeypatch):
    """The client leaves as what was generated is being written: nobody else's change comes between text and record."""
    real, writing, go_on = storage.DirectoryStorage.create, threading.Event(), threading.Event()

    def create_slowly(self, *file):
        writing.set()
        go_on.wait(10)
        return real(self, *file)

    with serving(sessions=tmp_path) as server:
        name = create(server.http, text="abc")
        place = f"/v1/sessions/{name}"
        monkeypatch.setattr(storage.DirectoryStorage, "create", create_slowly)
        with server.http.stream("POST", f"{place}/generate", json={**GREEDY, "stream": True}):
            assert writing.wait(10)
        until(lambda: server.service.gate.texts == 0)
        assert "being used" in refused(server.http.post(f"{place}/append", json={"text": "x"}), 409)
        go_on.set()
        until(lambda: not server.http.get(place).json()["busy"])
        assert verb(server.http, name, "append", text="x")["position"] == 4 + 12 + 1


def test_appending_nothing_is_no_place_to_go_back_to(http):
    name = create(http, text="abc")
    for _ in range(3):
        assert verb(http, name, "append", text="")["marks"] == [1]


def test_bytes_go_down_and_up(http, engine):
    name = create(http, text=TEXT)
    written(http, name)
    for query in ("", "?every=true"):
        content = http.get(f"/v1/sessions/{name}/export{query}").content
        response = http.post("/v1/sessions/import", content=content, headers=BYTES)
        assert response.status_code == 201, response.text
        copy = response.json()
        assert copy["id"] != name
        assert copy["position"] == 1 + len(TEXT) + 12
        here = Session.from_bytes(engine, content, name="here")
        verb(http, copy["id"], "append", text="!")
        here.append("!")
        bias = {256: -1000.0}
        assert (
            written(http, copy["id"])
            == here.generate(max_tokens=12, sampling=Sampling(temperature=0, logit_bias=bias)).text
        )


def test_after_a_restart_all_is_there(serving, engine, tmp_path):
    with serving(sessions=tmp_path) as server:
        name, gone = create(server.http, text=TEXT), create(server.http, text="b")
        first = written(server.http, name)
        verb(server.http, name, "save")
        assert list((tmp_path / "states").glob("*.safetensors"))
        server.http.delete(f"/v1/sessions/{gone}")
    with serving(sessions=tmp_path) as server:
        assert [each["id"] for each in server.http.get("/v1/sessions").json()["data"]] == [name]
        reply = verb(server.http, name, "generate", **GREEDY)
        assert reply["choices"][0]["text"] == expected(engine, TEXT + first)
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] >= 256
        server.http.delete(f"/v1/sessions/{name}")
    assert not list((tmp_path / "states").glob("*.safetensors"))


def test_without_a_directory_nothing_is_saved(http):
    name = create(http, text="a")
    assert "--sessions" in refused(http.post(f"/v1/sessions/{name}/save", json={}))


def test_no_more_sessions_than_allowed(serving):
    with serving(max_sessions=1) as server:
        name = create(server.http)
        assert "delete one" in refused(server.http.post("/v1/sessions", json={}), 429)
        server.http.delete(f"/v1/sessions/{name}")
        create(server.http)


def test_no_session_longer_than_allowed(serving, exported):
    with serving(max_prompt_tokens=20) as server:
        http = server.http
        refused(http.post("/v1/sessions", json={"text": "x" * 20}))
        name = create(http, text="x" * 10)
        refused(http.post(f"/v1/sessions/{name}/append", json={"text": "x" * 10}))
        for verb_ in ("append", "edit"):
            for more in ({"text": "x" * 10}, {"tokens": [1] * 10}):
                body = more if verb_ == "append" else more | {"position": 11}
                assert "has 21 tokens" in refused(http.post(f"/v1/sessions/{name}/{verb_}", json=body))
        assert http.get(f"/v1/sessions/{name}").json()["text"] == "x" * 10
        assert verb(http, name, "edit", position=2, text="y" * 18)["position"] == 20
        verb(http, name, "rewind", position=11)
        refused(http.post("/v1/sessions/import", content=exported, headers=BYTES))
        assert set(server.service.engine._engine.store._held) <= {
            name
        }  # nothing is kept for what was refused
        refused(http.post(f"/v1/sessions/{name}/generate", json={"max_tokens": 10}))
        assert not http.get(f"/v1/sessions/{name}").json()["busy"]


@pytest.mark.parametrize(
    ("what", "body", "message"),
    [
        ("append", {}, "text or tokens"),
        ("append", {"text": "a", "tokens": [1]}, "one of the two"),
        ("append", {"tokens": [257]}, "token id 257"),
        ("append", {"tokens": [-1]}, "tokens"),
        ("append", {"text": 3}, "text"),
        ("append", {"txt": "a"}, "no field 'txt'"),
        ("rewind", {}, "position is missing"),
        ("rewind", {"position": 0}, "position"),
        ("rewind", {"position": 5}, "beyond the session's 4 tokens"),
        ("rewind", {"position": 2**63}, "position"),
        ("edit", {"position": 2, "tokens": [257]}, "token id 257"),
        ("edit", {"position": 9, "text": "a"}, "beyond the session's 4 tokens"),
        ("edit", {"position": 2}, "text or tokens"),
        ("fork", {"name": "../../etc/passwd"}, "no field 'name'"),
        ("generate", {"n": 2}, "no field 'n'"),
        ("generate", {"max_tokens": 0}, "max_tokens"),
        ("generate", {"stream_options": {}}, "needs stream"),
    ],
)
def test_bad_verbs_change_nothing(http, what, body, message):
    name = create(http, text="abc")
    assert message in refused(http.post(f"/v1/sessions/{name}/{what}", json=body))
    shown = http.get(f"/v1/sessions/{name}").json()
    assert (shown["text"], shown["busy"]) == ("abc", False)


@pytest.mark.parametrize("name", ["x", "0" * 32, "..%2F..%2Fetc%2Fpasswd", "%00", "%FF", "a" * 5000])
def test_ids_that_are_no_session(http, name):
    refused(http.get(f"/v1/sessions/{name}"), 404)
    refused(http.delete(f"/v1/sessions/{name}"), 404)
    refused(http.post(f"/v1/sessions/{name}/append", json={"text": "a"}), 404)


# -- states that cannot be used ---------------------------------------------------------------------------------


def changed(content, change=lambda tensors: None, header=lambda header: None):
    """An exported session with other tensors or another header, its hashes made to fit."""
    return altered(content, lambda about, tensors: (change(tensors), header(about)))


def first_state(tensors):
    return next(key for key, part in sorted(tensors.items()) if key != "tokens" and part.is_floating_point())


def poison(tensors):
    tensors[first_state(tensors)].view(-1)[0] = torch.nan


def misshape(tensors):
    key = first_state(tensors)
    tensors[key] = tensors[key][..., :1].contiguous()


def rename(tensors):
    tensors["../../x"] = tensors.pop(first_state(tensors))


BAD = {
    "empty": lambda content: b"",
    "text": lambda content: b"this is not a session",
    "truncated": lambda content: content[: len(content) // 2],
    "a byte short": lambda content: content[:-1],
    "a bit flipped": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "a huge header": lambda content: b"\xff" * 8 + content[8:],
    "deep JSON": lambda content: struct.pack("<Q", 20_000) + b"[" * 20_000,
    "NaN": lambda content: changed(content, poison),
    "another shape": lambda content: changed(content, misshape),
    "a path for a place": lambda content: changed(content, rename),
    "no states but a path": lambda content: changed(
        content, lambda t: t.update({"../x.0.kv": t["tokens"].clone()})
    ),
    "negative ids": lambda content: changed(content, lambda t: t["tokens"].neg_()),
    "large ids": lambda content: changed(content, lambda t: t["tokens"].fill_(2**62)),
    "ids of another type": lambda content: changed(content, lambda t: t.update(tokens=t["tokens"].float())),
    "no ids": lambda content: changed(content, lambda t: t.pop("tokens") is None),
    "another model": lambda content: changed(content, header=lambda h: h.update(model="0" * 64)),
    "another tokenizer": lambda content: changed(content, header=lambda h: h.update(tokenizer="0" * 64)),
    "another format": lambda content: changed(content, header=lambda h: h.update(format=1)),
    "no marks": lambda content: changed(content, header=lambda h: h.pop("marks")),
    "marks that are none": lambda content: changed(content, header=lambda h: h.update(marks=["x"])),
    "a number for a name": lambda content: changed(content, header=lambda h: h.update(name=3)),
}


@pytest.fixture(scope="module")
def exported(http):
    name = create(http, text=TEXT)
    written(http, name)
    return http.get(f"/v1/sessions/{name}/export").content


@pytest.mark.parametrize("case", BAD)
def test_bad_states_are_refused(http, exported, case):
    before = len(http.get("/v1/sessions").json()["data"])
    response = http.post("/v1/sessions/import", content=BAD[case](exported), headers=BYTES)
    assert refused(response).startswith(("the session", "the state's", "this is no session", "tokens has"))
    assert len(http.get("/v1/sessions").json()["data"]) == before
    assert http.get("/ready").status_code == 200


def test_the_change_itself_is_not_what_is_refused(http, exported):
    response = http.post("/v1/sessions/import", content=changed(exported), headers=BYTES)
    assert response.status_code == 201


def test_a_state_of_another_model(http, tokenizer):
    torch.manual_seed(2)
    config = ModelConfig(vocab_size=257, d_model=32, num_layers=2, mixer=RetentionConfig(num_heads=2))
    other = Engine(
        ComposedDecoder(LanguageModel(config).eval(), 1), tokenizer, exact=True, cache_bytes=1 << 24
    )
    session = Session(other)
    session.append(TEXT)
    session.generate(max_tokens=2)
    response = http.post("/v1/sessions/import", content=session.export(), headers=BYTES)
    assert "of another model" in refused(response)


def test_a_name_in_a_state_is_no_path(http, exported, tmp_path):
    evil = changed(exported, header=lambda h: h.update(name=f"../../..{tmp_path}/evil"))
    response = http.post("/v1/sessions/import", content=evil, headers=BYTES)
    assert response.status_code == 201
    assert len(response.json()["id"]) == 32
    assert not list(tmp_path.iterdir())
    assert "application/octet-stream" in refused(http.post("/v1/sessions/import", json={}), 415)


def test_a_disk_that_is_full(serving, tmp_path, monkeypatch):
    """What cannot be written is said (507) and has not happened; everything else goes on."""

    def refuse(path, content):
        raise OSError(28, "No space left on device", str(path))

    def full(response):
        message = refused(response, 507)
        assert "cannot be written" in message
        assert "No space left on device" in message

    with serving(sessions=tmp_path / "sessions") as server:
        http = server.http
        name = create(http, text=TEXT)
        want = written(http, name)
        before = http.get(f"/v1/sessions/{name}").json()
        path = f"/v1/sessions/{name}"
        with monkeypatch.context() as patch:
            for verb_ in ("write", "create"):
                patch.setattr(storage.DirectoryStorage, verb_, lambda self, *file: refuse(*file))
            full(http.post("/v1/sessions", json={"text": "abc"}))
            for verb_, body in (
                ("append", {"text": "more"}),
                ("rewind", {"position": 9}),
                ("edit", {"position": 9, "text": "x"}),
                ("fork", {}),
                ("save", {}),
                ("generate", GREEDY),
            ):
                full(http.post(f"{path}/{verb_}", json=body))
            with http.stream("POST", f"{path}/generate", json={**GREEDY, "stream": True}) as response:
                text = response.read().decode()
            assert "cannot be written" in text
            assert text.rstrip().endswith("[DONE]")
            assert http.get(path).json() == before
            assert [each["id"] for each in http.get("/v1/sessions").json()["data"]] == [name]
            assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        assert verb(http, name, "append", text=" and then")["position"] == before["position"] + len(
            " and then"
        )
        verb(http, name, "save")
        assert set(server.service.engine._engine.store._held) <= {
            name
        }  # nothing is kept for what was refused
        shutil.rmtree(tmp_path / "sessions")
        refused(http.get(path), 404)  # what is in the storage counts: another server may have deleted it
        assert want in before["text"]
