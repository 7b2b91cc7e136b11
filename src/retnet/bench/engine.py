"""`retnet bench engine`: the engine over its decoder, the cost of exactness, speculation, and edits of a session."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from torch import Tensor

from retnet.data import Tokenizer
from retnet.engine import Decoder, Engine, Request, Sampling, Session, choose_decoder
from retnet.engine.decoder import ComposedDecoder
from retnet.measure.clock import Budget, Contender, Sample, Spread, Target, interleave, median_seconds, spread
from retnet.model import LanguageModel, ModelConfig
from retnet.model.cost import with_bytes
from retnet.progress import Say
from retnet.settings import At, Checked, Count

SECONDS = 0.25  # of one sample, three steps at least
DRAFT = 16  # tokens
EDITS = (1, 0.995, 0.5, 0.005)  # where, as a part of the prompt
SAMPLINGS = {
    "greedy": Sampling(temperature=0),
    "sampled": Sampling(),
    "top-p 0.9": Sampling(top_p=0.9),
    "top-k 40, top-p 0.9": Sampling(top_k=40, top_p=0.9),
}
NOTES = (
    "a step: one token for each of so many streams, random weights; the decoder alone is given the same tokens again, the "
    "engine chooses tokens, makes text of them and looks for ends. Ratios are formed inside a round",
    "exact: a step of as many greedy streams, and reading a prompt, with exact=True ÷ without",
    "drafts: seconds of a text with draft_tokens ÷ without; a text in which one token in 25 differs from the prompt's, and "
    "one that repeats nothing. The model's work is real, its choice is made for it, so that the text is the one meant",
    "edits: a session of 2,000 tokens is saved, and loaded by an engine that knows nothing; then a text is put in the place "
    "of all tokens after a position, and one token is generated. Seconds are those of loading and of that token",
)


@dataclass(frozen=True)
class EngineBench(Checked):
    """What `measure_engine` measures.

    Attributes:
        model: that is run, with random weights.
        rows: streams at once.
        rounds: of measurements.
        prompt: tokens of the prompt that is read, copied and edited.
        minutes: that it may take: fewer rounds beyond, but at least 3; None is all rounds.
    """

    model: ModelConfig
    rows: tuple[Count, ...] = (1, 8, 64)
    rounds: Count = 9
    prompt: Count = 2000
    minutes: Annotated[float, At(above=0)] | None = None


def measure_engine(bench: EngineBench, say: Say) -> dict[str, Any]:
    """All parts, one after the other; plain data for the record."""
    model = LanguageModel(with_bytes(bench.model)).eval()
    tokenizer = pair_tokenizer(model.embedding.num_embeddings)
    budget = Budget(bench.minutes)
    steps, exact = _steps(model, tokenizer, bench, budget, say)
    drafts = _drafts(model, tokenizer, bench, budget, say)
    targets = [
        Target(
            f"engine ÷ decoder, {row['rows']} rows, {row['sampling']}",
            Spread(**row["over_decoder"]),
            most=most,
        )
        for row in steps
        for most in [1.1 if row["rows"] == 1 else 1.2]
        if row["rows"] in (1, 64)
    ]
    return {
        "notes": NOTES,
        "parameters": sum(p.numel() for p in model.parameters()),
        "limits": {},
        "rows": steps,
        "exact": exact,
        "drafts": drafts,
        "edits": _edits(model, tokenizer, bench, say),
        "targets": [target.record() for target in targets],
    }


def pair_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE of any size, whose tokens beyond bytes and BOS are pairs of them; for who needs no real text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in alphabet for b in alphabet][: max(0, vocab_size - len(alphabet) - 1)]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(inner, "<|bos|>")


# -- steps ------------------------------------------------------------------------------------------------------


def _steps(
    model: LanguageModel, tokenizer: Tokenizer, bench: EngineBench, budget: Budget, say: Say
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the engine over its decoder, and of exactness."""
    found, exact = [], []
    for number, rows in enumerate(bench.rows):
        say(f"streams: {rows}")
        decoder = choose_decoder(model, rows)
        decoder.reset(torch.arange(rows))
        tokens, slots = torch.full((rows,), 5), torch.arange(rows)
        contenders: dict[str, Callable[[], float]] = {}
        contenders["decoder"] = partial(_timed, partial(decoder.step, tokens, slots))
        for name, sampling in SAMPLINGS.items():
            contenders[name] = _Streams(Engine(choose_decoder(model, rows), tokenizer), rows, sampling)
        contenders["exact"] = _Streams(
            Engine(choose_decoder(model, rows), tokenizer, exact=True), rows, SAMPLINGS["greedy"]
        )
        until = budget.deadline(1 / (len(bench.rows) - number + 3))  # three parts follow
        samples = _interleaved(contenders, bench.rounds, say, until)
        for name in SAMPLINGS:
            found.append(
                {
                    "rows": rows,
                    "sampling": name,
                    "seconds_per_step": vars(spread(s.seconds for s in samples[name])),
                    "over_decoder": _ratio(samples[name], samples["decoder"]),
                    "rounds": [s._asdict() for s in samples[name]],
                }
            )
        exact.append({"what": f"a step of {rows}", "ratio": _ratio(samples["exact"], samples["greedy"])})
    reading = {
        name: partial(
            _read, Engine(model, tokenizer, slots=1, exact=name == "exact"), _random(model, bench.prompt)
        )
        for name in ("reading", "exact")
    }
    samples = _interleaved(reading, bench.rounds, say, budget.deadline(1 / 3))
    exact.append(
        {"what": f"reading {bench.prompt:,} tokens", "ratio": _ratio(samples["exact"], samples["reading"])}
    )
    return found, exact


