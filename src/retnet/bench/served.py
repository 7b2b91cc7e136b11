"""Models behind HTTP servers, each a process: this library's, llama.cpp's and Transformers', all with OpenAI's API."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from retnet.bench.gguf_models import ASCII, FAMILIES, FORMATS, equal_size
from retnet.bench.llama_cpp import LlamaCppModel
from retnet.data import Tokenizer
from retnet.measure import peers
from retnet.model import LanguageModel, ModelConfig
from retnet.model.checkpoint import model_files, write_checkpoint
from retnet.settings import UserError

Found = TypeVar("Found")

CB_BLOCK = 32  # tokens of a block of the cache of `transformers serve`
PATIENCE = 120.0  # seconds until a server answers
OURS, TRANSFORMER, HF = "retnet", "Transformer, retnet serve", "Llama, transformers serve"


class Listening(NamedTuple):
    """A server that answers.

    Attributes:
        url: of its API, without the path.
        pid: of its process.
    """

    url: str
    pid: int


@dataclass(frozen=True)
class Served:
    """A model and the server it is measured behind.

    Attributes:
        name: of both.
        weights: one of `gguf_models.FORMATS`.
        start: a context manager that runs the server for so many streams and tokens of context each.
        extra: fields of a request beyond OpenAI's: nothing of an earlier prompt is used, nothing ends a text early.
        takes_ids: whether prompts may be token ids; else they are text, a character a token.
    """

    name: str
    weights: str
    start: Callable[[int, int], AbstractContextManager[Listening]]
    extra: Mapping[str, Any]
    takes_ids: bool = True

    def body(self, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        """A request that reads a prompt of ASCII characters, ids of one token each, and writes so many tokens."""
        text: Any = list(prompt) if self.takes_ids else bytes(prompt).decode("ascii")
        return {
            "prompt": text,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }


class Running(NamedTuple):
    """A server that is up.

    Attributes:
        server: which.
        place: where.
        contexts: tokens of prompts that it has room for.
    """

    server: Served
    place: Listening
    contexts: Sequence[int] = ()


def ours(name: str, config: ModelConfig, weights: str, folder: Path) -> Served:
    """This library's server with a model of random weights, which is written below `folder`."""
    path = folder / re.sub(r"\W+", "-", name)
    if not path.exists():
        files = model_files(ascii_model(config))
        write_checkpoint(path, {**files, "tokenizer.json": Tokenizer.load("bytes").save})
    options = [] if weights == FORMATS[0] else ["--weights", "int8"]
    words = [sys.executable, "-m", "retnet", "serve", str(path), "--device", "cpu", *options]
    start = partial(_run_ours, words, folder / f"{path.name}-{FORMATS.index(weights)}.log")
    return Served(name, weights, start, {"cache": False})


def ascii_model(config: ModelConfig) -> LanguageModel:
    """A model with random weights whose likeliest token is always an ASCII character, never the end of the text.

    Its text can then be sent token by token, which is what is timed.
    """
    torch.manual_seed(0)
    model = LanguageModel(config).eval()
    with torch.no_grad():
        model.head.weight[ASCII:] = 0
    return model


@contextmanager
def _run_ours(words: Sequence[str], log: Path, streams: int, context: int) -> Iterator[Listening]:
    del context  # it has no bound
    with _process([*words, "--port", "0", "--slots", str(streams)], log) as process:
        url = _when(lambda: re.search(r"http://[\d.]+:\d+", _said(log)), process, log, "retnet serve")[0]
        _when(lambda: _answers(f"{url}/ready"), process, log, "retnet serve")
        yield Listening(url, process.pid)


def llama_cpp(config: ModelConfig, parameters: int, folder: Path, not_measured: list[str]) -> list[Served]:
    """llama.cpp's server with its models of so many parameters, fp32 and 8 bits; what cannot be is said in a sentence."""
    found = []
    for family in FAMILIES:
        try:
            size = equal_size(family, parameters, config.vocab_size or 1, config.d_model, config.num_layers)
        except UserError as error:
            not_measured.append(f"{family.title} of llama.cpp is not measured: {error}")
            continue
        for weights in FORMATS:
            model = LlamaCppModel(family, size, config.vocab_size or 1, weights, folder)
            extra = {"ignore_eos": True, "cache_prompt": False, "samplers": ["temperature"]}
            found.append(Served(model.name, weights, partial(_run_llama_cpp, model), extra))
    return found


@contextmanager
def _run_llama_cpp(model: LlamaCppModel, streams: int, context: int) -> Iterator[Listening]:
    with model.running(torch.get_num_threads(), context, streams):
        yield Listening(f"http://{model.address}", model.pid)


def transformers_serve(config: ModelConfig, parameters: int, folder: Path) -> Served:
    """`transformers serve` with a Llama of so many parameters.

    Raises:
        UserError: something that it needs is missing, or no Llama has this size.
    """
    absent = [name for name in ("transformers", "uvicorn", "openai", "accelerate") if find_spec(name) is None]
    if absent:
        raise UserError(f"{' and '.join(absent)} missing; pip install 'transformers[serving]'")
    (transformers,) = peers.need("transformers")
    path = folder / "llama-hf"
    torch.manual_seed(0)
    model: Any = peers.llama(config.vocab_size or 1, config.d_model, config.num_layers, parameters)
    with torch.no_grad():
        model.lm_head.weight[ASCII:] = 0
    model.config.eos_token_id = model.config.bos_token_id = None
    model.generation_config = transformers.GenerationConfig(do_sample=False)
    model.save_pretrained(path)
    Tokenizer.load("bytes").save(folder / "bytes.json")
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "bytes.json")).save_pretrained(path)
    return Served(HF, FORMATS[0], partial(_run_transformers, path), {"model": str(path)}, takes_ids=False)


@contextmanager
def _run_transformers(path: Path, streams: int, context: int) -> Iterator[Listening]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    blocks = str(streams * (-(-context // CB_BLOCK) + 2))  # else it takes most of the memory there is
    options = ["--continuous-batching", "--cb-block-size", str(CB_BLOCK), "--cb-num-blocks", blocks]
    batching = options if streams > 1 else []
    code = "from transformers.cli.transformers import main; main()"
    words = [
        sys.executable,
        "-c",
        code,
        "serve",
        str(path),
        "--port",
        str(port),
        "--device",
        "cpu",
        *batching,
    ]
    log, url = path.with_suffix(".log"), f"http://127.0.0.1:{port}"
    with _process([*words, "--host", "127.0.0.1"], log) as process:
        _when(lambda: _answers(f"{url}/health"), process, log, HF)
        yield Listening(url, process.pid)


@contextmanager
def _process(words: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, what it says in a file."""
    with log.open("wb") as said, subprocess.Popen(words, stdout=said, stderr=said) as process:
        try:
            yield process
        finally:
            process.kill()


def _when(true: Callable[[], Found | None], process: subprocess.Popen[bytes], log: Path, who: str) -> Found:
    """What a function returns once that is something, as long as the process lives."""
    end = time.monotonic() + PATIENCE
    while not (found := true()):
        if process.poll() is not None or time.monotonic() > end:
            last = _said(log).strip().splitlines()[-1:]
            raise UserError(f"{who} does not start: {last[0] if last else 'it says nothing'}")
        time.sleep(0.05)
    return found


def _said(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
