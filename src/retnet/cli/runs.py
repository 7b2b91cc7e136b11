"""`retnet runs`: a table of runs, two of them side by side, their curves, and how they go on."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from rich.console import Console

from retnet.cli.options import HomePath, read_fields
from retnet.errors import UserError
from retnet.tables import MISSING, Table, drawn, print_table, print_tables
from retnet.train.run_summary import RunSummary, differing, find_runs, is_run, read_metrics, summarise_run

if TYPE_CHECKING:
    from rich.console import RenderableType

WATCHED = 2.0  # seconds between two looks
DRAWN = 14  # runs whose lines can be told apart
POINTS = 200  # of a curve


class _Quantity(NamedTuple):
    """A column of the table, a row of a comparison."""

    name: str
    words: Callable[[RunSummary], str]
    number: Callable[[RunSummary], float | None] | None = None  # by which runs are compared and sorted


def _written(form: str, number: float | None) -> str:
    return MISSING if number is None else form.format(number)


def _duration(seconds: float | None) -> str:
    return MISSING if seconds is None else str(timedelta(seconds=int(seconds)))


def _steps(run: RunSummary) -> str:
    return f"{run.step}/{run.steps}" if run.steps else f"{run.step}"


QUANTITIES = (
    _Quantity("state", lambda run: run.state),
    _Quantity("step", _steps, lambda run: run.step),
    _Quantity("loss", lambda run: _written("{:.3f}", run.loss), lambda run: run.loss),
    _Quantity("bits/byte", lambda run: _written("{:.4f}", run.bits), lambda run: run.bits),
    _Quantity("tokens/s", lambda run: _written("{:,.0f}", run.tokens_per_s), lambda run: run.tokens_per_s),
    _Quantity("time", lambda run: _duration(run.seconds), lambda run: run.seconds),
)
MESH = _Quantity("mesh", lambda run: run.mesh or MISSING)
SORTS: dict[str, Callable[[RunSummary], Any]] = {
    "run": lambda run: [
        (not part.isdecimal(), int(part) if part.isdecimal() else part)
        for part in re.split(r"(\d+)", str(run.path))
        if part
    ],
    "state": lambda run: run.state,
    **{q.name: q.number for q in QUANTITIES if q.number},
    "written": lambda run: -run.written,
}


@click.command("runs")
@click.argument("paths", nargs=-1, type=HomePath(path_type=Path))
@click.option("--plot", metavar="FILE", type=HomePath(path_type=Path), help="Draw the curves to a PNG file.")
@click.option("--watch", is_flag=True, help="Follow the runs until none is running; Ctrl-C ends it before.")
@click.option(
    "--sort",
    type=click.Choice(list(SORTS)),
    help="Order; written: newest first. [default: run; two are side by side as given]",
)
def command(paths: tuple[Path, ...], plot: Path | None, watch: bool, sort: str | None) -> None:
    """Show the runs in PATHS, which are runs or folders with runs below; default: runs.

    Each has its state, last step and loss, best validation, speed, time, and the settings in which the runs differ.
    Two runs (retnet runs A B) are shown side by side.
    """
    if watch and plot:
        raise click.UsageError("--plot draws once, and --watch goes on; give one of them")
    paths = paths or (Path("runs"),)
    if watch:
        _watch(paths, sort)
        return
    runs = _read(paths, sort)
    console = Console(highlight=False)
    if len(paths) == len(runs) == 2 and all(map(is_run, paths)):
        print_table(_comparison(runs), console)
    else:
        _show(runs, console)
    if plot:
        _plot(runs, plot)


def _read(paths: Sequence[Path], sort: str | None) -> list[RunSummary]:
    found: dict[str, Path] = {}  # real path → path: each run once, however often it is named
    plain = os.path.abspath if any(path.is_absolute() for path in paths) else os.path.relpath
    for path in paths:
        if path.is_file() and is_run(path.parent):
            path = path.parent
        if not path.is_dir():
            raise UserError(f"there is no folder {path}; give a run, or a folder with runs below")
        place = Path(plain(path))
        whole = Path(os.path.abspath(path))
        inside = next((Path(plain(above)) for above in (whole, *whole.parents[:2]) if is_run(above)), None)
        below = [inside] if inside and inside != place else list(find_runs(place))
        if not below:
            raise UserError(
                f"there is no run in {path} or below it; retnet train CONFIG --run-dir DIR begins one"
            )
        for run in below:
            found.setdefault(os.path.realpath(run), run)
    runs, key = [summarise_run(path) for path in found.values()], SORTS[sort or "run"]
    if sort is None and len(paths) == len(runs) == 2:  # side by side, as they were given
        return runs
    return sorted(runs, key=lambda run: (key(run) is None, 0 if key(run) is None else key(run)))


def _quantities(runs: Sequence[RunSummary]) -> tuple[_Quantity, ...]:
    """What is shown of these runs: the mesh where one has several processes."""
    return (*QUANTITIES, MESH) if any(run.mesh for run in runs) else QUANTITIES


def _common(paths: Sequence[Path]) -> Path:
    """The folder that holds all of these runs, as it was given."""
    return Path(os.path.commonpath([path.parent for path in paths])) if len(paths) > 1 else paths[0].parent


def _names(runs: Sequence[RunSummary]) -> list[str]:
    """Paths of runs in the folder that holds all of them."""
    common = _common([run.path for run in runs])
    return [str(run.path.relative_to(common)) for run in runs]


def _defaults() -> dict[str, Any]:
    """Of settings, as the sources of this version say, for runs that do not name them."""
    places = {
        "train": "retnet.train.config:TrainConfig",
        "data": "retnet.data.config:DataConfig",
        "model": "retnet.model.config:ModelConfig",
    }
    return {
        f"{section}.{name}": field.default
        for section, place in places.items()
        for name, field in read_fields(place).items()
        if field.default is not None
    }


def _value(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, float):
        return f"{value:g}"
    return MISSING if value is None else str(value)


def _short(names: Sequence[str]) -> dict[str, str]:
    """Names of settings without their section, where that leaves them different: train.seed → seed."""
    ends = [name.partition(".")[2] for name in names]
    return {name: end if ends.count(end) == 1 else name for name, end in zip(names, ends, strict=True)}


def _show(runs: Sequence[RunSummary], console: Console) -> None:
    """One table where it fits or nobody looks; else the settings that differ in a second one."""
    names, settings = _names(runs), differing(list(runs), _defaults())
    short = _short(list(settings))
    quantities = _quantities(runs)
    columns = tuple(q.name for q in quantities)
    rows = [(name, *(q.words(run) for q in quantities)) for name, run in zip(names, runs, strict=True)]
    title = f"{len(runs)} run{'s' if len(runs) > 1 else ''} in {_common([run.path for run in runs])}"
    notes = tuple(
        f"{name} is {run.state}: {run.note}" for name, run in zip(names, runs, strict=True) if run.note
    )
    skipped = [f"{name} {run.skipped}" for name, run in zip(names, runs, strict=True) if run.skipped]
    notes += (f"skipped steps: {', '.join(skipped)}",) if skipped else ()
    wide = tuple((*row, *(_value(settings[key][n]) for key in settings)) for n, row in enumerate(rows))
    whole = Table(title, ("run", *columns, *short.values()), wide, notes, columns)
    if not console.is_terminal:
        said = tuple((*row, run.note) for row, run in zip(wide, runs, strict=True))
        print_table(Table(title, (*whole.columns, "note"), said), console)
        return
    unbounded = console.options.update(max_width=10_000)
    if console.measure(drawn(whole), options=unbounded).maximum <= console.width:
        print_table(whole, console)
        return
    print_table(Table(title, ("run", *columns), tuple(rows), notes, columns), console)
    if settings:
        told = tuple(
            (
                name,
                ", ".join(
                    f"{short[key]} {_value(found[n])}"
                    for key, found in settings.items()
                    if found[n] is not None
                ),
            )
            for n, name in enumerate(names)
        )
        print_tables([Table("Settings that differ", ("run", "settings"), told)], console)


def _comparison(runs: Sequence[RunSummary]) -> Table:
    """Two runs side by side, with ratios; losses at the last step that both have as well."""
    one, other = runs
    rows = [
        (q.name, q.words(one), q.words(other), _ratio(*(q.number(run) if q.number else None for run in runs)))
        for q in _quantities(runs)
    ]
    for key, name in (("loss", "loss"), ("validation_bits_per_byte", "bits/byte")):
        curves = [{line["step"]: line[key] for line in read_metrics(run.path) if key in line} for run in runs]
        if shared := curves[0].keys() & curves[1].keys():
            a, b = (curve[max(shared)] for curve in curves)
            rows.append((f"{name} at step {max(shared)}", f"{a:.4f}", f"{b:.4f}", _ratio(a, b)))
    for key, (a, b) in differing(list(runs), _defaults()).items():
        numbers = [x if isinstance(x, (int, float)) and not isinstance(x, bool) else None for x in (a, b)]
        rows.append((key, _value(a), _value(b), _ratio(*numbers)))
    notes = tuple(f"{run.path} is {run.state}: {run.note}" for run in runs if run.note)
    return Table("Two runs", ("", str(one.path), str(other.path), "ratio"), tuple(rows), notes)


def _ratio(a: float | None, b: float | None) -> str:
    """The second by the first."""
    return MISSING if a is None or b is None or a <= 0 else f"{b / a:.3g}"


def _watch(paths: Sequence[Path], sort: str | None) -> None:
    """Shows runs again and again until none is running: live on a terminal, elsewhere a line for what is new."""
    console = Console(highlight=False)
    try:
        if console.is_terminal:
            _watch_live(paths, sort, console)
        else:
            _watch_lines(paths, sort)
    except KeyboardInterrupt:  # the way to end it
        return


def _watch_live(paths: Sequence[Path], sort: str | None, console: Console) -> None:
    from rich.live import Live

    runs = _read(paths, sort)
    with Live(_view(runs, console), console=console, auto_refresh=False) as live:
        while any(run.state == "running" for run in runs):
            time.sleep(WATCHED)
            runs = _read(paths, sort)
            live.update(_view(runs, console), refresh=True)


def _view(runs: Sequence[RunSummary], console: Console) -> RenderableType:
    """As many runs as a terminal has lines, those first that are running, then those written last."""
    pairs = list(zip(_names(runs), runs, strict=True))
    pairs.sort(
        key=lambda pair: (pair[1].state != "running", -pair[1].written if pair[1].state != "running" else 0)
    )
    shown = pairs[: max(1, console.height - 7)]
    quantities = _quantities(runs)[1:]
    columns = ("run", *(q.name for q in quantities), "left")
    rows = tuple(
        (
            name,
            *(q.words(run) for q in quantities),
            _duration(run.left) if run.state == "running" else run.state,
        )
        for name, run in shown
    )
    more = f", {len(pairs) - len(shown)} more not shown" if len(shown) < len(pairs) else ""
    running = sum(run.state == "running" for run in runs)
    return drawn(Table(f"{running} of {len(runs)} runs running{more}", columns, rows, (), columns[1:]))


def _watch_lines(paths: Sequence[Path], sort: str | None) -> None:
    told: dict[Path, tuple[str, int]] = {}
    while True:
        runs = _read(paths, sort)
        for name, run in zip(_names(runs), runs, strict=True):
            if told.get(run.path) != (run.state, run.step):
                told[run.path] = (run.state, run.step)
                known = [f"{q.name} {q.words(run)}" for q in QUANTITIES[1:] if q.words(run) != MISSING]
                click.echo(f"{name}: {run.state}, {', '.join(known)}")
        if not any(run.state == "running" for run in runs):
            return
        time.sleep(WATCHED)


def _plot(runs: Sequence[RunSummary], file: Path) -> None:
    """Draws loss and validation over steps, or over tokens where the runs' steps are of different sizes."""
    from retnet.cli.run_curves import curves
    from retnet.io import require_writable
    from retnet.measure.figures import write_png

    require_writable(file)
    named = [pair for pair in zip(_names(runs), runs, strict=True) if pair[1].loss is not None]
    if not named:
        raise UserError("none of these runs has measured anything yet, so there is no curve to draw")
    if len(named) > DRAWN:
        named.sort(key=lambda pair: (pair[1].bits is None, pair[1].bits or 0.0))
    write_png(curves(named[:DRAWN], POINTS), file)
    left_out = (
        f" of the {DRAWN} best of {len(named)} runs; name fewer to choose" if len(named) > DRAWN else ""
    )
    click.echo(f"wrote {file}{left_out}", err=True)
