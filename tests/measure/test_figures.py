import math
import re
import sys
from importlib import resources
from itertools import combinations
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from retnet.measure import figures
from retnet.measure.clock import Spread
from retnet.measure.figures import Style
from retnet.measure.summary import Bars, Figure, Line, Panel
from retnet.settings import UserError
from tests.helpers.fast import few_fast

NAN = math.nan
LENGTHS = tuple(float(2**i) for i in range(9, 18))
HOSTILE = "a<b> & \"c\" 'd' \\e $x_{1$ 检索 🦊 " + "long" * 40


def line(name, x=LENGTHS, dashed=False, spread=0.1):
    y = tuple(20 - math.log(v) for v in x)
    return Line(name, x, y, tuple(v - spread for v in y), tuple(v + spread for v in y), dashed)


def panel(*lines, **scales):
    return Panel("by length", "tokens of context", "nats", lines, **scales)


def shape(panel):
    """The axes of a panel as they are drawn."""
    with figures._drawing() as new:
        ax = new().subplots()
        figures._draw(ax, panel, figures.styles(Figure("f", (panel,))))
        ax.figure.draw_without_rendering()
        return ax


def labels(axis):
    low, high = sorted(axis.get_view_interval())
    return [
        t.get_text()
        for t, at in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
        if low <= at <= high
    ]


def test_a_name_has_one_look_in_all_panels_and_no_two_names_share_it():
    names = [f"model {i}" for i in range(20)]
    looks = figures.styles(
        Figure("f", (panel(line("model 1")), panel(*map(line, names), line("model 0", dashed=True))))
    )
    assert list(looks)[:2] == [("model 1", False), ("model 0", False)]  # in the order in which they appear
    drawn = {look.number: look.keywords() for look in looks.values()}
    assert len({(look["color"], look["marker"]) for look in drawn.values()}) == len(names)
    same = [look for look in drawn.values() if look["color"] == drawn[0]["color"]]
    assert same[1]["linestyle"] not in ("-", Style(0, True).keywords()["linestyle"])
    solid, dashed = looks["model 0", False], looks["model 0", True]
    assert solid.number == dashed.number
    assert solid.keywords()["linestyle"] != dashed.keywords()["linestyle"]


def rgb(color):
    values = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(a, b):
    dark, light = sorted(float(rgb(c) @ [0.2126, 0.7152, 0.0722]) + 0.05 for c in (a, b))
    return light / dark


def lab(linear):
    matrix = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    t = np.array(matrix) @ np.clip(linear, 0, 1) / [0.9505, 1, 1.089]
    x, y, z = np.where(t > 216 / 24389, np.cbrt(t), 841 / 108 * t + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# Machado, Oliveira and Fernandes 2009, severity 1
SEEN = {
    "by most": np.eye(3),
    "with protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "with deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}  # fmt: skip


@pytest.mark.parametrize("side", [0, 1], ids=["light", "dark"])
def test_colours_stand_off_the_ground_and_each_other_for_colour_blind_eyes_too(side):
    source = resources.files("retnet.studies").joinpath("report.html.jinja").read_text(encoding="utf-8")
    ground = re.findall(r"--ground: (#[0-9a-f]+);", source)[side].replace("#fff", "#ffffff")
    colors = [pair[side] for pair in figures.COLORS]
    assert min(contrast(color, ground) for color in colors) >= 3
    assert contrast((figures.INK, figures.INK_DARK)[side], ground) >= 7
    for matrix in SEEN.values():
        seen = [lab(np.array(matrix) @ rgb(color)) for color in colors]
        assert min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2)) >= 20


