import io
import time

from rich.console import Console

from retnet import progress


def test_lines_where_there_is_no_terminal(monkeypatch):
    """The first at once, then whatever was said last, also when nothing new is said for long."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.1)
    out = io.StringIO()
    with progress.shown(Console(file=out, width=20)) as say:
        say("warming up: a contender with a long name")
        time.sleep(0.05)
        say("too short to be seen", 0.1)
        say("round 1 [of] 7", 0.25)
        time.sleep(0.3)
    say("after the end")
    assert (
        out.getvalue()
        == "0:00:00 warming up: a contender with a long name\n0:00:00 round 1 [of] 7 (25% done)\n"
    )


def test_nothing_said_is_nothing_shown():
    out = io.StringIO()
    with progress.shown(Console(file=out)):
        pass
    assert out.getvalue() == ""


def test_a_live_line_on_a_terminal():
    out = io.StringIO()
    with progress.shown(Console(file=out, force_terminal=True, width=120)) as say:
        say("round 2 of 7", 0.25)
    assert "round 2 of 7" in out.getvalue()
    assert "0:00:00" in out.getvalue()
