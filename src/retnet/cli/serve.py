"""`retnet serve`: an HTTP server for a trained run, with OpenAI's API, sessions and a playground."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retnet.cli.options import HomePath, HomeText, opening, options
from retnet.settings import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI

LOCAL = ("127.0.0.1", "localhost", "::1")


@click.command("serve")
@click.argument("model", type=HomeText())
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 is any that is free."
)
@click.option(
    "--api-key-file",
    type=HomePath(path_type=Path),
    help="File with the keys that may use it, one a line. [default: everybody may]",
)
@click.option(
    "--sessions",
    type=HomeText(),
    help="Directory or URL (s3://…) where sessions are kept; servers of one model may share it. "
    "[default: they end with the server]",
)
@options(
    "retnet.serve.settings:ServerSettings",
    "slots",
    "queue",
    "max_state_bytes",
    "cache_bytes",
    "exact",
    "max_tokens",
    "max_prompt_tokens",
    "max_body_bytes",
    "max_sessions",
    "timeout",
    "shutdown_seconds",
)
@opening
@click.option("--weights", help="int8: round them, for faster decoding on a CPU. [default: as --dtype says]")
def command(
    model: str,
    host: str,
    port: int,
    api_key_file: Path | None,
    sessions: str | None,
    checkpoint: str | None,
    device: str,
    dtype: str | None,
    weights: str | None,
    **limits: Any,  # noqa: ANN401
) -> None:
    """Serve MODEL, a run directory, one of its checkpoints, or a Hugging Face folder, over HTTP.

    The API is OpenAI's; /v1/sessions has more. A playground is at /, the API's description at /openapi.json.
    SIGTERM or Ctrl-C ends it in order, a second one at once.
    """
    try:
        from retnet.serve.access import ApiKeys
        from retnet.serve.app import make_app
        from retnet.serve.server import listen, serve, url_of
    except ImportError as error:
        raise UserError(f"serving needs {error.name}; pip install 'retnet[serve]'") from None
    from retnet.engine import open_run
    from retnet.host import in_passing_thread
    from retnet.serve.settings import ServerSettings

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    settings = ServerSettings(**limits)
    keys = None if api_key_file is None else ApiKeys.read(api_key_file)
    with ExitStack() as stack:
        stack.enter_context(_ended_by_sigterm())
        found = stack.enter_context(listen(host, port))

        def make() -> tuple[str, FastAPI]:
            opened = open_run(model, checkpoint=checkpoint, device=device, dtype=dtype, weights=weights)
            name = _name(opened.checkpoint.resolve())
            return name, make_app(opened, name, settings, keys=keys, sessions=sessions)

        name, app = in_passing_thread(make)  # the engine's thread is to have the only team
        if keys is None and host not in LOCAL:
            click.echo(
                f"anybody who reaches {host} may use this server; --api-key-file says who may", err=True
            )
        click.echo(f"serving {name} at {url_of(found, host)} (playground at /, API at /v1)", err=True)
        in_order = serve(app, found)
    if not in_order or app.state.service.engine.alive:
        sys.stderr.flush()
        os._exit(0 if in_order else 1)  # threads that are in the middle of something are not waited for


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """While the server does not hear it yet: a container's first process is not ended by a signal that has no handler."""
    before = signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _name(checkpoint: Path) -> str:
    """What clients call a model: the name of its run, or of its folder."""
    return checkpoint.parents[1].name if checkpoint.parent.name == "checkpoints" else checkpoint.name
