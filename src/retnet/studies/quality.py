"""The measure ``quality``: models trained alike, with the same tuning effort, and their perplexity over seeds.

Every row of the study is trained once with the first seed at each learning rate of the grid. The rate with the lowest
in-domain loss is kept, and the other seeds are trained at it; the run that won is itself the first seed's
(`retnet.studies.tuning`). All runs read the same tokens, seed by seed in the same order, for as many steps.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from retnet.data import prepare
from retnet.evals import Corpus, measure, open_model
from retnet.measure.summary import Summary
from retnet.settings import PATH, Checked, Count, Items, UserError, config_path, load, merge
from retnet.studies.estimate import RunEstimate, plan
from retnet.studies.protocols import Job, Measure, Result, Results, Tell, trained
from retnet.studies.quality_summary import IN_DOMAIN, summarise
from retnet.studies.tuning import Rates, Training, TunedRows, require_own_names, slug
from retnet.train.config import RunConfig

Text = Annotated[str, PATH]
Sets = dict[str, Text | tuple[Text, ...]]


@dataclass(frozen=True)
class Variant(Checked):
    """One of the things compared.

    Attributes:
        label: in tables.
        config: of the run: a shipped name, or the path of a .toml file.
        settings: tables laid over that configuration.
        paper: the row of the published table that it stands beside.
    """

    label: str
    config: Text
    settings: dict[str, Any] = field(default_factory=dict)
    paper: str | None = None


@dataclass(frozen=True)
class QualityMeasure(TunedRows, Measure):
    """Perplexity of models.

    Attributes:
        rows: what is compared; the first is what the others are held against.
        settings: tables laid over the configuration of every row: the data, the budget.
        learning_rates: the grid, the same for all.
        seeds: how many, from 0.
        sets: name → text to measure on beside the validation split, such as ``"package:sympy"`` or a file.
        set_documents: of each of them, at most.
        published: the paper's table to stand beside.
        against: ``parameters`` draws perplexity over the size of models.
    """

    name: Literal["quality"]
    rows: Annotated[tuple[Variant, ...], Items()]
    settings: dict[str, Any] = field(default_factory=dict)
    learning_rates: Rates = (1e-3,)
    seeds: Count = 3
    sets: Sets = field(default_factory=dict)
    set_documents: Count | None = None
    published: Literal["architectures", "ablations", "none"] = "none"
    against: Literal["none", "parameters"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_own_names("rows", [slug(row.label) for row in self.rows], IN_DOMAIN)
        require_own_names("sets", list(self.sets), IN_DOMAIN)

    def check(self) -> None:
        """Reads every row's configuration and looks for the text of every set."""
        for row in self.rows:
            config = self._config(row, Path("."), self.learning_rates[0], 0)
            if config.train.warmup_steps >= config.train.steps:
                raise UserError(
                    f"{row.label}: train.warmup_steps is {config.train.warmup_steps}, which leaves nothing of "
                    f"train.steps {config.train.steps}"
                )
        if self.sets:
            Corpus([spec for specs in self.sets.values() for spec in _several(specs)])

    def prepare(self, out: Path, say: Callable[[str], None]) -> None:
        """Makes the token shards, so that runs at the same time find them."""
        say("preparing the tokens")
        prepare(self._config(self.rows[0], out, 1.0, 0).data, on_problem=lambda p: say(f"data: {p}"))

    def plans(self) -> list[RunEstimate]:
        """What the runs of each row will take."""
        return [plan(row.label, self._config(row, Path("."), 1.0, 0), self.runs) for row in self.rows]

    def job(self, out: Path, training: Training) -> Job:
        """Trains a row, and measures it on every set."""
        return QualityJob(
            "quality", self._config(training.row, out, *training[1:]), self.sets, self.set_documents
        )

    def loss(self, result: Result) -> float:
        """Nats per token in-domain."""
        return float(result["sets"][IN_DOMAIN]["nats_per_token"])

    def summarise(self, results: Results) -> Summary:
        """Perplexity beside the published numbers, the tuning, and whether the orders agree."""
        return summarise(self.found(results), [IN_DOMAIN, *self.sets], self.published, self.against)

    def _config(self, row: Variant, out: Path, rate: float, seed: int) -> RunConfig:
        settings = merge({"data": {"cache": str(out / "data")}}, self.settings)
        chosen = {"train": {"learning_rate": rate, "seed": seed}}
        try:
            settings = merge(merge(settings, row.settings), chosen)
            return load(RunConfig, config_path(row.config), settings, source="measure.settings")
        except UserError as error:
            raise UserError(f"row {row.label!r}: {error}") from None


@dataclass(frozen=True)
class QualityJob(Job):
    """One run, and what it is worth on every set."""

    name: Literal["quality"]
    run_config: RunConfig
    sets: Sets
    set_documents: Count | None = None

    def run(self, folder: Path, tell: Tell) -> Result | None:
        """Trains, or goes on training, in ``folder/run``; then measures in windows of the training length."""
        begin = time.perf_counter()
        if not trained(self.run_config, folder / "run", tell):
            return None
        training_seconds = time.perf_counter() - begin
        sets = dict(self._measure(folder / "run"))
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "learning_rate": self.run_config.train.learning_rate,
            "seed": self.run_config.train.seed,
            "tokens": self.run_config.train.tokens_before(self.run_config.train.steps),
            **sets.pop("model"),
            "sets": sets,
            "curve": _curve(folder / "run" / "metrics.jsonl"),
            "seconds": time.perf_counter() - begin,
            "training_seconds": training_seconds,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
        }

    def _measure(self, run: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        candidate = open_model(run, checkpoint="last", device=self.run_config.train.device)
        reader, length = candidate.reader(), self.run_config.train.seq_len
        yield "model", {key: candidate.about[key] for key in ("parameters", "sha256", "tokenizer_sha256")}
        for name, specs in {IN_DOMAIN: str(run), **self.sets}.items():
            found = measure(
                reader,
                candidate.tokenizer,
                Corpus(_several(specs)),
                lengths=(length,),
                modes=("windows",),
                max_documents=None if name == IN_DOMAIN else self.set_documents,
            )
            (result,) = found.results
            assert result.nats_per_token
            assert result.bits_per_byte
            assert result.perplexity
            yield (
                name,
                {
                    "nats_per_token": result.nats_per_token.value,
                    "perplexity": result.perplexity.value,
                    "bits_per_byte": result.bits_per_byte.value,
                    "window": length,
                    **{key: getattr(found, key) for key in ("documents", "tokens", "bytes", "sha256")},
                },
            )


def _several(specs: str | tuple[str, ...]) -> tuple[str, ...]:
    return (specs,) if isinstance(specs, str) else tuple(specs)


def _curve(metrics: Path) -> dict[str, list[float]]:
    """Steps, and the training loss of each in nats per token."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    learned = [line for line in lines if "loss" in line]
    return {"steps": [line["step"] for line in learned], "loss": [line["loss"] for line in learned]}
