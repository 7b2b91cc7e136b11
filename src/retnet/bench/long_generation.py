"""One long generation: time and memory of its last token beside those of its hundredth."""

from __future__ import annotations

import statistics
from typing import Any

import psutil
import torch
from torch import Tensor

from retnet.engine import decode_from
from retnet.measure.clock import Spread, Target, median_seconds, spread
from retnet.model import LanguageModel, ModelConfig, ModelState
from retnet.progress import Say

FIRST = 100  # tokens into a generation that all later ones are compared with
BLOCKS, BLOCK = 5, 20  # at each mark: so many blocks of so many steps, alternating with steps at token 100


def generate_long(config: ModelConfig, tokens: int, say: Say) -> dict[str, Any]:
    """One continuous greedy generation of `tokens` tokens: time per token and resident memory along the way.

    At token 100, 1,000, 10,000 … and at the end, blocks of its steps alternate with blocks of steps that start over from
    the state at token 100, so that both see the same machine.
    """
    model = LanguageModel(config).eval()
    marks = sorted({FIRST * 10**n for n in range(20) if FIRST * 10**n <= tokens} | {tokens})
    process, found = psutil.Process(), []
    with torch.inference_mode():
        generation = _Generation(model, model.init_state(1), torch.zeros(1, dtype=torch.long))
        early: _Generation | None = None
        for mark in marks:
            say(f"one generation: up to token {mark:,} of {tokens:,}")
            while generation.made < mark:
                generation.step()
            if early is None:
                early = generation.copy()
            pairs = [(generation.block(), early.copy().block()) for _ in range(BLOCKS)]
            found.append(
                {
                    "token": mark,
                    "seconds_per_token": statistics.median(t for now, _ in pairs for t in now),
                    "ratio_to_first": vars(
                        spread(statistics.median(a) / statistics.median(b) for a, b in pairs)
                    ),
                    "rss_bytes": process.memory_info().rss,
                }
            )
    return {"parameters": sum(p.numel() for p in model.parameters()), "tokens": tokens, "marks": found}


def long_targets(long: dict[str, Any] | None) -> list[Target]:
    """A long generation stays as fast and as large as it was at token 100."""
    if long is None:
        return []
    first, last = long["marks"][0], long["marks"][-1]
    grown = last["rss_bytes"] / first["rss_bytes"]
    where = f"at token {last['token']:,} ÷ at token {first['token']:,}"
    return [
        Target(f"time per token {where}", Spread(**last["ratio_to_first"]), least=0.95, most=1.05),
        Target(f"resident memory {where}", Spread(grown, grown, grown), most=1.01),
    ]


class _Generation:
    """A text in the making."""

    def __init__(self, model: LanguageModel, state: ModelState, token: Tensor, made: int = 0) -> None:
        self.model, self.token, self.made = model, token, made
        self.decoder, self.slots = decode_from(model, state)

    def step(self) -> None:
        self.token = self.decoder.step(self.token, self.slots).argmax(-1)
        self.made += 1

    def block(self) -> list[float]:
        """Seconds of each of the next steps."""
        return [median_seconds(self.step, 1, warmup=0) for _ in range(BLOCK)]

    def copy(self) -> _Generation:
        return _Generation(self.model, self.decoder.read(self.slots), self.token, self.made)