class _Streams:
    """So many endless streams on an engine; called, it says how long a step takes."""

    def __init__(self, engine: Engine, rows: int, sampling: Sampling) -> None:
        self._engine, self._rows, self._sampling = engine, rows, sampling
        self._live = self._begun = 0

    def __call__(self) -> float:
        return _timed(self._step)

    def _step(self) -> None:
        # a text comes to its end now and then, and a step of nothing takes no time
        while self._live < self._rows:
            self._engine.submit(
                Request([1, 2, 3], max_tokens=10**9, sampling=self._sampling, seed=self._begun)
            )
            self._live, self._begun = self._live + 1, self._begun + 1
        self._live -= sum(event.completion is not None for event in self._engine.step())


def _read(engine: Engine, prompt: Sequence[int]) -> float:
    began = time.perf_counter()
    engine.complete(Request(prompt, max_tokens=1, sampling=SAMPLINGS["greedy"]))
    return time.perf_counter() - began


def _timed(run: Callable[[], object]) -> float:
    with torch.inference_mode():
        return median_seconds(run, 100, warmup=2, budget=SECONDS)


# -- drafts -----------------------------------------------------------------------------------------------------


class ScriptedDecoder(Decoder):
    """A decoder that does all the work of another, and then says what a script has next.

    Args:
        decoder: that works, of a model whose states know their position.
        script: ids of one text from its beginning.
    """

    def __init__(self, decoder: ComposedDecoder, script: Sequence[int]) -> None:
        self._decoder, self._script = decoder, torch.tensor([*script, 0])
        self.vocab_size, self.slots, self.device = decoder.vocab_size, decoder.slots, decoder.device

    def prefill(self, tokens: Tensor, cu_seqlens: Tensor, slots: Tensor) -> Tensor:
        """See `Decoder.prefill`."""
        return self._scripted(self._decoder.prefill(tokens, cu_seqlens, slots), self._positions(slots))

    def prefill_logits(self, tokens: Tensor, slot: Tensor) -> Tensor:
        """See `Decoder.prefill_logits`."""
        logits = self._decoder.prefill_logits(tokens, slot)
        return self._scripted(logits, self._positions(slot) - torch.arange(len(tokens) - 1, -1, -1))

    def step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """See `Decoder.step`."""
        return self._scripted(self._decoder.step(tokens, slots), self._positions(slots))

    def _positions(self, slots: Tensor) -> Tensor:
        positions: Tensor = self._decoder.pools[0].state.position[slots].long()
        return positions

    def _scripted(self, logits: Tensor, positions: Tensor) -> Tensor:
        logits[torch.arange(len(logits)), self._script[positions.clamp(max=len(self._script) - 1)]] = 1e4
        return logits

    def reset(self, slots: Tensor) -> None:
        """See `Decoder.reset`."""
        self._decoder.reset(slots)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """See `Decoder.copy`."""
        self._decoder.copy(source, target)

    def read(self, slots: Tensor) -> Any:  # noqa: ANN401  (a state of any mixers)
        """See `Decoder.read`."""
        return self._decoder.read(slots)

    def write(self, slots: Tensor, state: Any) -> None:  # noqa: ANN401  (a state of any mixers)
        """See `Decoder.write`."""
        self._decoder.write(slots, state)

    def fingerprint(self) -> str:
        """See `Decoder.fingerprint`."""
        return self._decoder.fingerprint()

    def state_bytes(self, tokens: int) -> int:
        """See `Decoder.state_bytes`."""
        return self._decoder.state_bytes(tokens)


