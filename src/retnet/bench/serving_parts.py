"""Two questions to this library's server: does a chat stay as fast, and what does it cost beside the bare decoder?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from retnet.bench.gguf_models import ASCII, FORMATS
from retnet.bench.load import LoadGenerator
from retnet.bench.served import Running, ascii_model
from retnet.engine import Decoder, choose_decoder, quantise
from retnet.measure.clock import Spread, spread
from retnet.model import ModelConfig
from retnet.progress import Say

if TYPE_CHECKING:
    from retnet.bench.serving import ServeBench

STEPS = 192  # tokens a stream writes where the server stands beside the decoder, at least
LONGER = 24  # times the tokens of a request, at most
PROMPT = 64  # tokens before them
SECONDS = 1.0  # that the decoder is timed
NEAR = 2  # turns before and after one, whose median stands for it


@dataclass
class ChatRow:
    """One conversation, several times over: seconds of each turn, from the question to the last token."""

    name: str
    turns: int
    seconds: list[list[float]] = field(default_factory=list)  # round by round
    anew: list[list[float]] = field(default_factory=list)  # of the first turns of another one, right after it

    @property
    def growth(self) -> Spread:
        """The last turn ÷ the second, before and after it, each the median of those beside it."""
        return spread(
            2 * _near(each, self.turns - 1) / (_near(each, 1) + _near(anew, 1))
            for each, anew in zip(self.seconds, self.anew, strict=True)
        )

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
    servers: Sequence[Running], load: LoadGenerator, bench: ServeBench, say: Say
) -> list[ChatRow]:
    """The same conversation with each fp32 server, by /v1/chat/completions, in interleaved rounds."""
    entered = [one for one in servers if one.server.weights == FORMATS[0]]
    rows = [ChatRow(one.server.name, bench.turns) for one in entered]
    body = {
        "max_tokens": bench.tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    for number in range(bench.rounds):
        random = np.random.default_rng(number)  # nobody has heard the beginning before
        count = bench.turns + NEAR + 2
        said = [bytes(random.integers(97, 123, bench.said).tolist()).decode() for _ in range(count)]
        for row, one in zip(rows, entered, strict=True):
            say(f"a chat of {bench.turns} turns, {number + 1} of {bench.rounds}: {row.name}")
            url = f"{one.place.url}/v1/chat/completions"
            for turns, seconds in ((said[: bench.turns], row.seconds), (said[bench.turns :], row.anew)):
                answers = load.conversation(url, body, turns, bench.tokens, row.name)
                seconds.append([each.arrivals[-1] - each.begin for each in answers])
    return rows


def measure_overhead(
    config: ModelConfig,
    servers: Sequence[Running],
    load: LoadGenerator,
    bench: ServeBench,
    streams: int,
    say: Say,
) -> list[OverheadRow]:
    """Steps behind the server and in this process, in turns.

    Args:
        config: of the model.
        servers: of it, with weights of either kind.
        load: the generator.
        bench: tokens a stream writes, at least; with many streams more, for they begin one after the other.
        streams: at once.
        say: where progress goes.
    """
    model, rows = ascii_model(config), []
    for one in servers:
        weights = one.server.weights
        ours = model if weights == FORMATS[0] else quantise(model)
        row, decoder = OverheadRow(weights, streams), choose_decoder(ours, streams)
        random, least = np.random.default_rng(0), max(bench.tokens, min(STEPS, 3 * bench.tokens))
        for number in range(bench.rounds + 1):  # the first warms up
            say(f"server and decoder, {streams} streams, {weights}, round {number}")
            bare = _bare(decoder, streams)
            tokens = max(least, min(round(SECONDS / bare), LONGER * bench.tokens))  # both for about as long
            prompts = random.integers(32, ASCII - 1, (streams, PROMPT)).tolist()
            bodies = [one.server.body(prompt, tokens) for prompt in prompts]
            sample = load.together(f"{one.place.url}/v1/completions", bodies, tokens, one.server.name)
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
