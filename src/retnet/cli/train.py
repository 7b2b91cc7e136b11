"""`retnet train`: a configuration in, a run directory out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from retnet.cli.options import FiniteRange, HomePath, HomeText
from retnet.settings import UserError, config_path, load, parse_overrides

if TYPE_CHECKING:
    from retnet.host import Precision
    from retnet.train.config import RunConfig


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
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print memory, bytes on the wire and hours, and what would fit; do nothing.",
)
@click.option(
    "--gpus", type=click.IntRange(1), help="For --dry-run: processes; default: as --parallel has it."
)
@click.option(
    "--memory",
    type=FiniteRange(0, min_open=True),
    help="For --dry-run: GB (10⁹ bytes) of each process; default: what this machine's device has.",
)
@click.option(
    "--peak",
    type=FiniteRange(0, min_open=True),
    help="For --dry-run: Tflop/s of a process's device; default: that of products here, with --memory 989.",
)
@click.option(
    "--utilisation",
    type=FiniteRange(0, 1, min_open=True),
    help="For --dry-run: part of the peak that is reached; default: 0.4.",
)
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
    dry_run: bool,
    gpus: int | None,
    memory: float | None,
    peak: float | None,
    utilisation: float | None,
    overrides: tuple[str, ...],
) -> None:
    """Train the model that CONFIG (a .toml file, or a shipped name such as demo) describes.

    Settings are changed with --section.field VALUE, such as --train.steps 500 or --model.mixer.decay none.
    `retnet config show CONFIG` prints all of them. N processes share the work and the weights with
    torchrun --nproc-per-node=N -m retnet train CONFIG.
    """
    from retnet.train import elastic

    if elastic.said():  # torchrun starts again whatever failed
        sys.exit(2)
    from retnet.host import keep_freed_memory
    from retnet.train.config import RunConfig
    from retnet.train.distributed import one_voice
    from retnet.train.initial_weights import of_weights
    from retnet.train.progress import TrainingProgress
    from retnet.train.trainer import train

    path = config_path(config)
    changes = parse_overrides(overrides) | ({} if init is None else {"train.start_from": init})
    of_plan = {"--gpus": gpus, "--memory": memory, "--peak": peak, "--utilisation": utilisation}
    of_run = {
        "--resume": resume,
        "--resume-or-start": resume_or_start,
        "--checkpoint": checkpoint is not None,
        "--verify": verify,
        "--profile": profile,
    }
    if dry_run:
        if named := [name for name, given in of_run.items() if given]:
            raise UserError(f"{', '.join(named)} is of a run, and --dry-run begins none; leave it out")
        planned, _ = of_weights(load(RunConfig, path, changes))
        _plan(planned, gpus, memory, peak, utilisation or 0.4)
        return
    keep_freed_memory()
    with one_voice() as speaks:
        if given := [name for name, value in of_plan.items() if value is not None]:
            raise UserError(f"{', '.join(given)} is for --dry-run, which is not given")
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


def _plan(
    config: RunConfig, gpus: int | None, memory: float | None, peak: float | None, utilisation: float
) -> None:
    """What a run takes of each process, as tables, and the nearest run that fits if it does not."""
    from dataclasses import asdict, replace

    from rich.console import Console

    from retnet.measure.fitting import changes, nearest_fit
    from retnet.measure.footprint import footprint, with_vocabulary
    from retnet.tables import print_table

    p = config.parallel
    processes = gpus or p.replicate * (p.shard or 1) * p.tp * p.cp
    if memory is None:
        device, precision, there, rate = _here(config, processes)
    else:
        device, precision = config.train.device, _elsewhere(config)
        there, rate = memory * 1e9, 989.0  # an H100's
    peak = peak or rate
    config = replace(config, train=replace(config.train, device=device, precision=precision))
    given, config = config, replace(config, model=with_vocabulary(config))  # read once
    found, console = footprint(config, processes), Console(highlight=False)
    axes = " × ".join(f"{name} {size}" for name, size in asdict(found.axes).items())
    click.echo(
        f"{found.parameters:,} parameters in {config.train.precision} on {processes} processes: {axes}"
    )
    if given.model.vocab_size is None and given.data.learned_vocab is None:
        whose = given.data.tokenizer if Path(given.data.tokenizer).exists() else "bytes"
        click.echo(f"model.vocab_size is not set: counted with {config.model.vocab_size}, that of {whose}")
    for table in found.tables():
        print_table(table, console)
    hours = found.hours(processes * peak * 1e12 * utilisation)
    click.echo(f"{hours:,.3g} hours at {utilisation:.0%} of {peak:,.3g} Tflop/s on each of {processes}")
    if found.memory.peak <= there:
        click.echo(f"fits: {found.memory.peak / 1e9:,.3g} of {there / 1e9:,.3g} GB")
        return
    click.echo(f"does not fit: {found.memory.peak / 1e9:,.3g} GB, and each process has {there / 1e9:,.3g}")
    nearest = nearest_fit(config, processes, there)
    if nearest is None:
        click.echo("nothing that makes the same steps fits; take a smaller model or larger devices")
        return
    run, number = nearest
    words = " ".join(filter(None, (f"--gpus {number}" if number != processes else "", changes(config, run))))
    click.echo(f"fits: {footprint(run, number).memory.peak / 1e9:,.3g} GB with {words}")


def _here(config: RunConfig, processes: int) -> tuple[str, Precision, float, float]:
    """Device and precision of a run on this machine, as `train` decides; bytes there, Tflop/s of a process's products."""
    from retnet import host

    try:
        device = host.choose_device(config.train.device)
    except UserError as error:
        raise UserError(f"{error}; a plan for another machine takes its --memory") from None
    precision = host.choose_precision(config.train.precision, device)
    rate = host.matrix_rate(device, precision)
    sharing = processes if device.type == "cpu" else 1  # the cores are of all; a GPU is of one
    return device.type, precision, float(host.memory_of(device)), rate / sharing / 1e12


def _elsewhere(config: RunConfig) -> Precision:
    """Precision on a machine that cannot be asked: GPUs are taken to have bf16."""
    if config.train.precision != "auto":
        return config.train.precision
    return "fp32" if config.train.device == "cpu" else "bf16"
