"""`retnet data`: train a tokenizer, prepare token shards, check a prepared folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from retnet.cli.options import HomePath, HomeText, options
from retnet.errors import told
from retnet.io import require_writable
from retnet.settings import UserError, build, config_path, load

if TYPE_CHECKING:
    from retnet.data import DataConfig, PreparationProgress, Prepared, Problem

_SHOWN = 20  # problems printed one by one


@click.group()
def command() -> None:
    """Train a tokenizer, prepare token shards, check a prepared folder.

    A CORPUS is 'stdlib', package:NAME, a file, folder or glob of .txt .md .py .jsonl (also compressed: .gz .zst .bz2 .xz)
    and .parquet, a URL of these (s3://, https://, …), or hf:NAME[:CONFIG[:SPLIT]].
    """


@command.command()
@click.argument("corpora", metavar="CORPUS...", nargs=-1, required=True, type=HomeText())
@click.option(
    "--vocab-size", type=int, default=8192, show_default=True, help="Tokens, the document start included."
)
@click.option("--out", type=HomePath(dir_okay=False), required=True, help="The tokenizer.json to write.")
@click.option("--text-field", default="text", show_default=True, help="Field of records that holds the text.")
@click.option(
    "--max-bytes",
    type=click.IntRange(min=1),
    default=1 << 30,
    show_default=True,
    help="Text to learn from, at most.",
)
def tokenizer(corpora: tuple[str, ...], vocab_size: int, out: str, text_field: str, max_bytes: int) -> None:
    """Train a byte-level BPE on the text of one or more corpora."""
    from retnet.data import Tokenizer, read_texts

    require_writable(Path(out))
    problems = Problems()
    read = 0

    def counted() -> Iterator[str]:
        nonlocal read
        for text in read_texts(corpora, text_field, problems.add, max_bytes=max_bytes):
            read += len(text.encode())
            yield text

    trained = Tokenizer.train(counted(), vocab_size)
    if not read:
        raise UserError(f"no text in {', '.join(corpora)}{problems.summary()}")
    with told(f"write {out}"):
        trained.save(out)
    click.echo(
        f"{out}: {trained.vocab_size:,} tokens, learned from {read:,} bytes of text; SHA-256 {trained.fingerprint}"
    )
    if read >= max_bytes:
        click.echo(f"stopped reading at --max-bytes {max_bytes:,}")
    if trained.vocab_size < vocab_size:
        click.echo(
            f"the text has no more than {trained.vocab_size:,} tokens worth learning, {vocab_size:,} were asked for"
        )
    problems.report()


@command.command()
@click.argument("config", required=False)
@options(
    "retnet.data.config:DataConfig",
    "corpus",
    "validation",
    "validation_fraction",
    "tokenizer",
    "text_field",
    unset=True,
    corpus="Text to train on; may be given several times.",
    validation="Text to validate on, instead of a part of the corpus; may be given several times.",
)
@click.option("--out", "cache", type=HomeText(), help="Where the prepared folder goes.")
@click.option(
    "--verify",
    is_flag=True,
    help="Read all text and all shards again; otherwise files of known size, times and inode are taken as known.",
)
def prepare(config: str | None, verify: bool, **given: object) -> None:
    """Write token shards for the [data] of CONFIG (a .toml or a shipped name); options take precedence over it.

    Killed, it goes on where it stopped when called again. What is prepared already is left as it is.
    """
    from retnet.data import prepare as prepare_shards

    settings = _settings(config, {key: value for key, value in given.items() if value not in (None, ())})
    problems = Problems()
    with _progress() as show:
        prepared = prepare_shards(settings, on_progress=show, on_problem=problems.add, verify=verify)
    _describe(prepared)


@command.command()
@click.argument("folder", type=HomeText())
def check(folder: str) -> None:
    """Compare every file of a prepared FOLDER with the hashes in its manifest."""
    from retnet.data import load

    _describe(load(folder, verify=True))
    click.echo("every hash is right")


def _settings(config: str | None, given: dict[str, object]) -> DataConfig:
    from retnet.data import DataConfig

    if config is None:
        return build(DataConfig, given, "data")
    from retnet.train.config import RunConfig

    return load(RunConfig, config_path(config), {"data": given}).data


def _describe(prepared: Prepared) -> None:
    manifest = prepared.manifest
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        click.echo(
            f"{name:10} {split.documents:>12,} documents {split.tokens:>16,} tokens {split.bytes:>18,} bytes of text"
        )
    for corpus, tokens in zip(manifest.corpora, manifest.train.corpora, strict=False):
        click.echo(f"           {tokens:>33,} tokens to train on from {corpus.name}")
    left_out = Counter[str]()
    for corpus in manifest.corpora:
        left_out.update(corpus.left_out)
    for kind, count in left_out.most_common():
        click.echo(f"left out   {count:>12,} {kind}")
    for kind, count in sorted(manifest.problems.items()):
        click.echo(f"problems   {count:>12,} {kind}")
    for words in manifest.examples[:3]:
        click.echo(f"           {words}")
    click.echo(f"in {prepared.directory}")


class Problems:
    """Prints the first problems as they come and counts all."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def add(self, problem: Problem) -> None:
        self.counts[problem.kind] = self.counts.get(problem.kind, 0) + 1
        seen = sum(self.counts.values())
        if seen <= _SHOWN:
            click.echo(str(problem), err=True)
        elif seen == _SHOWN + 1:
            click.echo("further problems are only counted", err=True)

    def summary(self) -> str:
        """Counts in parentheses, or nothing."""
        counts = ", ".join(f"{count:,} × {kind}" for kind, count in sorted(self.counts.items()))
        return f" ({counts})" if counts else ""

    def report(self) -> None:
        if self.counts:
            click.echo(f"problems{self.summary()}")


@contextmanager
def _progress() -> Iterator[Callable[[PreparationProgress], None]]:
    """Shows how far preparing has come."""
    from retnet.progress import shown

    with shown() as say:
        yield lambda seen: say(
            f"preparing: {seen.words}", seen.bytes_read / seen.bytes_total if seen.bytes_total else 0.0
        )
