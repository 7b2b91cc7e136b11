"""Two questions to this library's server: does a chat stay as fast, and what does it cost beside the bare decoder?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from retnet.bench.gguf_models import ASCII
from retnet.bench.load import LoadGenerator
from retnet.bench.served import Served, ascii_model
from retnet.engine import Decoder, choose_decoder, quantise
from retnet.measure.clock import Spread, spread
from retnet.model import ModelConfig
from retnet.progress import Say

STEPS = 192  # tokens a stream writes where the server stands beside the decoder
SECONDS = 1.0  # that the decoder is timed
NEAR = 2  # turns before and after one, whose median stands for it


@dataclass
class ChatRow:
    """One conversation, several times over: seconds of each turn, from the question to the last token."""

    name: str
    turns: int
    seconds: list[list[float]] = field(default_factory=list)  # round by round

    @property
    def growth(self) -> Spread:
        """The last turn ÷ the second, each the median of those beside it."""
        return spread(_near(each, self.turns - 1) / _near(each, 1) for each in self.seconds)

    def record(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {
            "name": self.name,
            "growth": vars(self.growth),
            "turns": [vars(spread(turn)) for turn in zip(*self.seconds, strict=True)],
        }


def _near(seconds: Sequence[float], turn: int) -> float:
    """The median around a turn; the first, which is read from nothing, is none of them."""
    return statistics.median(seconds[max(1, turn - NEAR) : turn + NEAR + 1])


@dataclass
class OverheadRow:
    """Seconds of a step of all streams, seen by clients, beside the decoder's alone."""

    weights: str
    streams: int
    served: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> Spread:
        """Server ÷ decoder, round by round."""
        return spread(a / b for a, b in zip(self.served, self.bare, strict=True))

    def record(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {
            "weights": self.weights,
            "streams": self.streams,
            "served_seconds": vars(spread(self.served)),
            "bare_seconds": vars(spread(self.bare)),
            "ratio": vars(self.ratio),
        }


def measure_chats(
    servers: Sequence[Served],
    load: LoadGenerator,
    turns: int,
    said: int,
    tokens: int,
    rounds: int,
    say: Say,
) -> list[ChatRow]:
    """The same conversation with each server, by /v1/chat/completions, in interleaved rounds.

    Args:
        servers: of ours.
        load: the generator.
        turns: of a conversation.
        said: characters of what is said in each.
        tokens: of each answer.
        rounds: conversations with each.
        say: where progress goes.
    """
    rows = [ChatRow(server.name, turns) for server in servers]
    body = {
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with ExitStack() as stack:
        found = [stack.enter_context(server.start(1, 0)) for server in servers]
        for number in range(rounds):
            random = np.random.default_rng(number)  # nobody has heard the beginning before
            texts = [bytes(random.integers(97, 123, said).tolist()).decode() for _ in range(turns)]
            for row, server, place in zip(rows, servers, found, strict=True):
                say(f"a chat of {turns} turns, {number + 1} of {rounds}: {server.name}")
                url = f"{place.url}/v1/chat/completions"
                answers = load.conversation(url, body, texts, tokens, server.name)
                row.seconds.append([each.arrivals[-1] - each.begin for each in answers])
    return rows


def measure_overhead(
    config: ModelConfig,
    servers: Sequence[Served],
    load: LoadGenerator,
    streams: Sequence[int],
    steps: int,
    rounds: int,
    say: Say,
) -> list[OverheadRow]:
    """Steps behind the server and in this process, in turns, with the fewest and the most streams.

    Args:
        config: of the model.
        servers: of ours, one for each of `gguf_models.FORMATS`.
        load: the generator.
        streams: of which the least and the greatest number count.
        steps: tokens a stream writes, at least; with many streams more, for they begin one after the other.
        rounds: of both.
        say: where progress goes.
    """
    model = ascii_model(config)
    rows = []
    for count in sorted({min(streams), max(streams)}):
        for server, ours in zip(servers, (model, quantise(model)), strict=True):
            row, decoder = OverheadRow(server.weights, count), choose_decoder(ours, count)
            random, asked = np.random.default_rng(0), max(steps, min(STEPS, 3 * steps))
            with server.start(count, 0) as found:
                for number in range(rounds + 1):  # the first warms up
                    say(f"server and decoder, {count} streams, {server.weights}, round {number}")
                    prompts = random.integers(32, ASCII - 1, (count, 64)).tolist()
                    bodies = [server.body(prompt, asked) for prompt in prompts]
                    sample = load.together(f"{found.url}/v1/completions", bodies, asked, server.name)
                    bare = _bare(decoder, count)
                    if number and sample.together is not None:
                        row.served.append(sample.together)
                        row.bare.append(bare)
            if row.served:
                rows.append(row)
    return rows


@torch.inference_mode()
def _bare(decoder: Decoder, rows: int) -> float:
    """Seconds of a greedy step."""
    slots = torch.arange(rows)
    decoder.reset(slots)
    tokens, steps, begin = torch.randint(32, ASCII - 1, (rows,)), 0, time.perf_counter()
    while (seconds := time.perf_counter() - begin) < SECONDS:
        tokens = decoder.step(tokens, slots).argmax(-1)
        steps += 1
    return seconds / steps
