"""Who may use the server: keys of a file, compared whole, and what belongs to whom."""

import pytest
import torch

from retnet.serve import plain_routes
from retnet.serve.access import ApiKeys
from retnet.settings import UserError
from tests.helpers.serving import refused
from tests.helpers.sessions import altered

FIRST, SECOND = "sk-first-äöü-0123", "sk-second-0123456"
TEXT, OTHER = "It was a dark and stormy night. " * 10, "The rain fell in torrents today. " * 10


def bearer(key):
    return {"Authorization": f"Bearer {key}".encode()}


@pytest.fixture(scope="module")
def guarded(serving, tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text(f"# of the team\n\n{FIRST}\n  {SECOND}\n", encoding="utf-8")
    with serving(keys=ApiKeys.read(file)) as server:
        yield server.http


def test_only_known_keys(guarded):
    for key in (FIRST, SECOND):
        assert guarded.get("/v1/models", headers=bearer(key)).status_code == 200
    assert guarded.get("/v1/models", headers={"x-api-key": SECOND}).status_code == 200
    for key in (FIRST[:-1], FIRST + "x", "sk-first", "ключ", FIRST.upper(), f"{FIRST} {SECOND}"):
        response = guarded.get("/v1/models", headers=bearer(key))
        assert "not known" in refused(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
    assert "no API key was sent" in refused(guarded.get("/v1/models"), 401)
    assert "no API key was sent" in refused(guarded.get("/v1/nothing"), 401)
    for path in ("/tokenize", "/v1/completions", "/v1/sessions", "/v1/sessions/import"):
        refused(guarded.post(path, json={}), 401)
    assert refused(guarded.get("/v1/models", headers={"Authorization": "Basic eDp5"}), 401)


def test_what_needs_no_key(guarded):
    for path in (*plain_routes.FILES, "/health", "/ready", "/metrics", "/openapi.json"):
        assert guarded.get(path).status_code == 200, path


def test_sessions_belong_to_a_key(guarded):
    name = guarded.post("/v1/sessions", json={"text": "abc"}, headers=bearer(FIRST)).json()["id"]
    assert len(guarded.get("/v1/sessions", headers=bearer(FIRST)).json()["data"]) == 1
    assert guarded.get("/v1/sessions", headers=bearer(SECOND)).json()["data"] == []
    path = f"/v1/sessions/{name}"
    assert guarded.get(path, headers=bearer(FIRST)).status_code == 200
    verbs = {
        "append": {"text": "x"},
        "rewind": {"position": 1},
        "edit": {"position": 1, "text": "x"},
        "fork": {},
        "generate": {},
        "save": {},
    }
    for verb, body in verbs.items():
        refused(guarded.post(f"{path}/{verb}", json=body, headers=bearer(SECOND)), 404)
    for answer in (
        guarded.get(path, headers=bearer(SECOND)),
        guarded.get(f"{path}/export", headers=bearer(SECOND)),
        guarded.delete(path, headers=bearer(SECOND)),
    ):
        assert "there is no session" in refused(answer, 404)
    assert guarded.get(path, headers=bearer(FIRST)).json()["position"] == 4


def test_kept_states_belong_to_a_key(guarded):
    """Nobody learns what another key has asked; a state that somebody made up and brought changes nobody else's text."""

    def asked(key, **more):
        body = {"prompt": TEXT, "max_tokens": 8, "temperature": 0, "logprobs": 1, **more}
        reply = guarded.post("/v1/completions", json=body, headers=bearer(key)).json()
        return reply["choices"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]

    want, _ = asked(FIRST, cache=False)
    name = guarded.post("/v1/sessions", json={"text": TEXT}, headers=bearer(SECOND)).json()["id"]
    guarded.post(f"/v1/sessions/{name}/generate", json={"max_tokens": 1}, headers=bearer(SECOND))
    content = guarded.get(f"/v1/sessions/{name}/export", headers=bearer(SECOND)).content
    guarded.delete(f"/v1/sessions/{name}", headers=bearer(SECOND))

    def change(header, tensors):
        for part in tensors.values():
            if part.is_floating_point():
                part.fill_(3)
        tensors["tokens"] = torch.tensor([256, *OTHER.encode()])

    fake = altered(content, change)
    kind = {"Content-Type": "application/octet-stream"}
    brought = guarded.post("/v1/sessions/import", content=fake, headers=bearer(SECOND) | kind)
    assert brought.status_code == 201
    fooled, cached = asked(SECOND, prompt=OTHER)
    assert cached >= 128  # whoever makes up states gets what comes of them ...
    honest, cached = asked(FIRST, prompt=OTHER)
    assert cached == 0
    assert honest == asked(FIRST, prompt=OTHER, cache=False)[0] != fooled  # ... and nobody else

    assert asked(FIRST) == (want, 0)
    assert asked(FIRST) == (want, 256)
    assert asked(SECOND)[0] == want


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no keys"),
        ("# none\n", "has no keys"),
        ("short\n", "key of 5 characters"),
        (None, "cannot read"),
    ],
)
def test_key_files_that_cannot_be_used(tmp_path, content, message):
    if content is not None:
        (tmp_path / "keys").write_text(content)
    with pytest.raises(UserError, match=message):
        ApiKeys.read(tmp_path / "keys")


def test_a_name_says_nothing_of_its_key():
    keys = ApiKeys([FIRST, SECOND])
    names = {keys.owner(FIRST.encode()), keys.owner(SECOND.encode())}
    assert len(names) == 2
    assert all(len(name) == 32 for name in names)
    assert keys.owner(None) is keys.owner(b"") is keys.owner("ö".encode("latin-1")) is None
    assert ApiKeys().owner(None) == ApiKeys().owner(b"anything") == ""
