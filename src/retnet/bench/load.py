"""Load on a server: jobs for the load generator's process, and what its answers say: times to tokens, tokens per second."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retnet.settings import UserError

CLIENT = Path(__file__).with_name("load_client.py")
PATIENCE = 900.0  # seconds for one job


class StreamTimes(NamedTuple):
    """One answer.

    Attributes:
        begin: when it was asked for, in seconds.
        arrivals: when each piece of its text arrived.
        sizes: characters of each piece. The models here write one a token, so a piece of several is so many tokens.
        written: tokens.
    """

    begin: float
    arrivals: list[float]
    sizes: list[int]
    written: int

    def gaps(self) -> list[float]:
        """Seconds between tokens; those of one piece share the time since the piece before."""
        times = zip(pairwise(self.arrivals), self.sizes[1:], strict=True)
        return [gap for (before, at), size in times for gap in [(at - before) / size] * size]

    def tokens(self, after: float, until: float) -> float:
        """How many arrived in a time; what a server says no character of counts evenly."""
        found = sum(n for at, n in zip(self.arrivals, self.sizes, strict=True) if after < at <= until)
        return found * self.written / sum(self.sizes)


@dataclass(frozen=True)
class LoadSample:
    """What requests saw of a server.

    Attributes:
        seconds: from the first request to the last token.
        tokens: written, of all.
        first: seconds to the first token, one a request.
        between: seconds between tokens, of all requests.
        together: seconds of a step while all are written, a token each; None where there is no such time.
    """

    seconds: float
    tokens: int
    first: Sequence[float]
    between: Sequence[float]
    together: float | None

    @classmethod
    def of(cls, streams: Sequence[StreamTimes]) -> LoadSample:
        """From the times of all streams."""
        begin, end = min(s.begin for s in streams), max(s.arrivals[-1] for s in streams)
        gaps = [gap for s in streams for gap in s.gaps()]
        return cls(
            end - begin,
            sum(s.written for s in streams),
            [s.arrivals[0] - s.begin for s in streams],
            gaps,
            _together(streams),
        )

    def numbers(self) -> dict[str, float]:
        """Those that are reported, by name; times in seconds."""
        found = {"tokens_per_s": self.tokens / self.seconds}
        for name, values in (("first_token", self.first), ("between_tokens", self.between)):
            for share in (50, 99):
                found[f"{name}_p{share}"] = float(np.percentile(values, share)) if values else 0.0
        return found


def _together(streams: Sequence[StreamTimes]) -> float | None:
    """Seconds of a step in the time when every stream is under way."""
    begin, end = max(s.arrivals[0] for s in streams), min(s.arrivals[-1] for s in streams)
    steps = [s.tokens(begin, end) for s in streams]
    return (end - begin) / float(np.mean(steps)) if min(steps) >= 4 else None


class LoadGenerator:
    """The process that asks; made by `generator`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def together(self, url: str, bodies: Sequence[Mapping[str, Any]], tokens: int, who: str) -> LoadSample:
        """Sends requests at the same moment.

        Args:
            url: of the API's path.
            bodies: one a stream.
            tokens: that each of them has to write.
            who: is asked, for the message.

        Raises:
            UserError: one failed, or wrote another number of tokens.
        """
        return self.streams(url, [[body] for body in bodies], tokens, who)

    def streams(
        self, url: str, bodies: Sequence[Sequence[Mapping[str, Any]]], tokens: int, who: str
    ) -> LoadSample:
        """Streams that begin together, each asking its bodies one after the other; the rest as of `together`."""
        return LoadSample.of(self._ask({"url": url, "streams": bodies}, tokens, who))

    def conversation(
        self, url: str, body: Mapping[str, Any], turns: Sequence[str], tokens: int, who: str
    ) -> list[StreamTimes]:
        """The turns of one conversation, one after the other; arguments as of `together`, `turns` is what is said."""
        return self._ask({"url": url, "body": body, "turns": turns}, tokens, who)

    def _ask(self, job: dict[str, Any], tokens: int, who: str) -> list[StreamTimes]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**job, "seconds": PATIENCE}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise UserError("the load generator has ended; what it said is above")
        answers = json.loads(line)
        for answer in answers:
            if "error" in answer:
                raise UserError(f"{who} failed: {answer['error']}")
            if answer["written"] != tokens or not answer["arrivals"]:
                raise UserError(
                    f"{who} wrote {answer['written']} tokens in {len(answer['arrivals'])} pieces, but was to write "
                    f"{tokens}; its times would mean nothing"
                )
        return [StreamTimes(a["begin"], a["arrivals"], a["sizes"], a["written"]) for a in answers]


@contextmanager
def generator() -> Iterator[LoadGenerator]:
    """Starts the load generator.

    Raises:
        UserError: httptools is missing.
    """
    from retnet.measure.peers import need

    need("httptools")
    words, pipe = [sys.executable, "-P", str(CLIENT)], subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield LoadGenerator(process)
        finally:
            process.kill()