@pytest.mark.parametrize(
    ("value", "label", "expected"),
    [
        (2048, "tokens of context", "2k"),
        (131072, "length", "128k"),
        (3 * 2**20, "tokens", "3M"),
        (1000, "tokens", "1k"),
        (128_000, "tokens", "128k"),
        (512_000, "parameters", "512k"),
        (2_097_152, "parameters", "2.097M"),
        (1.3e9, "parameters", "1.3B"),
        (2e9, "bytes", "2G"),
        (0, "tokens", "0"),
        (0.1 + 0.2, "loss", "0.3"),
        (-1500, "tokens", "-1.5k"),
    ],
)
def test_short(value, label, expected):
    assert figures.short(value, label) == expected


def test_ticks_stand_where_was_measured():
    ax = shape(panel(line("a"), log_x=True, log_y=True))
    assert labels(ax.xaxis) == ["512", "1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k"]
    assert len(labels(ax.yaxis)) >= 3
    assert ax.get_xscale() == ax.get_yscale() == "log"


@pytest.mark.parametrize("high", [1.05, 3.0, 40.0, 1e3, 1e9])
def test_a_log_axis_has_a_few_round_labels_whatever_it_spans(high):
    points = tuple(np.geomspace(1.3, 1.3 * high, 30).tolist())
    ax = shape(panel(Line("a", points, points), log_x=True, log_y=True))
    for axis in (ax.xaxis, ax.yaxis):
        found = labels(axis)
        assert 2 <= len(found) <= 11
        assert len(set(found)) == len(found)


def test_spread_is_drawn_as_bars_of_few_points_and_as_a_band_of_many():
    few = shape(panel(line("a")))
    (bars,) = few.collections
    assert np.allclose([s[:, 1].max() - s[:, 1].min() for s in bars.get_segments()], 0.2)
    many = shape(panel(line("a", tuple(range(1, 101)))))
    (band,) = many.collections
    assert band.get_paths()[0].get_extents().height == pytest.approx(math.log(100) + 0.2)
    assert not shape(panel(Line("a", (1, 2), (1, 2)))).collections  # no spread is known


def test_what_has_no_place_on_the_axes_is_left_out():
    odd = Line("a", (NAN, 0, 1, 2, 4), (1, 1, NAN, -1, 5), (1, 1, 1, 1, NAN), (9, 9, 9, 9, 6))
    (drawn, *_) = shape(panel(odd, log_x=True, log_y=True)).lines
    assert drawn.get_xdata().tolist() == [1, 2, 4]
    assert np.isnan(drawn.get_ydata()[:2]).all()
    assert drawn.get_ydata()[2] == 5


@pytest.mark.parametrize("lines", [(), (Line("a", (), ()),), (Line("a", (1.0,), (NAN,)),)])
@pytest.mark.parametrize("log", [False, True])
def test_a_panel_without_points_says_so(lines, log):
    ax = shape(panel(*lines, log_x=log, log_y=log))
    assert [text.get_text() for text in ax.texts] == ["nothing measured yet"]
    assert not ax.lines


def parsed(svg):
    root = ElementTree.fromstring(svg)
    ids = [e.get("id") for e in root.iter() if "id" in e.attrib]
    uses = re.findall(r'(?:url\(|href=")#([^")]+)', svg)
    return root, ids, uses


