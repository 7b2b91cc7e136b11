import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet.engine.stops import StopScanner
from retnet.settings import UserError

few = st.text(alphabet="ab", max_size=12)
stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


def by_character(text, stops):
    """The rule itself: read on until what was read ends in a stop string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(pieces=st.lists(few, max_size=8), stops=stops)
def test_how_the_text_is_cut_does_not_matter(pieces, stops):
    scanner = StopScanner(stops)
    passed = ""
    for piece in pieces:
        passed += scanner.push(piece)
    passed += scanner.finish()
    assert (passed, scanner.stopped) == by_character("".join(pieces), stops)


@given(pieces=st.lists(few, max_size=8), stops=stops)
def test_exactly_what_may_become_a_stop_string_is_held_back(pieces, stops):
    scanner, read = StopScanner(stops), ""
    passed = ""
    for piece in pieces:
        passed += scanner.push(piece)
        read += piece
        if scanner.stopped:
            break
        assert passed + scanner.held == read
        ends = [read[n:] for n in range(len(read)) if any(s.startswith(read[n:]) for s in stops)]
        assert scanner.held == max(ends, key=len, default="")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="at least one character"):
        StopScanner(["x", ""])
