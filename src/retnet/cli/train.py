"""`retnet train`: a configuration in, a run directory out."""

from __future__ import annotations

from pathlib import Path

import click

from retnet.cli.options import HomePath, HomeText
from retnet.settings import config_path, load, parse_overrides


@click.command("train", context_settings={"ignore_unknown_options": True})
@click.argument("config")
@click.option(
    "--run-dir", type=HomePath(path_type=Path), help="Where the run goes; default: runs/NAME-OF-CONFIG."
)
@click.option("--resume", is_flag=True, help="Go on with the run in --run-dir from its newest checkpoint.")
@click.option("--resume-or-start", is_flag=True, help="Go on with the run if there is one, else begin it.")
@click.option("--checkpoint", metavar="NAME", help="Resume from this checkpoint; later ones are set aside.")
@click.option(
    "--init", metavar="FROM", type=HomeText(), help="Begin with the weights of a run, checkpoint or folder."
)
@click.option("--verify", is_flag=True, help="Read all text and all shards again; trust no times and sizes.")
@click.option("--profile", is_flag=True, help="Trace three steps, for Perfetto, into profile/ of the run.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def command(
    config: str,
    run_dir: Path | None,
    resume: bool,
    resume_or_start: bool,
    checkpoint: str | None,
    init: str | None,
    verify: bool,
    profile: bool,
    overrides: tuple[str, ...],
) -> None:
    """Train the model that CONFIG (a .toml file, or a shipped name such as demo) describes.

    Settings are changed with --section.field VALUE, such as --train.steps 500 or --model.mixer.decay none.
    `retnet config show CONFIG` prints all of them. N processes share the work and the weights with
    torchrun --nproc-per-node=N -m retnet train CONFIG.
    """
    from retnet.host import keep_freed_memory
    from retnet.train.config import RunConfig
    from retnet.train.distributed import one_voice
    from retnet.train.progress import TrainingProgress
    from retnet.train.trainer import train

    keep_freed_memory()
    with one_voice() as speaks:
        path = config_path(config)
        changes = parse_overrides(overrides) | ({} if init is None else {"train.start_from": init})
        outcome = train(
            load(RunConfig, path, changes),
            run_dir or Path("runs") / path.stem,
            begin="resume-or-start" if resume_or_start else "resume" if resume or checkpoint else "new",
            checkpoint=checkpoint,
            verify=verify,
            profile=profile,
            progress=TrainingProgress(),
        )
    if speaks and outcome.finished and outcome.quality is not None:
        click.echo(
            f"{outcome.run_dir}: {outcome.step} steps, {outcome.quality.bits_per_byte:.4f} bits/byte held out"
        )
