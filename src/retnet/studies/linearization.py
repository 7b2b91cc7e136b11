"""The measure ``linearization``: how much of a Transformer a RetNet made of it keeps, by how few tokens.

A teacher is trained first. Then each kind of student is made of it with a share of the teacher's tokens, and beside it the
same architecture is trained from fresh weights with as many; all are measured on the same held-out text.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from retnet.data import prepare
from retnet.host import keep_freed_memory
from retnet.measure.summary import Summary
from retnet.settings import PATH, At, Checked, Count, Items, UserError, build, config_path, load, merge
from retnet.studies.estimate import RunEstimate, plan
from retnet.studies.linearization_summary import TEACHER, student_name, summarise
from retnet.studies.protocols import Job, Measure, Result, Results, StepsTold, Tell, trained
from retnet.studies.tuning import require_own_names, slug
from retnet.train.config import RunConfig
from retnet.train.linearize import Linearization, LinearizeConfig, Linearized, linearize
from retnet.train.student import student_config

SEEDS = 1000  # students' begin here: a teacher's own seed would have them read what it read first


@dataclass(frozen=True)
class StudentRow(Checked):
    """One kind of student: a label, and settings of `LinearizeConfig` laid over those that all share."""

    label: str
    how: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LinearizationMeasure(Measure):
    """Held-out loss of teacher, students after each stage, and models of their kind with fresh weights.

    Attributes:
        rows: kinds of students.
        config: of the teacher: a shipped name, or the path of a .toml file.
        settings: tables laid over it; [data] and the sizes of batches hold for the students too.
        how: settings of `LinearizeConfig` for all students; the steps follow from the shares.
        shares: of the teacher's tokens, that a student learns from.
        align_share: of these, that the first stage takes.
        seeds: of students, from 0; the teacher is one.
    """

    name: Literal["linearization"]
    rows: Annotated[tuple[StudentRow, ...], Items()]
    config: Annotated[str, PATH]
    settings: dict[str, Any] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)
    shares: Annotated[tuple[Annotated[float, At(above=0, most=1)], ...], Items()] = (0.05, 0.1, 0.2)
    align_share: Annotated[float, At(above=0, below=1)] = 0.4
    seeds: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_own_names("rows", [slug(row.label) for row in self.rows], TEACHER)

    def check(self) -> None:
        """Builds the configurations of teacher and students."""
        for row in self.rows:
            self._student(row, self.shares[0], 0, Path("."))

    def prepare(self, out: Path, say: Any) -> None:  # noqa: ANN401
        """Makes the token shards."""
        say("preparing the tokens")
        prepare(self._teacher(out).data, on_problem=lambda p: say(f"data: {p}"))

    def plans(self) -> list[RunEstimate]:
        """What teacher, students and scratch models will take; a student's teacher computes beside it, a third as much."""
        teacher = self._teacher(Path("."))
        found = [plan(TEACHER, teacher, 1)]
        for row in self.rows:
            for share in self.shares:
                steps = sum(self._steps(share))
                run = replace(teacher, train=replace(teacher.train, steps=steps))
                found.append(plan(f"{row.label}, {share:.0%}, and scratch", run, 2 * self.seeds))
        return found

    def count(self) -> int:
        """The teacher, and each kind of student with each share and seed."""
        return 1 + len(self.rows) * len(self.shares) * self.seeds

    def jobs(self, out: Path, results: Results, failed: Collection[str]) -> dict[str, Job]:
        """The teacher first; students wait for it."""
        jobs: dict[str, Job] = {TEACHER: TeacherJob("linearization-teacher", self._teacher(out))}
        if TEACHER in results:
            for seed in range(self.seeds):
                for share in self.shares:
                    for row in self.rows:
                        made = self._student(row, share, seed, out)
                        jobs[student_name(row.label, share, seed)] = StudentJob("linearization", made)
        return jobs

    def summarise(self, results: Results) -> Summary:
        """Bits per byte by stage and share, and how much of the gap to the teacher is closed."""
        return summarise([row.label for row in self.rows], self.shares, self.seeds, results)

    def _teacher(self, out: Path) -> RunConfig:
        settings = merge({"data": {"cache": str(out / "data")}}, self.settings)
        return load(RunConfig, config_path(self.config), settings, source="measure.settings")

    def _steps(self, share: float) -> tuple[int, int]:
        """Of alignment and distillation: together a share of the teacher's."""
        steps = max(round(self._teacher(Path(".")).train.steps * share), 2)
        align = min(max(round(steps * self.align_share), 1), steps - 1)
        return align, steps - align

    def _student(self, row: StudentRow, share: float, seed: int, out: Path) -> Linearization:
        teacher = self._teacher(out)
        align, distil = self._steps(share)
        how = merge(merge(self.how, row.how), {"align_steps": align, "distil_steps": distil, "scratch": True})
        try:
            made = build(LinearizeConfig, how)
            student_config(replace(teacher.model, vocab_size=257), made.mixer, made.keep_every)
        except UserError as error:
            raise UserError(f"row {row.label!r}: {error}") from None
        kept = ("corpus", "validation", "validation_fraction", "text_field", "cache")
        sizes = (
            "seq_len",
            "batch_size",
            "accumulate",
            "precision",
            "device",
            "threads",
            "eval_tokens",
            "checkpoint_every",
            "keep",
            "clip",
        )
        settings = {"data": _set(teacher.data, kept), "train": _set(teacher.train, sizes)}
        settings["train"] |= {"eval_every": 0, "seed": SEEDS + seed}
        return Linearization(str(out / "jobs" / TEACHER / "run"), made, settings)


@dataclass(frozen=True)
class TeacherJob(Job):
    """The Transformer, trained."""

    name: Literal["linearization-teacher"]
    run_config: RunConfig

    def run(self, folder: Path, tell: Tell) -> Result | None:
        """Trains, or goes on training, in ``folder/run``."""
        begin = time.perf_counter()
        if not trained(self.run_config, folder / "run", tell):
            return None
        c = self.run_config.train
        return {"tokens": c.tokens_before(c.steps), "seconds": time.perf_counter() - begin}


@dataclass(frozen=True)
class StudentJob(Job):
    """One student, and a model of its kind from scratch."""

    name: Literal["linearization"]
    linearization: Linearization

    def run(self, folder: Path, tell: Tell) -> Result | None:
        """Makes all stages, or goes on with them, in ``folder/stages``."""
        keep_freed_memory()
        begin = time.perf_counter()
        done: Linearized = linearize(self.linearization, folder / "stages", StepsTold(tell))
        if not done.finished:
            return None
        return {
            "stages": {
                stage.name: {
                    "parameters": stage.parameters,
                    "tokens": stage.tokens,
                    "nats_per_token": stage.quality.loss,
                    "bits_per_byte": stage.quality.bits_per_byte,
                }
                for stage in done.stages
            },
            "seconds": time.perf_counter() - begin,
        }


def _set(section: object, names: tuple[str, ...]) -> dict[str, Any]:
    """Settings of a section that are not None."""
    return {name: value for name in names if (value := getattr(section, name)) is not None}
