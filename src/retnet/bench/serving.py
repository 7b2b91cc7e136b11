"""`retnet bench serve`: this library's server beside llama.cpp's, Transformers' and a Transformer of equal size."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import psutil

from retnet import host
from retnet.bench import llama_cpp, served
from retnet.bench.decoding import weight_bytes
from retnet.bench.gguf_models import ASCII, FORMATS
from retnet.bench.load import LoadGenerator, LoadSample, generator
from retnet.bench.served import HF, OURS, TRANSFORMER, Running, Served
from retnet.bench.serving_parts import ChatRow, OverheadRow, measure_chats, measure_overhead
from retnet.measure.clock import Budget, Spread, Target, spread
from retnet.measure.sizes import transformer
from retnet.model import LanguageModel, ModelConfig
from retnet.model.cost import with_bytes
from retnet.progress import Say
from retnet.settings import At, Checked, Count, UserError

HEAD_WIDTH = 64  # of the Transformer
STREAMS = 16  # that should write so many times as much as one:
TIMES = 5.0
NOTES = (
    "a sample: so many requests sent at the same moment, each with another prompt of random ASCII characters that no server "
    "has seen, and so many tokens to write, greedily. tokens/s: written, of all streams, from the first request to the last "
    "token, so reading the prompts counts. Between tokens: as they arrive at the client, those that come together (this "
    "server sends what is written within 50 ms at once) sharing the time since those before",
    "one load generator for all, a process of its own that asks every server by OpenAI's /v1/completions, streamed; an "
    "answer of another length than was asked for ends the measurement",
    "servers run side by side, one is asked at a time, rounds interleaved, each with as many slots as there are streams. "
    "llama.cpp: defaults but for slots of equal size, no copies of states and prompts; transformers serve: with "
    "--continuous-batching from two streams on",
    "equal parameters: weights that a step reads, within 2 %, all random; 8 bits: int8 and an fp32 scale a row here, Q8_0 "
    "there",
    "a point that a server would take longer for than `longest` is left out, judged by how fast it read the same context in "
    "one stream",
    "memory: the most that a server's process has held resident until then (VmHWM), weights and libraries included",
)


@dataclass(frozen=True)
class ServeBench(Checked):
    """What `measure_serving` measures.

    Attributes:
        model: that is served.
        streams: requests at once.
        contexts: tokens of a prompt.
        tokens: that each request writes.
        rounds: of measurements, at most.
        turns: of a conversation; the last is compared with the second.
        said: characters of what is said in a turn. By default a turn adds 256 tokens, of which this server's prefix cache
            has whole blocks, so that all turns read as many.
        longest: seconds that a sample may take; servers that need longer are left out at that point.
        minutes: that it may take: fewer rounds beyond, one at least.
        peers: whether other servers are measured too.
    """

    model: ModelConfig
    streams: tuple[Count, ...] = (1, 4, 16, 64)
    contexts: tuple[Count, ...] = (128, 2048, 8192)
    tokens: Count = 64
    rounds: Count = 3
    turns: Count = 50
    said: Count = 171
    longest: Annotated[float, At(above=0)] = 60.0
    minutes: Annotated[float, At(above=0)] = 25.0
    peers: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turns < 3:
            raise UserError(f"turns is {self.turns}; the last is compared with the second, so take 3 or more")


@dataclass
class ServeRow:
    """One server at one point."""

    name: str
    weights: str
    streams: int
    context: int
    samples: list[LoadSample] = field(default_factory=list)
    rss: int = 0  # bytes, at most

    @property
    def rate(self) -> Spread:
        """Tokens per second, of all streams."""
        return spread(s.tokens / s.seconds for s in self.samples)

    def record(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        numbers = [s.numbers() for s in self.samples]
        return {
            "name": self.name,
            "weights": self.weights,
            "streams": self.streams,
            "context": self.context,
            "rss_bytes": self.rss,
            **{name: vars(spread(each[name] for each in numbers)) for name in numbers[0]},
            "rounds": [{"seconds": s.seconds, "tokens": s.tokens, **s.numbers()} for s in self.samples],
        }


def measure_serving(bench: ServeBench, say: Say) -> dict[str, Any]:
    """Runs all servers at all points; plain data for the record (see `retnet.bench.report`).

    Raises:
        UserError: httptools or what serving needs is missing, or a server fails.
    """
    host.keep_freed_memory()
    config = with_bytes(replace(bench.model, vocab_size=None))
    parameters = weight_bytes(LanguageModel(config)) // 4
    budget, not_measured = Budget(bench.minutes), list[str]()
    chats, overhead = list[ChatRow](), list[OverheadRow]()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="retnet-bench-")))
        load = stack.enter_context(generator())
        say("writing models")
        own = [served.ours(OURS, config, weights, folder) for weights in FORMATS]
        grown = served.ours(TRANSFORMER, transformer(config, HEAD_WIDTH), FORMATS[0], folder)
        others = _others(bench, config, parameters, folder, not_measured)
        points = _Points(bench, load, budget, not_measured, say)
        for streams in sorted(bench.streams):
            with points.running([*own, grown, *others], streams) as running:
                points.measure(running, streams)
                if streams == min(bench.streams):
                    chats = measure_chats(_those(running, OURS, TRANSFORMER), load, bench, say)
                if streams in (min(bench.streams), STREAMS, max(bench.streams)):
                    overhead += measure_overhead(config, _those(running, OURS), load, bench, streams, say)
    rows = sorted(points.rows, key=lambda row: (row.context, row.streams))
    return {
        "notes": NOTES,
        "parameters": parameters,
        "versions": host.versions("xllamacpp", "gguf", "transformers", "uvicorn", "httptools", "uvloop"),
        "not_measured": not_measured,
        "limits": {},
        "rows": [row.record() for row in rows],
        "chats": [chat.record() for chat in chats],
        "overhead": [row.record() for row in overhead],
        "targets": [target.record() for target in targets(rows, chats, overhead)],
    }


def _others(
    bench: ServeBench, config: ModelConfig, parameters: int, folder: Path, not_measured: list[str]
) -> list[Served]:
    """Servers of others that can run here; why not, a sentence each, goes to `not_measured`."""
    found: list[Served] = []
    if not bench.peers:
        not_measured.append("servers of others are not measured: --no-peers")
        return found
    if reason := llama_cpp.missing():
        not_measured.append(reason)
    else:
        found += served.llama_cpp(config, parameters, folder, not_measured)
    try:
        found.append(served.transformers_serve(config, parameters, folder))
    except UserError as error:
        not_measured.append(f"{HF} is not measured: {error}")
    return found


class _Points:
    """All points of all servers, those of few streams first: they tell how long more will take."""

    def __init__(
        self, bench: ServeBench, load: LoadGenerator, budget: Budget, not_measured: list[str], say: Say
    ) -> None:
        self._bench, self._load, self._budget, self._say = bench, load, budget, say
        self._not_measured = not_measured
        self._random = np.random.default_rng(0)
        self._alone: dict[tuple[str, str, int], float] = {}  # seconds of one stream at a context
        self._done = 0
        self.rows: list[ServeRow] = []

    @contextmanager
    def running(self, servers: Sequence[Served], streams: int) -> Iterator[list[Running]]:
        """The servers that have time for anything with so many streams, warm."""
        found = []
        with ExitStack() as stack:
            for server in servers:
                contexts = [c for c in sorted(self._bench.contexts) if self._has_time(server, streams, c)]
                if not contexts:
                    continue
                self._say(f"starting {server.name}, {server.weights}, {streams} slots")
                try:
                    place = stack.enter_context(server.start(streams, contexts[-1] + self._bench.tokens))
                    one = Running(server, place, contexts)
                    self._sample(one, 1, 16)
                    found.append(one)
                except UserError as error:
                    self._leave_out(server, streams, "anything", str(error))
            yield found

    def measure(self, running: Sequence[Running], streams: int) -> None:
        """Adds the rows of so many streams."""
        points = len(self._bench.streams) * len(self._bench.contexts)
        for context in sorted(self._bench.contexts):
            entered = [one for one in running if context in one.contexts]
            rows = self._point(entered, streams, context, points)
            self.rows += [row for row in rows if row.samples]
            self._done += 1

    def _point(self, entered: list[Running], streams: int, context: int, points: int) -> list[ServeRow]:
        rows = [ServeRow(one.server.name, one.server.weights, streams, context) for one in entered]
        pairs = list(zip(entered, rows, strict=True))
        until = self._budget.deadline(1 / (points - self._done))
        for number in range(self._bench.rounds):
            began = time.monotonic()
            for one, row in list(reversed(pairs) if number % 2 else pairs):
                where = f"{streams} streams after {context:,} tokens, round {number + 1}"
                self._say(f"{where}: {row.name}, {row.weights}", self._done / points)
                try:
                    row.samples.append(self._sample(one, streams, context))
                except UserError as error:
                    self._leave_out(one.server, streams, f"{context:,} tokens", str(error))
                    pairs.remove((one, row))
                    row.samples.clear()
                    continue
                row.rss = host.peak_resident(one.place.pid) or psutil.Process(one.place.pid).memory_info().rss
                if streams == 1:
                    self._alone[row.name, row.weights, context] = row.samples[-1].seconds
            now = time.monotonic()
            if now + (now - began) > until:
                break
        return rows

    def _has_time(self, server: Served, streams: int, context: int) -> bool:
        seconds = streams * self._alone.get((server.name, server.weights, context), 0.0)
        longest = self._bench.longest
        if seconds > longest:
            why = f"it would take up to {seconds:.0f} s, and {longest:g} are allowed"
            self._leave_out(server, streams, f"{context:,} tokens", why)
        return seconds <= longest

    def _leave_out(self, server: Served, streams: int, after: str, why: str) -> None:
        self._not_measured.append(f"{server.name}, {server.weights}, {streams} streams after {after}: {why}")

    def _sample(self, one: Running, streams: int, context: int) -> LoadSample:
        prompts = self._random.integers(32, ASCII - 1, (streams, context)).tolist()
        bodies = [one.server.body(prompt, self._bench.tokens) for prompt in prompts]
        who = f"{one.server.name}, {one.server.weights}"
        return self._load.together(f"{one.place.url}/v1/completions", bodies, self._bench.tokens, who)


def _those(running: Sequence[Running], *names: str) -> list[Running]:
    return [one for one in running if one.server.name in names]


def targets(
    rows: Sequence[ServeRow], chats: Sequence[ChatRow], overhead: Sequence[OverheadRow]
) -> list[Target]:
    """Ahead of every other at every point, more with more streams, a chat that stays as fast, little beside the decoder."""
    found = [target for weights in FORMATS for target in _ahead(rows, weights)]
    at = {(row.name, row.weights, row.streams, row.context): row for row in rows}
    first = min((row.context for row in rows), default=0)
    many, one = (at.get((OURS, FORMATS[0], streams, first)) for streams in (STREAMS, 1))
    if many and one:
        what = f"tokens/s of {STREAMS} streams ÷ of one, fp32, context {first:,}"
        found.append(Target(f"{what}, reading the prompts included", _ratio(many, one), least=TIMES))
    steps = {row.streams: row for row in overhead if row.weights == FORMATS[0]}
    if STREAMS in steps and 1 in steps:
        pairs = zip(steps[1].served, steps[STREAMS].served, strict=False)
        gain = spread(STREAMS * one / many for one, many in pairs)
        found.append(
            Target(f"tokens/s of {STREAMS} streams ÷ of one, fp32, while all write", gain, least=TIMES)
        )
    for chat in chats:
        what = f"{chat.name}: seconds of turn {chat.turns} of a chat ÷ of turn 2"
        if chat.name == OURS:
            found.append(Target(what, chat.growth, least=0.9, most=1.1))
        else:
            found.append(Target(f"{what} (is not as fast)", chat.growth, least=1.1))
    for row in overhead:
        most = 1.1 if row.streams == 1 else 1.2
        found.append(
            Target(f"server ÷ bare decoder, {row.weights}, {row.streams} streams", row.ratio, most=most)
        )
    return found


def _ahead(rows: Sequence[ServeRow], weights: str) -> list[Target]:
    """Tokens per second ÷ those of the fastest other server, at the point where that is least."""
    points: dict[tuple[int, int], list[ServeRow]] = {}
    for row in rows:
        if row.weights == weights:
            points.setdefault((row.streams, row.context), []).append(row)
    worst: tuple[Spread, ServeRow] | None = None
    for group in points.values():
        mine = [row for row in group if row.name == OURS]
        for other in (row for row in group if row.name != OURS and mine):
            ratio = _ratio(mine[0], other)
            if worst is None or ratio.median < worst[0].median:
                worst = ratio, other
    if worst is None:
        return []
    ratio, row = worst
    where = f"{row.streams} streams, context {row.context:,}"
    return [Target(f"tokens/s, {weights} ÷ of {row.name}, the worst point ({where})", ratio, least=1.0)]


def _ratio(ours: ServeRow, other: ServeRow) -> Spread:
    """Tokens per second ÷ those of the other, round by round."""
    pairs = zip(ours.samples, other.samples, strict=False)
    return spread((a.tokens / a.seconds) / (b.tokens / b.seconds) for a, b in pairs)
