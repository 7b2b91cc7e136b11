"""Records of benchmarks and studies: JSON with the machine, versions and commit that made it, and a PNG for each figure.

And how the rows of a record become a `Table`, column by column, and the `Line`s of a figure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retnet import host
from retnet.errors import told
from retnet.io import require_writable_folder, write_json
from retnet.measure.clock import Spread
from retnet.measure.figures import write_png
from retnet.measure.peers import need
from retnet.measure.summary import Figure, Line
from retnet.tables import Table

Record = dict[str, Any]
Cell = Callable[[Record], str]  # a row → what stands in one column
VERSION = 2  # of the format; 1 had no number


def complete(name: str, configuration: Mapping[str, Any], measured: Mapping[str, Any]) -> Record:
    """Adds to what was measured where, when and with what it was measured."""
    return {
        "version": VERSION,
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": host.describe(),
        "configuration": dict(configuration),
        **measured,
    }


def stem(record: Record) -> str:
    """The name of a record's files, such as ``"ops.amd-epyc-2c"``."""
    return f"{record['name']}.{machine_slug(record['host']['cpu'], record['host']['cores'])}"


def machine_slug(cpu: str, cores: int | None) -> str:
    """A short name of a machine for file names: ``"AMD EPYC"`` with 2 cores → ``"amd-epyc-2c"``."""
    name = re.sub(r"\((?:r|tm)\)|@.*|\bcpu\b|\bprocessor\b|\b\d+-core\b", " ", cpu.lower())
    words = re.findall(r"[a-z0-9]+", name) or ["unknown"]
    return "-".join([*words, f"{cores or 0}c"])


def prepare(out: Path) -> None:
    """Checks, before minutes are spent on measuring, that a record can be written.

    Raises:
        UserError: matplotlib is missing, or the directory cannot be made.
    """
    need("matplotlib.figure")
    with told(f"write to the directory {out}", "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
        require_writable_folder(out)


def write(record: Mapping[str, Any], path: Path, figures: Iterable[Figure]) -> list[Path]:
    """Writes a record, and beside it NAME.png for each figure; returns their paths, the record first.

    Raises:
        UserError: one cannot be written, or matplotlib is missing.
    """
    write_json(path, record)
    pictures = {path.with_name(f"{figure.name}.png"): figure for figure in figures}
    for picture, figure in pictures.items():
        write_png(figure, picture)
    return [path, *pictures]


def seen(row: Mapping[str, Any], key: str, factor: float = 1.0) -> Spread:
    """What a row of a record says, in another unit."""
    return Spread(**row[key]).times(factor)


def grouped(rows: Iterable[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    """Rows of a record by what they say under these keys, in the order in which that appears."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def table_of(
    title: str, rows: Iterable[Record], cells: Mapping[str, Cell], notes: Sequence[str] = ()
) -> Table:
    """A table with a line for each row; `cells` has the title of each column and what stands in it."""
    lines = tuple(tuple(cell(row) for cell in cells.values()) for row in rows)
    return Table(title, tuple(cells), lines, tuple(notes))


def said(key: str, form: str = "") -> Cell:
    """What a row says under a key, in a format such as ``","``."""
    return lambda row: format(row[key], form)


def measured(key: str, factor: float = 1.0, digits: int = 2) -> Cell:
    """Median, least and greatest of what was measured, in another unit."""
    return lambda row: seen(row, key, factor).written(digits)


def lines_of(
    rows: Iterable[Record], names: Sequence[str], x: str, y: str, factor: float = 1.0, label: str = ""
) -> tuple[Line, ...]:
    """The line of each group of rows: what was measured as `y`, in another unit, over `x`.

    Args:
        rows: of a record.
        names: keys by which they are grouped.
        x: key of a number.
        y: key of what was measured.
        factor: of the unit.
        label: format of a line's name, which is given what a group says; else that stands there with commas between.
    """
    form = label or ", ".join("{}" for _ in names)
    return tuple(
        Line.of(form.format(*group), [row[x] for row in line], [seen(row, y, factor) for row in line])
        for group, line in grouped(rows, *names).items()
    )
