"""`retnet study`: the paper's comparisons, run and drawn."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retnet.cli.options import FiniteRange, HomePath, options
from retnet.errors import UserError, require_packages, told
from retnet.settings import COMMAND_LINE, parse_overrides

if TYPE_CHECKING:
    from retnet.studies.study import Study


class Studies(click.Group):
    """Every name but `report` is a study: a shipped one, or the path of a .toml file."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from retnet.studies.study_files import shipped_studies

        return [*shipped_studies(), "report"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        if cmd_name == "report":
            return report
        from retnet.studies.study_files import check_study

        check_study(cmd_name)
        return _run_command(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from retnet.studies.study_files import shipped_studies

        with formatter.section("Studies"):
            formatter.write_dl([(name, ", ".join(scales)) for name, scales in shipped_studies().items()])
        with formatter.section("And"):
            formatter.write_dl([("report", "Write the page of a study's folder again.")])


@click.group("study", cls=Studies)
def command() -> None:
    """Run the paper's comparisons: each a TOML that lists what to run, at several scales.

    `retnet study architectures --scale laptop --out DIR` runs what is not done yet in DIR, then writes DIR/report.html,
    pictures and summary.json. Interrupted, the same command goes on. Needs pip install 'retnet[study]'.
    """


def _run_command(name: str) -> click.Command:
    """The command of one study."""

    @click.command(name, context_settings={"ignore_unknown_options": True})
    @click.option(
        "--scale",
        default="laptop",
        show_default=True,
        help="laptop, small or paper; of two studies also gpu.",
    )
    @options(
        "retnet.studies.quality:QualityMeasure",
        "seeds",
        unset=True,
        seeds="How many, where models are trained.",
    )
    @options("retnet.studies.study:Study", "hours", "workers", "processes", unset=True)
    @click.option(
        "--out",
        type=HomePath(path_type=Path, file_okay=False),
        help="Folder of the study.  [default: studies/NAME-SCALE]",
    )
    @click.option("--dry-run", is_flag=True, help="Print what it takes, and do nothing.")
    @click.option("--gpus", type=click.IntRange(1), default=8, show_default=True, help="For --dry-run.")
    @click.option(
        "--peak",
        type=FiniteRange(0, min_open=True),
        default=989.0,
        show_default=True,
        help="Tflop/s of one GPU, for --dry-run.",
    )
    @click.option(
        "--utilisation",
        type=FiniteRange(0, 1, min_open=True),
        default=0.4,
        show_default=True,
        help="Part of the peak that is reached, for --dry-run.",
    )
    @click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
    def run(**given: Any) -> None:  # noqa: ANN401
        """Run a study. Its settings are changed with --measure.field VALUE.

        Such as --measure.settings.data.corpus my-texts/ or --measure.sets.plays plays.txt.
        """
        _run(name, **given)

    return run


def _run(
    name: str,
    scale: str,
    seeds: int | None,
    out: Path | None,
    dry_run: bool,
    gpus: int,
    peak: float,
    utilisation: float,
    overrides: tuple[str, ...],
    **limits: float | None,
) -> None:
    from rich.console import Console

    from retnet.studies.study import load_study
    from retnet.studies.study_files import find_study

    path = find_study(name, scale)
    given: dict[str, Any] = {"measure.seeds": seeds, **limits}
    chosen = {key: value for key, value in given.items() if value is not None}
    changes = parse_overrides(overrides)
    study = load_study(path, {**chosen, **changes})
    if changes:
        _check_changes(study, path)
    if dry_run:
        _plan(study, gpus, peak, utilisation)
        return
    from retnet.studies.report import read, show, write_report
    from retnet.studies.runner import run_study

    require_packages(
        "reports need", "study", "jinja2", "matplotlib", "scipy"
    )  # before hours are spent on jobs
    out = out or Path("studies") / f"{path.parent.name}-{path.stem}"
    progress = Console(stderr=True, highlight=False)
    whole = "jobs that finished are whole, and the same command goes on with the others"
    with told(f"write the study's folder {out}", whole):
        ended = run_study(study, out, progress)
    show(read(out), Console(highlight=False))  # first: it is there when nothing can be written any more
    files = write_report(out)
    click.echo("wrote " + " and ".join(map(str, files)))
    if ended.stopped or ended.failed:
        click.echo("the same command goes on where this one ended", err=True)
        raise SystemExit(1)


def _check_changes(study: Study, path: Path) -> None:
    """Blames settings of runs that are wrong on the command line, where the study's file alone has right ones."""
    from retnet.studies.study import load_study

    try:
        study.measure.plans()
    except UserError as error:
        with suppress(UserError):
            load_study(path).measure.plans()
            error = UserError(f"{COMMAND_LINE}: {error}")
        raise error from None


def _plan(study: Study, gpus: int, peak: float, utilisation: float) -> None:
    """What a study takes, as a table."""
    from rich.console import Console

    from retnet.measure.memory import GIB
    from retnet.tables import Table, print_table

    click.echo(f"{study.title}: {study.measure.count()} jobs")
    plans = study.measure.plans()
    if not plans:
        click.echo("nothing is trained; each job measures for minutes")
        return
    reached = gpus * peak * 1e12 * utilisation
    columns = (
        "run",
        "runs",
        "parameters",
        "tokens a run",
        "flops a run",
        "GiB a GPU",
        "hours a run",
        "hours",
    )
    rows = tuple(
        (
            plan.name,
            f"{plan.runs}",
            f"{plan.parameters:,}",
            f"{plan.tokens:,}",
            f"{plan.flops:.3g}",
            f"{plan.bytes_per_process(gpus) / GIB:,.1f}",
            f"{plan.hours(reached) / plan.runs:,.3g}",
            f"{plan.hours(reached):,.3g}",
        )
        for plan in plans
    )
    table = Table(f"{gpus} GPUs of {peak:g} Tflop/s at {utilisation:.0%}", columns, rows)
    print_table(table, Console(highlight=False))
    total = sum(plan.hours(reached) for plan in plans)
    click.echo(
        f"in all: {sum(p.runs for p in plans)} runs, {total:,.3g} hours on {gpus} GPUs of {peak:g} Tflop/s"
    )


@click.command("report")
@click.argument("folder", type=HomePath(path_type=Path, file_okay=False))
def report(folder: Path) -> None:
    """Write FOLDER/report.html, pictures and summary.json from what a study has left there so far."""
    from rich.console import Console

    from retnet.studies.report import read, show, write_report

    show(read(folder), Console(highlight=False))
    files = write_report(folder)
    click.echo("wrote " + " and ".join(map(str, files)))
