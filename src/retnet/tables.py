"""Tables of results: drawn on a terminal, tab-separated values (TSV) elsewhere.

One renderer for whatever is measured, evaluated or planned; a study's HTML page shows the same `Table`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import click
from rich import table as rich_table
from rich.console import Console
from rich.text import Text

MISSING = "–"  # in a cell: not measured, or not known
EMPTY = frozenset({"", "-", "–", "—"})  # cells that say nothing

_NUMBER = re.compile(r"[<>≤≥~≈±+−-]?\s*(\.?\d|inf\b|nan\b)")


@dataclass(frozen=True)
class Table:
    """Rows of words and numbers already written out, as many cells as columns; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()  # sentences below it
    whole: tuple[str, ...] = ()  # columns whose cells are not broken over lines when a terminal is narrow

    def numeric(self) -> list[bool]:
        """Of each column, whether it holds numbers and so stands right; the first one never does."""
        return [n > 0 and numeric(row[n] for row in self.rows) for n in range(len(self.columns))]


def numeric(cells: Iterable[str]) -> bool:
    """Whether these are numbers, but for those that are missing."""
    known = [cell for cell in cells if cell not in EMPTY]
    return bool(known) and all(_NUMBER.match(cell) for cell in known)


def print_table(table: Table, console: Console) -> None:
    """Draws a table on a terminal; elsewhere prints columns and rows as TSV, without title and notes."""
    if not console.is_terminal:
        for line in (table.columns, *table.rows):
            click.echo("\t".join(line))
        return
    console.print(drawn(table))
    for note in table.notes:
        console.print(Text(note))


def drawn(table: Table) -> rich_table.Table:
    """A table as rich draws it, without its notes; cells in `whole` columns are not broken over lines."""
    made = rich_table.Table(title=Text(table.title), title_justify="left")
    for column, right in zip(table.columns, table.numeric(), strict=True):
        whole = column in table.whole
        made.add_column(Text(column), justify="right" if right else "left", no_wrap=whole, overflow="fold")
    for row in table.rows:
        made.add_row(*map(Text, row))
    return made


def print_tables(tables: Iterable[Table], console: Console) -> None:
    """Tables one below the other; where they are TSV, each with its title as a comment above."""
    for table in tables:
        click.echo()
        if not console.is_terminal:
            click.echo(f"# {table.title}")
        print_table(table, console)
