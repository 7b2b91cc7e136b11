"""Linearisation: a RetNet out of a pretrained Transformer, in stages that are a checkpoint and run directories.

``0-transfer`` has the teacher's weights in the student; ``1-align`` teaches each mixer its own part; ``2-distil`` teaches
the whole the teacher's distribution; ``3-longer``, if asked for, goes on with the text itself, in longer rows. ``scratch``,
if asked for, is the student's architecture with fresh weights and as many tokens, to compare with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch

from retnet import host
from retnet.convert import Found, read, write
from retnet.convert.formats import PROVENANCE
from retnet.data import Batches, Prepared
from retnet.errors import told
from retnet.io import write_text
from retnet.lock import sole_owner
from retnet.model import LanguageModel, ModelConfig
from retnet.settings import PATH, At, Checked, Count, UserError, build, dump, load, merge
from retnet.train.config import RunConfig
from retnet.train.distillation import shared, tokenizer_of
from retnet.train.distributed import Ranks, processes
from retnet.train.objective import POSITIONS, ByPosition, Quality, Repetition, summed
from retnet.train.progress import TrainingProgress
from retnet.train.run_dir import changes
from retnet.train.start import prepare_data
from retnet.train.student import student_config, transfer
from retnet.train.trainer import train

SETTINGS, TOKENIZER = "linearize.toml", "tokenizer.json"  # in the folder, beside the stages
TRANSFER = "0-transfer"
_KEPT = re.compile(r"every:(\d+)")
Rate = Annotated[float, At(above=0, most=1e3)]


@dataclass(frozen=True)
class LinearizeConfig(Checked):
    """How a student is made of a teacher.

    Attributes:
        mixer: of the student, in place of softmax.
        keep_softmax: leaves every N-th layer as it is, written every:N; unset leaves none.
        align_steps: in which each mixer learns to answer as the teacher's does.
        align_rate: learning rate of these.
        distil_steps: in which the model learns the teacher's distribution of the next token.
        distil_rate: learning rate of these.
        longer_steps: more steps, with the text's own next tokens; 0 is none.
        longer_rate: learning rate of these.
        longer_seq_len: tokens of their rows; unset is four times those before, in batches of as many tokens.
        scratch: train a model of the student's kind from fresh weights too, with as many tokens.
        scratch_rate: learning rate of that.
    """

    mixer: Literal["retention", "gated_retention"] = "retention"
    keep_softmax: str | None = None
    align_steps: Count = 200
    align_rate: Rate = 1e-3
    distil_steps: Count = 400
    distil_rate: Rate = 1e-3
    longer_steps: Annotated[int, At(least=0)] = 0
    longer_rate: Rate = 3e-4
    longer_seq_len: Count | None = None
    scratch: bool = False
    scratch_rate: Rate = 2e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_softmax is not None and not _KEPT.fullmatch(self.keep_softmax):
            raise UserError(f"keep_softmax is {self.keep_softmax!r}; allowed: every:N, such as every:4")

    @property
    def keep_every(self) -> int | None:
        """N of ``every:N``."""
        return int(self.keep_softmax.removeprefix("every:")) if self.keep_softmax else None


@dataclass(frozen=True)
class Linearization(Checked):
    """All that a folder of stages is made from; `SETTINGS` in it says the same.

    Attributes:
        teacher: a run, a checkpoint, or a folder of Llama, Mistral, Qwen2 or Qwen3.
        how: the stages.
        settings: of all their runs, laid over the defaults of [data], [train] and [parallel].
    """

    teacher: Annotated[str, PATH]
    how: LinearizeConfig
    settings: dict[str, Any]

    def stages(self, folder: Path) -> dict[str, RunConfig]:
        """Name → configuration of each stage's run, in order; the model is that of the weights it begins with."""
        how, base = self.how, self._base(folder)
        pace = {
            "1-align": (how.align_steps, how.align_rate),
            "2-distil": (how.distil_steps, how.distil_rate),
        }
        matches = {"1-align": "mixers", "2-distil": "logits"}
        found, before = {}, TRANSFER
        for name, (steps, rate) in pace.items():
            train = {"steps": steps, "learning_rate": rate, "start_from": str(folder / before)}
            distill = {"teacher": self.teacher, "match": matches[name]}
            found[name], before = _run(base, train, distill), name
        if how.longer_steps:
            seq_len = how.longer_seq_len or 4 * found[before].train.seq_len
            tokens = found[before].train.batch_size * found[before].train.seq_len
            train = {"steps": how.longer_steps, "learning_rate": how.longer_rate, "seq_len": seq_len}
            train |= {"start_from": str(folder / before), "batch_size": max(tokens // seq_len, 1)}
            found["3-longer"] = _run(base, train, None)
        return found

    def scratch(self, folder: Path, student: ModelConfig) -> RunConfig:
        """The run with fresh weights: as many tokens, in rows as the first stages have them."""
        stages = self.stages(folder).values()
        tokens = sum(c.train.tokens_before(c.train.steps) for c in stages)
        steps = -(-tokens // self.data(folder).train.tokens_per_step)
        train = {"learning_rate": self.how.scratch_rate, "steps": steps}
        return replace(_run(self._base(folder), train, None), model=student)

    def data(self, folder: Path) -> RunConfig:
        """What all stages read, by the tokenizer of the teacher."""
        return _run(self._base(folder), {}, None)

    def _base(self, folder: Path) -> dict[str, Any]:
        own = {"steps", "learning_rate", "start_from", "minutes", "ema"} & set(self.settings.get("train", {}))
        if own:
            raise UserError(
                f"train.{min(own)} cannot be set for all stages; each has its own steps, rate and beginning, see "
                "`retnet linearize --help`"
            )
        for section in ("model", "distill"):
            if self.settings.get(section):
                raise UserError(
                    f"[{section}] follows from the teacher; only data, train and parallel can be set"
                )
        if "tokenizer" in self.settings.get("data", {}):
            raise UserError("data.tokenizer is the teacher's; leave it out")
        return merge(self.settings, {"data": {"tokenizer": str(folder / TOKENIZER)}})


def _run(base: Mapping[str, Any], train: Mapping[str, Any], distill: Mapping[str, Any] | None) -> RunConfig:
    chosen: dict[str, Any] = merge(base, {"train": dict(train)})
    if "warmup_steps" not in chosen["train"] and "steps" in train:
        chosen["train"]["warmup_steps"] = max(train["steps"] // 20, 1)
    return build(RunConfig, chosen if distill is None else {**chosen, "distill": dict(distill)})


class StageQuality(NamedTuple):
    """How well a stage predicts held-out text."""

    name: str
    path: str  # of its model
    parameters: int
    tokens: int  # it has learned from, itself and the stages before it; of the teacher 0
    quality: Quality
    by_position: dict[int, float]  # bits per byte from that place in a document on, up to the next
    recall: float  # of the tokens of a repeated stretch of text, the share that is predicted


class Linearized(NamedTuple):
    """How a call of `linearize` ended."""

    finished: bool  # False: stopped by a signal, saved, ready to be continued
    student: Path  # the last stage
    stages: list[StageQuality]  # the teacher first; empty unless finished


def linearize(config: Linearization, folder: Path, progress: TrainingProgress | None = None) -> Linearized:
    """Makes all stages that are not there yet, and measures teacher and stages on the same held-out text.

    Raises:
        UserError: a teacher that cannot be one, a folder that holds something else or was begun with other settings, or
            what training refuses.
    """
    with processes() as ranks, ExitStack() as stack:
        progress = progress if progress and ranks.first else TrainingProgress.silent()
        ranks.lead(lambda: stack.enter_context(sole_owner(folder, "linearisation's", "DEST")))
        prepared = _transferred(config, folder, progress, ranks)
        runs = config.stages(folder)
        if config.how.scratch:
            runs["scratch"] = config.scratch(folder, load(ModelConfig, folder / TRANSFER / "model.toml"))
        for name, run in runs.items():
            progress.say(f"{name}: {run.train.steps:,} steps")
            if not train(run, folder / name, begin="resume-or-start", progress=progress).finished:
                return Linearized(False, folder / name, [])
        last = [name for name in runs if name != "scratch"][-1]
        progress.say("measuring teacher and stages on held-out text")
        return Linearized(True, folder / last, list(_measured(config, folder, prepared, runs, ranks)))


def _transferred(config: Linearization, folder: Path, progress: TrainingProgress, ranks: Ranks) -> Prepared:
    """The data of all stages. Makes the stage before training, if it is not there, else sure that all is as it was then.

    The first process does, with the whole teacher.
    """

    def begin() -> tuple[Found, ModelConfig]:
        _begin(config, folder)
        teacher = read(config.teacher)
        _check_teacher(config.teacher, teacher, folder)
        student = student_config(teacher.config, config.how.mixer, config.how.keep_every)
        _keep_tokenizer(config.teacher, teacher, folder)
        return teacher, student

    def make() -> None:
        if found is None or (folder / TRANSFER).is_dir():
            return
        c = config.data(folder).train
        batches = Batches(prepared.train, seq_len=c.seq_len, batch_size=c.batch_size, seed=c.seed)
        made = transfer(*found, batches.batch(0), host.choose_device(c.device))
        write(made, folder / TRANSFER, "run", source=config.teacher, tokenizer=prepared.tokenizer)

    found = ranks.lead(begin)
    prepared = prepare_data(config.data(folder), progress, ranks, verify=False)
    ranks.lead(make)
    return prepared


def _begin(config: Linearization, folder: Path) -> None:
    """Notes what is done, or compares with what was noted; as long as no stage is there, settings may still change."""
    file = folder / SETTINGS
    if (folder / TRANSFER).is_dir() and file.is_file():
        if changed := changes(load(Linearization, file), config):
            raise UserError(
                f"{folder} was begun with other settings: {'; '.join(changed)}; choose another DEST"
            )
        return
    config.stages(folder)  # says what is wrong before anything is written
    others = [] if file.is_file() else [path.name for path in folder.iterdir() if path.name != "run.lock"]
    if others:
        raise UserError(
            f"DEST {folder} holds something else ({', '.join(sorted(others)[:3])}); choose another"
        )
    with told(f"write {file}"):
        write_text(file, dump(config))


def _check_teacher(source: str, teacher: Found, folder: Path) -> None:
    """Makes sure that a teacher is the one whose weights were transferred."""
    file = folder / TRANSFER / PROVENANCE
    if file.is_file() and json.loads(file.read_bytes())["sha256"] != dict(teacher.hashes):
        raise UserError(
            f"{source} has changed since {folder} was begun with it; restore it, or choose another DEST"
        )


def _keep_tokenizer(source: str, teacher: Found, folder: Path) -> None:
    """Writes the teacher's tokenizer beside the stages, in this library's form, unless these are begun."""
    if (folder / TRANSFER).is_dir():
        return
    tokenizer = tokenizer_of(source, teacher)
    if tokenizer is None:
        raise UserError(
            f"{source} has no tokenizer (tokenizer.json); put it beside the weights, for both must read alike"
        )
    if tokenizer.vocab_size > (size := teacher.config.vocab_size or 0):
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens but the model {size}; they do not belong together"
        )
    file = folder / TOKENIZER
    with told(f"write {file}"):
        tokenizer.save(file)


def _measured(
    config: Linearization, folder: Path, prepared: Prepared, runs: Mapping[str, RunConfig], ranks: Ranks
) -> Iterator[StageQuality]:
    """Teacher, student after each stage, and the scratch model, on the same batches of held-out text."""
    base, learned = config.data(folder), 0
    device = ranks.device(base.train.device)
    ranks = ranks.arranged(base.parallel.of(ranks.world), device)
    places = {"teacher": config.teacher, TRANSFER: str(folder / TRANSFER)}
    for name, path in {**places, **{name: str(folder / name) for name in runs}}.items():
        tokens = runs[name].train.tokens_before(runs[name].train.steps) if name in runs else 0
        learned = tokens if name == "scratch" else learned + tokens
        found = ranks.lead(partial(read, path))
        model = shared(found, torch.float32, device, ranks)
        parameters = sum(p.numel() for p in model.parameters())  # of parts, those of the whole
        yield StageQuality(name, path, parameters, learned, *_quality(model, base, prepared, device, ranks))


def _quality(
    model: LanguageModel, config: RunConfig, prepared: Prepared, device: torch.device, ranks: Ranks
) -> tuple[Quality, dict[int, float], float]:
    """Of the whole, by position, and of repetitions."""
    c, shards = config.train, prepared.validation
    measured = partial(
        summed,
        batches=Batches(shards, seq_len=c.seq_len, batch_size=c.batch_size, seed=c.seed),
        device=device,
        autocast=torch.autocast(device.type, torch.bfloat16, enabled=False),
        max_tokens=c.eval_tokens,
        ranks=ranks,
    )
    per_token = shards.num_bytes / shards.num_tokens
    sums, tokens = measured(ByPosition(model))
    nats, counts = sums[: len(sums) // 2], sums[len(sums) // 2 :]
    places = zip((0, *POSITIONS), nats, counts, strict=True)
    by_position = {place: Quality.of(x, int(n), per_token).bits_per_byte for place, x, n in places if n}
    (right, asked), _ = measured(Repetition(model))
    return Quality.of(sum(nats), tokens, per_token), by_position, right / asked
