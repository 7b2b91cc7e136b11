"""A real server on a free port, with a tiny model."""

import threading
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import httpx
import pytest
import torch
import uvicorn

from retnet.data import Tokenizer
from retnet.engine import ComposedDecoder, Run
from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.serve.app import make_app
from retnet.serve.server import config_of, listen
from retnet.serve.settings import ServerSettings
from tests.helpers.serving import joined, stream

SLOTS = 8


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.load("bytes")


@pytest.fixture(scope="session")
def tiny():
    """A model of two layers over bytes, whose likeliest token is never the end of the text: its row of the head is 0."""
    torch.manual_seed(1)
    config = ModelConfig(vocab_size=257, d_model=32, num_layers=2, mixer=RetentionConfig(num_heads=2))
    model = LanguageModel(config).eval()
    with torch.no_grad():
        model.head.weight[256] = 0
    return model


@pytest.fixture(scope="session")
def serving(tiny, tokenizer, tmp_path_factory):
    """Starts a server: `with serving(keys=…, sessions=…, folder=…, **settings) as server`; `server.http` is a client."""

    @contextmanager
    def start(*, keys=None, sessions=None, folder=None, headers=None, decoder=None, port=0, **settings):
        settings = {"exact": True, "slots": SLOTS, "cache_bytes": 1 << 24} | settings
        run = Run(tiny, tokenizer, folder or tmp_path_factory.mktemp("checkpoint"), "last")
        decoder = decoder or ComposedDecoder(tiny, settings["slots"])
        with ExitStack() as stack:
            found = stack.enter_context(listen("127.0.0.1", port))
            app = make_app(
                run, "tiny", ServerSettings(**settings), keys=keys, sessions=sessions, decoder=decoder
            )
            server = uvicorn.Server(config_of(app))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [found]})
            thread.start()
            url = f"http://127.0.0.1:{found.getsockname()[1]}"
            http = stack.enter_context(httpx.Client(base_url=url, timeout=60, headers=headers or {}))
            try:
                for _ in range(2000):
                    if server.started and http.get("/ready").status_code == 200:
                        break
                    threading.Event().wait(0.005)
                service = app.state.service
                yield SimpleNamespace(
                    url=url, http=http, service=service, app=app, found=found, uvicorn=server
                )
            finally:
                server.should_exit = True
                thread.join(30)
                assert not thread.is_alive()

    return start


@pytest.fixture(scope="module")
def server(serving):
    with serving() as started:
        yield started


@pytest.fixture(scope="module")
def http(server):
    return server.http


@pytest.fixture(scope="module")
def undisturbed(server):
    """A stream that runs all the while; in the end it has the tokens that it has alone."""
    body = {"prompt": "abc", "max_tokens": 600, "seed": 9, "logit_bias": {"256": -1000}, "cache": False}
    with httpx.Client(base_url=server.url, timeout=60) as http:
        want = joined(stream(http, "/v1/completions", body))
        found, enough = [], threading.Event()

        def ask():
            while not enough.is_set():
                found.append(joined(stream(http, "/v1/completions", body)))

        thread = threading.Thread(target=ask)
        thread.start()
        yield
        enough.set()
        thread.join(60)
        assert found
        assert set(found) == {want}
