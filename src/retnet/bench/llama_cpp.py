"""llama.cpp as a peer: models of our size with random weights, each served by a process of its own.

Its server is asked over HTTP with prompts as token ids, greedy, and never ends early; what it says about its own time
(``timings``) is what counts, so neither HTTP nor this process is measured. Every answer is checked to be about as many
tokens as were asked for.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from retnet.bench.gguf_models import FAMILIES, FORMATS, Family, PeerSize, equal_size, parameters, write
from retnet.host import versions
from retnet.model import ModelConfig
from retnet.progress import Say
from retnet.settings import UserError

SERVER = Path(__file__).with_name("llama_cpp_server.py")
PATIENCE = 600.0  # seconds for one answer
ROOM = 256  # tokens of context beyond the longest prompt


def missing() -> str | None:
    """Why llama.cpp cannot be measured here, in one line; None where it can."""
    absent = [name for name in ("gguf", "xllamacpp") if find_spec(name) is None]
    if not absent:
        return None
    return f"llama.cpp is not measured: {' and '.join(absent)} missing; pip install 'retnet[llamacpp]'"


@dataclass
class LlamaCppPeers:
    """What of llama.cpp there is to measure, and what not."""

    models: list[LlamaCppModel] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)  # and why, a sentence each

    def record(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {
            "versions": versions("xllamacpp", "gguf"),
            "build": self.models[0].features if self.models else None,
            "models": [model.record() for model in self.models],
            "not_measured": self.not_measured,
        }


@contextmanager
def models(
    config: ModelConfig, count: int, contexts: Sequence[int], say: Say, until: float = math.inf
) -> Iterator[LlamaCppPeers]:
    """Starts a process for every family and format, and lets each family read the contexts.

    Args:
        config: of our model, whose vocabulary, width and depth they take over as far as they can.
        count: parameters they should have (see `gguf_models.parameters`).
        contexts: tokens that `LlamaCppModel.seconds_to_write` is to write after.
        say: where progress goes.
        until: on the clock of `time.monotonic`; a context that would be read later is left out.
    """
    found = LlamaCppPeers()
    if reason := missing():
        say(reason)
        found.not_measured.append(reason)
    families = () if found.not_measured else FAMILIES
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="retnet-bench-")))
        for family in families:
            try:
                size = equal_size(family, count, config.vocab_size or 1, config.d_model, config.num_layers)
                pair = [
                    LlamaCppModel(family, size, config.vocab_size or 1, weights, folder)
                    for weights in FORMATS
                ]
                for model in pair:
                    say(f"starting {model.name}, {model.weights}")
                    stack.enter_context(model.running(torch.get_num_threads(), max(contexts)))
                kept = _keep_contexts(pair[0], contexts, say, until)
            except UserError as error:
                found.not_measured.append(f"{family.title} of llama.cpp is not measured: {error}")
                say(found.not_measured[-1])
                continue
            for model in pair:
                model.contexts = kept
            for context in sorted({*contexts} - {*kept}):
                found.not_measured.append(
                    f"{family.title} of llama.cpp is not measured after {context:,} tokens: it has no time to read them"
                )
            found.models += pair
        yield found


def _keep_contexts(model: LlamaCppModel, contexts: Sequence[int], say: Say, until: float) -> list[int]:
    """Reads contexts, each from the one before, as long as there is time; those that were read."""
    kept, pace = [0], 0.0
    for context in sorted(contexts):
        begin, more = time.monotonic(), context - kept[-1]
        if begin + more * pace > until:
            break
        say(f"{model.name} reads a context of {context:,} tokens")
        model.keep_context(context, after=kept[-1])
        kept.append(context)
        pace = (time.monotonic() - begin) / more
    return kept[1:]


class LlamaCppModel:
    """One model in one process of llama.cpp."""

    def __init__(self, family: Family, size: PeerSize, vocab_size: int, weights: str, folder: Path) -> None:
        self.name = f"llama.cpp {family.title}"
        self.weights = weights
        self.contexts: list[int] = []  # that `seconds_to_write` can start from
        self.features = ""  # of the CPU that llama.cpp uses, as it says
        self.address, self.pid = "", 0  # of the process, while it runs
        self._family, self._size, self._vocab_size = family, size, vocab_size
        self._states = folder / family.name  # of both formats, which keep states alike
        self._file = folder / f"{family.name}-{FORMATS.index(weights)}.gguf"
        self._log = self._file.with_suffix(".log")
        self._random = np.random.default_rng(0)

    def record(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {
            "name": self.name,
            "weights": self.weights,
            **self._size._asdict(),
            "parameters": parameters(self._family, self._size, self._vocab_size),
        }

    @contextmanager
    def running(self, threads: int, context: int, slots: int = 1) -> Iterator[None]:
        """Writes the model, where that has not been done, and serves it.

        Args:
            threads: of the process.
            context: the most tokens of a prompt.
            slots: texts at once.

        Raises:
            UserError: it cannot be written, or llama.cpp does not take it.
        """
        if not self._file.exists():
            write(self._family, self._size, self._vocab_size, self.weights, self._file)
        self._states.mkdir(exist_ok=True)
        places = slots * -(-(context + ROOM) // 256) * 256
        asked = {"model": str(self._file), "threads": threads, "context": places, "slots": slots}
        words = [sys.executable, "-P", str(SERVER), json.dumps({**asked, "states": f"{self._states}/"})]
        pipe = subprocess.PIPE
        with (
            self._log.open("w") as log,
            subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=log, text=True) as process,
        ):
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                if not line:
                    raise self._failed("does not start")
                told = json.loads(line)
                self.address, self.features = urlsplit(told["address"]).netloc, told["features"]
                self.pid = process.pid
                yield
            finally:
                process.kill()  # an answer may be under way

    def prompt(self, tokens: int) -> list[int]:
        """Random token ids, others at every call."""
        return _token_ids(self._random, self._vocab_size, tokens)

    def seconds_to_read(self, tokens: int) -> float:
        """Per token of a new prompt of so many tokens."""
        timings = self._complete(self.prompt(tokens), write=1, read=tokens)
        return float(timings["prompt_ms"]) / 1e3 / tokens

    def seconds_to_write(self, after: int, tokens: int) -> float:
        """Per token, of so many tokens after a context that `keep_context` has left.

        The first of them comes out of reading the prompt, so it is not among those that are timed.
        """
        self._ask("/slots/0?action=restore", {"filename": f"{after}"})
        timings = self._complete([*self.context(after), 0], write=tokens + 1, read=1)
        return float(timings["predicted_ms"]) / 1e3 / tokens

    def keep_context(self, tokens: int, after: int = 0) -> None:
        """Reads a context of so many tokens, of which a kept one holds the first `after`, and keeps its state."""
        if after:
            self._ask("/slots/0?action=restore", {"filename": f"{after}"})
        self._complete(self.context(tokens), write=1, read=tokens - after)
        self._ask("/slots/0?action=save", {"filename": f"{tokens}"})

    def context(self, tokens: int) -> list[int]:
        """The first tokens of the text that contexts are cut from."""
        return _token_ids(np.random.default_rng(1), self._vocab_size, tokens)

    def _complete(self, prompt: Sequence[int], write: int, read: int) -> dict[str, Any]:
        """Timings of a completion that should read and write so many tokens."""
        asked = {
            "prompt": prompt,
            "n_predict": write,
            "temperature": 0,
            "samplers": ["temperature"],
            "ignore_eos": True,
            "cache_prompt": read < len(prompt),
        }
        timings: dict[str, Any] = self._ask("/completion", asked)["timings"]
        done = timings["prompt_n"], timings["predicted_n"]
        if done != (read, write):
            raise UserError(
                f"{self.name} read {done[0]} and wrote {done[1]} tokens, but was to read {read} and write {write}; "
                "its times would mean nothing"
            )
        return timings

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = HTTPConnection(self.address, timeout=PATIENCE)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
        except OSError as error:
            raise self._failed(f"does not answer ({error})") from None
        finally:
            connection.close()
        if answer.status != 200:
            raise self._failed(f"answered {path} with {text[:200]!r}")
        found: dict[str, Any] = json.loads(text)
        return found

    def _failed(self, what: str) -> UserError:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return UserError(f"{self.name} {what}" + (f": {lines[-1]}" if lines else ""))


def _token_ids(random: np.random.Generator, vocab_size: int, count: int) -> list[int]:
    ids: list[int] = random.integers(vocab_size, size=count).tolist()
    return ids
