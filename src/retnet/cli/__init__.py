"""The command line. Each verb lives in a file of its own here and is imported when it is called, so help is instant."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from retnet import __version__
from retnet.cli import ending
from retnet.settings import nearest

# verb → (module in this package, one line of help). The module defines `command`.
VERBS = {
    "bench": "Measure speed against peers and physical limits.",
    "config": "Show a configuration: parameters, flops, bytes of state.",
    "convert": "Read and write checkpoints of torchscale, flash-linear-attention, syncdoth/RetNet and Hugging Face.",
    "data": "Train a tokenizer, prepare token shards.",
    "demo": "Train on the default corpus, compare with gzip and xz, and write a sample.",
    "eval": "Perplexity over lengths and documents; the paper's tasks.",
    "generate": "Continue a prompt with a trained run.",
    "linearize": "Make a RetNet of a Transformer: transfer, align, distil.",
    "runs": "Show runs and where they stand, compare two, draw and watch their curves.",
    "serve": "Serve a model over HTTP: OpenAI's API, sessions, a playground.",
    "study": "Run the paper's comparisons: architectures, ablations, scaling, costs.",
    "train": "Train a model from a configuration.",
}


class Verbs(click.Group):
    """Lists the verbs without importing them and answers an unknown one with the nearest."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["retnet.arguments"] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401
        with ending.sentence(ctx.meta["retnet.arguments"]):
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = import_module(f"retnet.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS:
            raise click.UsageError(f"no verb {args[0]!r}; {nearest(args[0], VERBS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, VERBS[verb]) for verb in self.list_commands(ctx)])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="retnet")
def cli() -> None:
    """Retentive Networks: train, evaluate, run and measure."""


def main() -> None:
    """Entry point of the `retnet` command: a user's mistake ends in one clear line and exit status 2."""
    ending.run(cli.main)
