"""`retnet config`: what a configuration means, before anything is run."""

from __future__ import annotations

import sys
from dataclasses import replace

import click

from retnet.settings import config_path, dump, load, parse_overrides, shipped_configs

LENGTHS = {"2k": 2048, "8k": 8192, "32k": 32768, "128k": 131072}


@click.group("config")
def command() -> None:
    """Show a configuration: parameters, flops, bytes of state."""


@command.command(context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def show(name: str, overrides: tuple[str, ...]) -> None:
    """Print the resolved configuration NAME (a path, or a shipped name such as paper/6.7b) and what it costs.

    Settings are changed as in training: --model.num_layers 4.
    """
    from rich.console import Console
    from rich.table import Table

    from retnet.model.cost import cost, kv_cache_bytes
    from retnet.train.config import RunConfig

    run = load(RunConfig, config_path(name), parse_overrides(overrides))
    model = replace(run.model, vocab_size=run.model.vocab_size or run.data.learned_vocab)
    size = cost(model, run.train.seq_len)
    click.echo(dump(run))
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)

    table = Table("part", "parameters", title="Parameters", title_justify="left")
    table.columns[1].justify = "right"
    for part, count in size.parameters.items():
        table.add_row(part, f"{count:,}")
    table.add_section()
    table.add_row("all", f"{size.total:,}")
    console.print(table)
    if model.vocab_size is None:
        console.print("(vocabulary: that of the tokenizer; counted here with 257, that of bytes)")
    console.print(f"flops per token at T = {size.length:,}: {size.flops_per_token:,} forward", end="")
    console.print(f", {3 * size.flops_per_token:,} training")
    console.print()

    table = Table("context", "state", "KV cache", "ratio", title_justify="left")
    table.title = (
        "Bytes per sequence: this state, and a Transformer's KV cache of equal width and depth in bf16"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for label, length in LENGTHS.items():
        state, cache = cost(model, length).state_bytes, kv_cache_bytes(model, length)
        table.add_row(label, f"{state:,}", f"{cache:,}", f"{cache / state:.2f}×")
    console.print(table)


@command.command("list")
def list_() -> None:
    """Print the names of the shipped configurations."""
    for name in shipped_configs():
        click.echo(name)