def test_svg_can_stand_in_a_page_beside_others():
    figure = Figure("f", (panel(line("a"), line("b")), panel(line("a", tuple(range(1, 101))))))
    drawn = [*figures.panels_as_svg(figure, "one"), *figures.panels_as_svg(figure, "two")]
    drawn += [svg for _, svg in figures.legend_as_svg(figure, "one")]
    seen = []
    for svg in drawn:
        root, ids, uses = parsed(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert set(uses) <= set(ids)
        assert "viewBox" in root.attrib
        assert "width" not in root.attrib
        assert not re.search(r"<style|<metadata|<!--|<\?xml", svg)
        assert set(re.findall(r"https?://[^\"]+", svg)) <= {"http://www.w3.org/2000/svg"}
        seen += ids
    assert len(set(seen)) == len(seen)
    assert "var(--line-0, #0072b2)" in drawn[0]
    assert "var(--ink, #1b1f24)" in drawn[0]
    assert "#0072b2;" not in drawn[0]  # none was forgotten


BARS = Bars("op", "ms", ("ours", HOSTILE), (Spread(2, 1, 2.5), Spread(4, 4, 4)), limit=3)


def test_bars_stand_in_order_with_their_spread_and_limit():
    ax = shape(BARS)
    assert [bar.get_width() for bar in ax.patches] == [2, 4]
    assert ax.patches[0].get_y() < ax.patches[1].get_y()
    assert ax.yaxis_inverted()
    (beside,) = [c for c in ax.collections if len(c.get_segments()) == 2]
    assert np.allclose([s[:, 0].tolist() for s in beside.get_segments()], [[1, 2.5], [4, 4]])
    assert [text.get_text() for text in ax.texts] == ["2", "4"]
    (limit,) = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert limit.get_xdata() == [3, 3]
    assert [text.get_text() for text in shape(Bars("", "", (), ())).texts] == ["nothing measured yet"]


def test_bars_have_a_place_in_pictures_and_pages(tmp_path):
    figure = Figure("f", (BARS, panel(line("a"))), title=HOSTILE)
    figures.write_png(figure, tmp_path / "f.png")
    assert list(figures.styles(figure)) == [("a", False)]
    root, *_ = parsed(figures.panels_as_svg(figure, "p")[0])
    assert root.get("aria-label") == f"op. ms. ours: 2; {HOSTILE}: 4"


def test_lines_through_medians():
    made = Line.of("a", [1, 2], [Spread(2, 1, 3), Spread(5, 4, 6)], dashed=True)
    assert made == Line("a", (1.0, 2.0), (2, 5), (1, 4), (3, 6), True)
    ax = shape(Panel("t", "x", "y", (made,), from_zero=True))
    assert ax.get_ylim()[0] == 0


def test_svg_says_what_it_shows():
    figure = Figure("f", (panel(Line(HOSTILE, (1024.0, 8192.0), (3.0, 2.5)), Line("b", (), ())),))
    root, *_ = parsed(figures.panels_as_svg(figure, "p")[0])
    assert root.get("role") == "img"
    assert root.get("aria-label") == (
        f"by length. nats by tokens of context. {HOSTILE}: 3 at 1k to 2.5 at 8k; b: nothing measured yet"
    )
    ((name, key), _) = figures.legend_as_svg(figure, "p")
    assert name == HOSTILE
    assert parsed(key)[0].get("aria-hidden") == "true"


def test_the_same_drawing_every_time_whatever_the_user_has_set(tmp_path):
    figure = Figure("f", (panel(line("a"), line("_b", dashed=True), log_x=True),))

    def drawn(name):
        figures.write_png(figure, tmp_path / name)
        return (tmp_path / name).read_bytes(), figures.panels_as_svg(figure, "p")

    first = drawn("a.png")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.usetex": True}):
        assert drawn("b.png") == first
        assert matplotlib.rcParams["font.size"] == 30
    assert first[0].startswith(b"\x89PNG")


@pytest.mark.parametrize("panels", few_fast([0, 1, 5], 0, 5))
def test_png_of_hostile_names_and_any_number_of_panels(tmp_path, panels):
    one = Panel(HOSTILE, HOSTILE, HOSTILE, (line(HOSTILE), line("_hidden"), Line("", (1.0,), (2.0,))))
    figures.write_png(Figure("f", (one,) * panels), tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 1000


def test_mistakes_end_in_a_sentence(tmp_path, monkeypatch):
    figure = Figure("f", (panel(line("a")),))
    with pytest.raises(UserError, match=r"cannot write .*missing"):
        figures.write_png(figure, tmp_path / "missing" / "f.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'retnet\[study\]'"):
        figures.write_png(figure, tmp_path / "f.png")
