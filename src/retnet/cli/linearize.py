"""`retnet linearize`: a RetNet out of a Transformer."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retnet.cli.options import HomePath, HomeText, options
from retnet.settings import merge, parse_overrides

if TYPE_CHECKING:
    from retnet.train.linearize import Linearization, StageQuality


@click.command("linearize", context_settings={"ignore_unknown_options": True})
@click.argument("teacher", type=HomeText())
@click.argument("dest", type=HomePath(path_type=Path, file_okay=False))
@click.option(
    "--data",
    "corpus",
    type=HomeText(),
    multiple=True,
    help="Text to learn from, as data.corpus has it; default: stdlib, the running Python's own.",
)
@options(
    "retnet.train.linearize:LinearizeConfig",
    *("mixer", "keep_softmax", "align_steps", "align_rate", "distil_steps", "distil_rate"),
    *("longer_steps", "longer_rate", "longer_seq_len", "scratch", "scratch_rate"),
)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def command(
    teacher: str,
    dest: Path,
    corpus: tuple[str, ...],
    overrides: tuple[str, ...],
    **how: Any,  # noqa: ANN401  (fields of LinearizeConfig)
) -> None:
    """Make a RetNet of TEACHER, a Transformer, in DEST.

    TEACHER is a run or checkpoint whose layers are softmax, or a Hugging Face folder of Llama, Mistral, Qwen2 or Qwen3. Its
    weights are transferred, each mixer is aligned with the teacher's, and the whole is distilled; each stage is a folder or
    run in DEST that every verb opens. Interrupted, the same command goes on. Settings of all stages are changed with
    --train.field VALUE and --data.field VALUE. Under torchrun several processes share the work.
    """
    from retnet.train import elastic

    if elastic.said():  # torchrun starts again whatever failed
        sys.exit(2)
    from retnet.host import keep_freed_memory
    from retnet.train.distributed import one_voice
    from retnet.train.linearize import Linearization, LinearizeConfig, linearize
    from retnet.train.progress import TrainingProgress

    keep_freed_memory()
    settings: dict[str, Any] = {"data": {"corpus": list(corpus)}} if corpus else {}
    for key, value in parse_overrides(overrides).items():
        section, _, name = key.partition(".")
        settings = merge(settings, {section: {name: value}})
    config = Linearization(teacher, LinearizeConfig(**how), settings)
    progress = TrainingProgress(way_on="the same command goes on")
    with one_voice() as speaks:
        for line in _beforehand(config, dest) if speaks else ():
            progress.say(line)
        done = linearize(config, dest, progress)
    if not done.finished:
        raise SystemExit(1)
    if speaks:
        _show(done.stages)
        click.echo(f"next: retnet generate {done.student} --prompt 'Once upon'")


def _beforehand(config: Linearization, dest: Path) -> tuple[str, ...]:
    """What there is to know of the teacher, and the memory that it and the student take together."""
    from dataclasses import replace

    from retnet.convert import read
    from retnet.measure.footprint import footprint
    from retnet.measure.memory import in_bytes
    from retnet.train.student import student_config

    found = read(config.teacher, weights=False)
    model = student_config(found.config, config.how.mixer, config.how.keep_every)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    whose = " of each process" if processes > 1 else ""
    memory = {
        name: footprint(replace(run, model=model), processes).memory
        for name, run in config.stages(dest).items()
    }
    taught = max((stage for stage in memory.values() if stage.teacher), key=lambda stage: stage.peak)
    teacher, student = in_bytes(taught.teacher), in_bytes(taught.peak - taught.teacher)
    return (
        *found.notes,
        f"memory{whose}: about {teacher} for the teacher, and {student} to train the student",
        *(
            f"memory{whose} in {name}, without the teacher: about {in_bytes(stage.peak)}"
            for name, stage in memory.items()
            if not stage.teacher
        ),
    )


def _show(stages: list[StageQuality]) -> None:
    """Teacher and stages side by side."""
    from rich.console import Console

    from retnet.tables import Table, print_table

    found = Table(
        "Held-out text",
        ("stage", "parameters", "tokens learned from", "nats/token", "bits/byte", "recall of repeated text"),
        tuple(
            (
                stage.name,
                f"{stage.parameters / 1e6:,.2f} M",
                f"{stage.tokens:,}",
                f"{stage.quality.loss:.4f}",
                f"{stage.quality.bits_per_byte:.4f}",
                f"{stage.recall:.1%}",
            )
            for stage in stages
        ),
    )
    places = stages[0].by_position
    by_position = Table(
        "Bits per byte by position in a document",
        ("stage", *(f"from token {place + 1:,}" for place in places)),
        tuple((stage.name, *(f"{stage.by_position[p]:.4f}" for p in places)) for stage in stages),
    )
    for table in (found, by_position):
        print_table(table, Console(highlight=False))
