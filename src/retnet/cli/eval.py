"""`retnet eval`: what models are worth."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retnet.cli.data import Problems
from retnet.cli.options import HomePath, HomeText, numbers, opening
from retnet.errors import require_packages
from retnet.io import require_writable, write_json
from retnet.settings import UserError

if TYPE_CHECKING:
    from retnet.evals.corpus import Corpus
    from retnet.evals.perplexity import Measured, ReadingProgress

LENGTHS = "512,1024,2048,4096,8192,16384,32768"
TASKS = "hellaswag,boolq,copa,piqa,wsc273,winogrande,storycloze_2016"

_out = click.option("--out", type=HomePath(path_type=Path), help="Write a JSON record to this file.")


@click.group()
def command() -> None:
    """Measure what models are worth: perplexity on text, accuracy on the paper's tasks.

    A MODEL is a run directory, one of its checkpoints, or a Hugging Face folder of any causal language model.
    Needs pip install 'retnet[eval]'.
    """


@command.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=HomeText())
@click.option(
    "--data",
    multiple=True,
    type=HomeText(),
    help="Text: files, folders, globs, hf:NAME; a run stands for its validation split. May be given several times. "
    "[default: the validation split of the first MODEL that is a run]",
)
@click.option("--lengths", default=LENGTHS, show_default=True, help="Of fresh windows, in tokens.")
@click.option(
    "--mode", type=click.Choice(["windows", "carried", "both"]), default="both", show_default=True,
    help="Fresh windows, the state carried through whole documents, or both.",
)  # fmt: skip
@click.option("--text-field", default="text", show_default=True, help="Field of records that holds the text.")
@click.option("--max-documents", type=click.IntRange(min=1), help="Only the first so many documents.")
@click.option(
    "--batch-tokens", type=click.IntRange(min=1), help="Tokens read at once. [default: by the model]"
)
@opening
@_out
def perplexity(
    models: tuple[str, ...],
    data: tuple[str, ...],
    lengths: str,
    mode: str,
    text_field: str,
    max_documents: int | None,
    batch_tokens: int | None,
    checkpoint: str | None,
    device: str,
    dtype: str | None,
    out: Path | None,
) -> None:
    """Perplexity per token and bits per byte of each MODEL on the same text, by length of context.

    A document starts with BOS, as in training, and every token of its text is scored once in every mode.
    """
    sizes = numbers(lengths, "--lengths", least=1)
    require_packages("retnet eval needs", "eval", "scipy")
    from rich.console import Console

    from retnet.evals import report
    from retnet.evals.corpus import Corpus, is_run
    from retnet.evals.models import check_model

    if out is not None:
        require_writable(out)
    for name in models:
        check_model(name, checkpoint)
    if not data:
        data = tuple(model for model in models if is_run(model))[:1]
        if not data:
            raise UserError(
                "no data: name text with --data; only a run has a validation split to fall back on"
            )
    corpus = Corpus(data, text_field)
    modes = ("windows", "carried") if mode == "both" else (mode,)
    reading = {"lengths": sizes, "modes": modes, "max_documents": max_documents}
    done: list[tuple[str, dict[str, Any], Measured]] = []
    for name in models:
        opening = {"checkpoint": checkpoint, "device": device, "dtype": dtype}
        about, measured = _measure(name, opening, corpus, batch_tokens, reading, tell=not done)
        if done and measured.sha256 != done[0][2].sha256:
            raise UserError(f"{', '.join(data)} changed while it was read; nothing can be compared")
        done.append((name, about, measured))
    settings = {
        "data": data,
        "text_field": text_field,
        **reading,
        "batch_tokens": batch_tokens,
    }
    record = report.perplexity_record(settings, done)
    report.show_perplexity(record, Console(highlight=False))
    if out is not None:
        write_json(out, record)
        click.echo(f"wrote {out}", err=True)


def _measure(
    name: str,
    opening: dict[str, Any],
    corpus: Corpus,
    batch_tokens: int | None,
    reading: dict[str, Any],
    tell: bool,
) -> tuple[dict[str, Any], Measured]:
    """What there is to say about a model, and its numbers; one model is in memory at a time."""
    from retnet.evals.models import open_model
    from retnet.evals.perplexity import measure
    from retnet.progress import shown

    candidate = open_model(name, **opening)
    with shown() as say:

        def tell_progress(seen: ReadingProgress) -> None:
            say(f"{name}: {seen.documents:,} documents, {seen.tokens:,} tokens", seen.done or 0.0)

        measured = measure(
            candidate.reader(batch_tokens),
            candidate.tokenizer,
            corpus,
            **reading,
            on_progress=tell_progress,
            on_problem=Problems().add if tell else None,
        )
    return candidate.about, measured


@command.command()
@click.argument("model", type=HomeText())
@click.option("--tasks", default=TASKS, show_default=True, help="Names, with commas between.")
@click.option("--num-fewshot", default="0,4", show_default=True, help="Examples in the prompt, each in turn.")
@click.option("--batch-size", default="auto", show_default=True, help="Sequences at once.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many questions of each task.")
@click.option(
    "--local",
    type=HomePath(path_type=Path),
    help="Folder with TASK/SPLIT.jsonl, instead of a network; nothing is then asked of one.",
)
@opening
@_out
def tasks(
    model: str,
    tasks: str,
    num_fewshot: str,
    batch_size: str,
    limit: int | None,
    local: Path | None,
    checkpoint: str | None,
    device: str,
    dtype: str | None,
    out: Path | None,
) -> None:
    """Accuracy of MODEL on the paper's tasks, by lm-evaluation-harness, beside the paper's numbers."""
    shots = numbers(num_fewshot, "--num-fewshot", least=0)
    size = "auto" if batch_size == "auto" else numbers(batch_size, "--batch-size", least=1)[0]
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",")))
    require_packages("retnet eval needs", "eval", "lm_eval", "accelerate", "transformers")
    _set_environment(offline=local is not None)
    from rich.console import Console

    from retnet.evals import report
    from retnet.evals.models import open_model
    from retnet.paper import check_tasks

    check_tasks(names)
    if out is not None:
        require_writable(out)
    candidate = open_model(model, checkpoint=checkpoint, device=device, dtype=dtype)
    click.echo("loading lm-evaluation-harness", err=True)
    from retnet.evals.harness import evaluate

    outcome = evaluate(candidate, names, num_fewshot=shots, batch_size=size, limit=limit, local=local)
    settings = {
        "tasks": names,
        "num_fewshot": shots,
        "batch_size": size,
        "limit": limit,
        "local": None if local is None else str(local),
    }
    record = report.tasks_record(settings, candidate, outcome)
    report.show_tasks(record, Console(highlight=False))
    if out is not None:
        write_json(out, record)
        click.echo(f"wrote {out}", err=True)


def _set_environment(offline: bool) -> None:
    """What libraries read when they are imported: no network where none is to be used, no bars where none is seen."""
    if offline:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
