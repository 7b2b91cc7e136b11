"""The measure ``recall``: how many pairs, and over how many tokens, each architecture keeps apart.

Tiny models are trained on two synthetic tasks in turn, associative recall and needle in a haystack (`recall_tasks`), and
asked beyond what they were trained on: more pairs, longer haystacks. Only the answers are learned and counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.host import choose_device, keep_freed_memory
from retnet.measure.summary import Summary
from retnet.model import LanguageModel, ModelConfig
from retnet.model.cost import cost
from retnet.nn import ShortConvolution
from retnet.settings import At, Checked, Count, Items, UserError, build, merge
from retnet.studies.estimate import RunEstimate, plan
from retnet.studies.protocols import Job, Measure, Result, Results, Tell
from retnet.studies.recall_summary import summarise
from retnet.studies.recall_tasks import Asked, Vocabulary, needles, pairs
from retnet.studies.tuning import Rates, Training, TunedRows, require_own_names, slug
from retnet.train.config import RunConfig, TrainConfig
from retnet.train.optimizer import adamw, learning_rate

Counts = Annotated[tuple[Count, ...], Items()]
HELD_OUT = 1 << 40  # seeds of the questions that are counted begin here, those of steps at 0
WARMUP = 0.1  # part of the steps over which the learning rate rises


@dataclass(frozen=True)
class RecallRow(Checked):
    """One of the things compared: a label, and settings laid over the model that all share."""

    label: str
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RecallTask(Checked):
    """What is learned and what is asked.

    Attributes:
        vocabulary: tokens of each kind.
        pairs: of associative recall, in turn, while training.
        asked_pairs: when asked.
        lengths: of haystacks in tokens, in turn, while training.
        asked_lengths: when asked.
        needles: of a haystack.
        questions: at least, for each number of pairs and each length.
    """

    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    pairs: Counts = (4, 8, 16, 32)
    asked_pairs: Counts = (4, 8, 16, 32, 64)
    lengths: Counts = (32, 64, 128)
    asked_lengths: Counts = (32, 64, 128, 256, 512, 1024)
    needles: Count = 4
    questions: Count = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        most = max(*self.pairs, *self.asked_pairs, self.needles)
        if most > self.vocabulary.keys:
            raise UserError(
                f"{most} pairs need as many different keys, and vocabulary.keys is {self.vocabulary.keys}; raise it"
            )
        if (shortest := min(*self.lengths, *self.asked_lengths)) < 3 * self.needles:
            raise UserError(
                f"{self.needles} needles and their questions take {3 * self.needles} tokens, but a length is {shortest}; "
                "raise it, or lower needles"
            )


@dataclass(frozen=True)
class RecallMeasure(TunedRows, Measure):
    """Accuracy of recall, by number of pairs and by length.

    Attributes:
        rows: what is compared.
        model: settings of all models.
        convolution: taps of a causal convolution over the embeddings, by which a value's place knows its key, as models
            of this task have it; 0: none, and the mixers must learn that too.
        task: what is learned and asked.
        steps: of AdamW.
        tokens: that a step reads at most, of one of the two tasks.
        weight_decay: of matrices.
        learning_rates: the grid, the same for all.
        seeds: how many, from 0.
        device: ``"auto"`` is a GPU if there is one.
    """

    name: Literal["recall"]
    rows: Annotated[tuple[RecallRow, ...], Items()]
    model: dict[str, Any] = field(default_factory=dict)
    convolution: Annotated[int, At(least=0, most=64)] = 3
    task: RecallTask = field(default_factory=RecallTask)
    steps: Count = 400
    tokens: Count = 2048
    weight_decay: Annotated[float, At(least=0, most=1e3)] = 0.01
    learning_rates: Rates = (3e-3,)
    seeds: Count = 3
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_own_names("rows", [slug(row.label) for row in self.rows])
        if self.tokens < (longest := max(*self.task.lengths, 3 * max(self.task.pairs))):
            raise UserError(f"tokens is {self.tokens}, and one row has {longest}; raise it")

    def check(self) -> None:
        """Builds the configuration of every row."""
        for row in self.rows:
            self._model(row)
        choose_device(self.device)

    def plans(self) -> list[RunEstimate]:
        """What the trainings of each row will take."""
        length = max(self.task.lengths)
        train = TrainConfig(steps=self.steps, seq_len=length, batch_size=max(self.tokens // length, 1))
        return [
            plan(row.label, RunConfig(model=self._model(row), train=train), self.runs) for row in self.rows
        ]

    def job(self, out: Path, training: Training) -> Job:
        """Trains a row on both tasks, and asks it."""
        train = TrainConfig(
            steps=self.steps,
            learning_rate=training.rate,
            warmup_steps=round(WARMUP * self.steps),
            schedule="cosine",
            weight_decay=self.weight_decay,
            clip=1.0,
            seed=training.seed,
            device=self.device,
        )
        model = self._model(training.row)
        return RecallJob("recall", model, self.convolution, self.task, self.tokens, train)

    def loss(self, result: Result) -> float:
        """Nats per answer, over what was trained."""
        return float(result["nats"])

    def summarise(self, results: Results) -> Summary:
        """Accuracy by number of pairs and by length, the size of states beside it, and the tuning."""
        return summarise(self.found(results), self.task)

    def _model(self, row: RecallRow) -> ModelConfig:
        try:
            size = {"vocab_size": self.task.vocabulary.size}
            return build(ModelConfig, merge(merge(self.model, row.model), size), "model")
        except UserError as error:
            raise UserError(f"row {row.label!r}: {error}") from None


@dataclass(frozen=True)
class RecallJob(Job):
    """One model trained, and asked; too short to be kept half done."""

    name: Literal["recall"]
    model: ModelConfig
    convolution: int
    task: RecallTask
    tokens: int
    train: TrainConfig

    def run(self, folder: Path, tell: Tell) -> Result | None:
        """Trains on both tasks in turn, with one number of pairs or length after the other; then asks."""
        keep_freed_memory()
        begin, device = time.perf_counter(), choose_device(self.train.device)
        torch.manual_seed(self.train.seed)
        model = RecallModel(self.model, self.convolution).to(device)
        losses = list(self._learn(model, lambda part: tell(0.9 * part)))
        trained = time.perf_counter()
        t = self.task
        by_pairs = {n: self._ask(model, self._pairs, n) for n in {*t.pairs, *t.asked_pairs}}
        by_length = {n: self._ask(model, self._needles, n) for n in {*t.lengths, *t.asked_lengths}}
        known = [by_pairs[n].nats for n in t.pairs] + [by_length[n].nats for n in t.lengths]
        most = 3 * max(t.asked_pairs)
        return {
            "learning_rate": self.train.learning_rate,
            "seed": self.train.seed,
            "parameters": sum(p.numel() for p in model.parameters()),
            "state_bytes": cost(self.model, most).state_bytes,
            "state_tokens": most,
            "nats": sum(known) / len(known),
            "pairs": {str(n): by_pairs[n].accuracy for n in t.asked_pairs},
            "lengths": {str(n): by_length[n].accuracy for n in t.asked_lengths},
            "curve": losses,
            "seconds": time.perf_counter() - begin,
            "training_seconds": trained - begin,
        }

    def _learn(self, model: RecallModel, tell: Tell) -> Iterator[float]:
        """Makes all steps; yields the loss of each in nats per answer."""
        c, optimizer = self.train, adamw(model, self.train)
        for step in range(c.steps):
            # a seed has steps of its own, and all rows the same
            generator = torch.Generator().manual_seed(c.seed * c.steps + step)
            turn = step // 2
            if step % 2:
                asked = self._needles(self.task.lengths[turn % len(self.task.lengths)], generator)
            else:
                asked = self._pairs(self.task.pairs[turn % len(self.task.pairs)], generator)
            loss = model.nats(asked)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, c)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tell((step + 1) / c.steps)
            yield float(loss.detach())

    def _pairs(self, count: int, generator: torch.Generator) -> Asked:
        return pairs(self.task.vocabulary, max(self.tokens // (3 * count), 1), count, generator)

    def _needles(self, length: int, generator: torch.Generator) -> Asked:
        rows = max(self.tokens // length, 1)
        return needles(self.task.vocabulary, rows, length, self.task.needles, generator)

    @torch.no_grad()
    def _ask(self, model: RecallModel, task: Callable[[int, torch.Generator], Asked], number: int) -> Answers:
        """What a model answers to questions that it was not trained on, the same for all models."""
        generator, nats, right, asked = torch.Generator().manual_seed(HELD_OUT + number), 0.0, 0, 0
        make = partial(task, number, generator)
        while asked < self.task.questions:
            rows = make()
            logits = model.eval().answers(rows)
            answers = rows.answers.flatten().to(logits.device)
            nats += float(F.cross_entropy(logits, answers, reduction="sum"))
            right += int((logits.argmax(-1) == answers).sum())
            asked += len(answers)
        return Answers(right / asked, nats / asked)


class Answers(NamedTuple):
    """How well questions of one kind were answered."""

    accuracy: float
    nats: float  # per answer


class RecallModel(LanguageModel):
    """A language model whose embeddings pass a short causal convolution first; its head sees the questions alone."""

    def __init__(self, config: ModelConfig, taps: int) -> None:
        super().__init__(config)
        self.convolution = ShortConvolution(config.d_model, taps, taps**-0.5) if taps else None

    def _embed(self, tokens: Tensor) -> Tensor:
        x = super()._embed(tokens)
        return x if self.convolution is None else x + self.convolution(x)[0]

    def answers(self, asked: Asked) -> Tensor:
        """Logits after each question, [B·Q,vocab_size]."""
        x = self.features(asked.tokens.to(self.embedding.weight.device))
        logits: Tensor = self.head(x[:, -asked.answers.shape[1] :].flatten(0, 1))
        return logits

    def nats(self, asked: Asked) -> Tensor:
        """Cross entropy of the answers, a scalar."""
        logits = self.answers(asked)
        return F.cross_entropy(logits, asked.answers.flatten().to(logits.device))
