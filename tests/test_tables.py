import io

import pytest
from rich.console import Console

from retnet.tables import Table, numeric, print_table, print_tables

TABLE = Table(
    "A [b]title[/b]",
    ("", "loss", "said"),
    (("x", "1.5 ± 0.1", "[red]"), ("y", "–", "2 of 3")),
    ("A [note].",),
)


def test_columns_of_numbers_stand_right():
    assert TABLE.numeric() == [False, True, False]
    assert Table("", ("n",), (("1",),)).numeric() == [False]  # names the row


@pytest.mark.parametrize(
    ("cells", "found"),
    [
        (["1", "-", "2.5 (1..3)", "−0.1", "≥ 3", "nan", "~ .5"], True),
        (["1", "one"], False),
        (["–", ""], False),
        (["nano"], False),
    ],
)
def test_numbers(cells, found):
    assert numeric(cells) == found


def test_a_terminal_has_everything_as_it_is():
    screen = io.StringIO()
    print_table(TABLE, Console(file=screen, force_terminal=True, width=80, color_system=None))
    shown = screen.getvalue()
    for words in (TABLE.title, "1.5 ± 0.1", "[red]", "A [note]."):
        assert words in shown


def test_elsewhere_a_table_is_tab_separated(capsys):
    print_table(TABLE, Console(file=io.StringIO()))
    assert capsys.readouterr().out == "\tloss\tsaid\nx\t1.5 ± 0.1\t[red]\ny\t–\t2 of 3\n"
    print_tables([TABLE, TABLE], Console(file=io.StringIO()))
    lines = capsys.readouterr().out.split("\n")
    assert lines[:3] == ["", "# A [b]title[/b]", "\tloss\tsaid"]
    assert lines.count("") == 3  # one before each, and the last line ends