def _drafts(
    model: LanguageModel, tokenizer: Tokenizer, bench: EngineBench, budget: Budget, say: Say
) -> list[dict[str, Any]]:
    """Rows of texts with drafts beside the same without."""
    prompt, other = _random(model, bench.prompt // 4), _random(model, bench.prompt // 4, seed=1)
    edited = [b if i % 25 == 24 else a for i, (a, b) in enumerate(zip(prompt, other, strict=True))]
    found = []
    for share, name, text in (
        (1 / 2, "a copy with one token in 25 changed", edited),
        (1, "nothing is repeated", other),
    ):
        decoder = choose_decoder(model, 1)
        assert isinstance(decoder, ComposedDecoder)
        scripted = ScriptedDecoder(decoder, [*prompt, *text])
        runs = {
            way: partial(_written, Engine(scripted, tokenizer, slots=1, draft_tokens=draft), prompt, text)
            for way, draft in (("no drafts", 0), ("drafts", DRAFT))
        }
        samples = _interleaved(runs, bench.rounds, say, budget.deadline(share))
        found.append({"what": name, "ratio": _ratio(samples["drafts"], samples["no drafts"])})
    return found


def _written(engine: Engine, prompt: Sequence[int], text: Sequence[int]) -> float:
    """Seconds of the steps that write a text."""
    engine.submit(Request(prompt, max_tokens=len(text), sampling=SAMPLINGS["greedy"]))
    tokens: list[int] = []
    while not tokens:
        tokens += _tokens(engine)
    began = time.perf_counter()
    while engine.busy:
        tokens += _tokens(engine)
    seconds = time.perf_counter() - began
    assert tokens == [*text], "a draft has changed the text"
    return seconds


def _tokens(engine: Engine) -> Iterator[int]:
    return (event.token for event in engine.step() if event.token is not None)


# -- edits ------------------------------------------------------------------------------------------------------


def _edits(model: LanguageModel, tokenizer: Tokenizer, bench: EngineBench, say: Say) -> list[dict[str, Any]]:
    """Rows of the edit table: tokens reused, seconds, bytes."""
    prompt = [min(token, tokenizer.bos_id - 1) for token in _random(model, bench.prompt)]
    found = []
    with tempfile.TemporaryDirectory(prefix="retnet-bench-") as folder:
        path = Path(folder) / "session"
        session = Session(Engine(model, tokenizer, slots=1, cache_bytes=1 << 30), prompt)
        session.generate(max_tokens=1)
        session.append([7])  # marks where the prompt ends
        session.save(path)
        for part in EDITS:
            back = max(1, round(part * bench.prompt))
            name = "the same prompt" if part == 1 else f"edit at {back:,}"
            say(f"after a restart: {name}")
            runs = [_edited(model, tokenizer, path, back) for _ in range(3)]
            seconds, cached, length = min(runs)
            everything = min(_read(Engine(model, tokenizer, slots=1), [*prompt[:length]]) for _ in range(3))
            found.append(
                {
                    "what": name,
                    "tokens": length,
                    "reused": cached,
                    "seconds": seconds,
                    "seconds_of_reading_all": everything,
                    "file_bytes": path.stat().st_size,
                    "state_bytes": choose_decoder(model, 1).state_bytes(0),
                }
            )
    return found


def _edited(model: LanguageModel, tokenizer: Tokenizer, path: Path, back: int) -> tuple[float, int, int]:
    """Seconds until the first token of a session from a file, tokens reused, and tokens in all."""
    engine = Engine(model, tokenizer, slots=1, cache_bytes=1 << 30)
    began = time.perf_counter()
    session = Session.load(engine, path)
    if back < session.marks[-1] - 1:  # of the prompt, after which one token was generated
        session.edit(back, [7])
    else:
        session.rewind(back)
    length = len(session.tokens)
    got = session.generate(max_tokens=1)
    return time.perf_counter() - began, got.cached_tokens, length


def _random(model: LanguageModel, count: int, seed: int = 0) -> list[int]:
    """Tokens of no text, without BOS, which is the last of the vocabulary."""
    generator = np.random.default_rng(seed)
    found: list[int] = generator.integers(0, model.embedding.num_embeddings - 1, count).tolist()
    return found


def _interleaved(
    runs: Mapping[str, Callable[[], float]], rounds: int, say: Say, until: float
) -> dict[str, list[Sample]]:
    return interleave([Contender(name, run) for name, run in runs.items()], {}, rounds, say, until)


def _ratio(one: Sequence[Sample], other: Sequence[Sample]) -> dict[str, Any]:
    return vars(spread(a.seconds / b.seconds for a, b in zip(one, other, strict=True)))
