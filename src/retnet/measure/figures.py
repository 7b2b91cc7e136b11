"""Drawing of figures by matplotlib: as PNG files, and as SVG to stand inside an HTML page in its light or dark colours."""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from retnet.errors import require_packages, told
from retnet.measure.summary import Bars, Figure, Line, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

INK, INK_DARK = "#1b1f24", "#e6e8eb"  # of words and axes, on a light and on a dark ground
# Colours of lines on a light and on a dark ground, each at least 3:1 beside it (WCAG 1.4.11). Chosen so that any two stay
# apart under protanopia and deuteranopia as well (at least 20 in CIELAB); markers tell them apart for everybody.
COLORS = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#ff8a3c"),
    ("#00896a", "#12b886"),
    ("#9429e0", "#9f30ff"),
    ("#0b0a6b", "#f4f040"),
    ("#7a0c0a", "#dd2347"),
    ("#5e0a48", "#5f6ac4"),
)
MARKERS = "osD^vP*X"

_BARS = 12  # points of a line up to which their spread is drawn as bars; beyond, as a band
_RC = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "font.size": 9.5,
    "grid.alpha": 0.16,
    "grid.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "path",  # outlines: the same everywhere, whatever fonts a reader has
    "svg.hashsalt": "retnet",
    "text.color": INK,
    "text.parse_math": False,  # names may hold a $
    "xtick.color": INK,
    "ytick.color": INK,
}
Key = tuple[str, bool]

_SVG, _XLINK = "http://www.w3.org/2000/svg", "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Style:
    """How a line looks in all panels of a figure.

    Attributes:
        number: of its name, which gives colour, marker and, when all colours are taken, dots between the dashes.
        dashed: not measured here.
    """

    number: int
    dashed: bool

    def keywords(self) -> dict[str, Any]:
        """For matplotlib."""
        again, color = divmod(self.number, len(COLORS))
        look = {
            "color": COLORS[color][0],
            "marker": MARKERS[self.number % len(MARKERS)],
            "linestyle": (0, (4, 2)) if self.dashed else (0, (8, 1.5, 1.5, 1.5)) if again else "-",
            "linewidth": 1.6,
            "markersize": 5.5,
        }
        return {**look, "markerfacecolor": "none"} if self.dashed else look


def styles(figure: Figure) -> dict[Key, Style]:
    """(name, dashed) → style, of every line of a figure, in the order in which they first appear."""
    lines = (line for panel in figure.panels if isinstance(panel, Panel) for line in panel.lines)
    keys = dict.fromkeys((line.name, line.dashed) for line in lines)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in keys))}
    return {(name, dashed): Style(numbers[name], dashed) for name, dashed in keys}


def write_png(figure: Figure, path: Path) -> None:
    """Draws the panels of a figure side by side above one legend.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    looks, count = styles(figure), len(figure.panels)
    wide = max(1, count if count <= 3 else 2 if count == 4 else 3)
    high = max(1, -(-count // wide))
    with _drawing() as new:
        names = [textwrap.fill(name, 60) for name, _ in looks]
        columns = max(1, min(len(names), 60 * wide // (max(map(len, names), default=0) + 8)))
        image = new(figsize=(5 * wide, 3.8 * high + 0.25 * -(-len(names) // columns)), layout="constrained")
        axes = list(image.subplots(high, wide, squeeze=False).flat)
        for panel, ax in zip(figure.panels, axes, strict=False):
            _draw(ax, panel, looks)
            ax.set_title(textwrap.fill(panel.title, 56))
        for ax in axes[count:]:
            ax.set_axis_off()
        if figure.title:
            image.suptitle(textwrap.fill(figure.title, 64 * wide), fontsize=10)
        if names:
            handles = [_sample(look) for look in looks.values()]
            image.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=3)
        with told(f"write {path}"):
            image.savefig(path, dpi=130, format="png", metadata={"Software": None})


def panels_as_svg(figure: Figure, prefix: str) -> list[str]:
    """One SVG element for each panel, without its title, to be put into a page.

    Colours stand as CSS variables (`--ink` and `--line-0`, `--line-1`, …) that fall back to those for a light ground.

    Args:
        figure: what to draw.
        prefix: of all ids, different for every figure of a page.
    """
    looks = styles(figure)
    found = []
    for number, panel in enumerate(figure.panels):
        with _drawing() as new:
            image = new(figsize=(4.8, 3.5), layout="constrained")
            _draw(image.subplots(), panel, looks)
            found.append(_svg(image, f"{prefix}-{number}", _words(panel)))
    return found


def legend_as_svg(figure: Figure, prefix: str) -> list[tuple[str, str]]:
    """(name, a sample of its line as an SVG element) for every line of a figure."""
    found = []
    for number, ((name, _), look) in enumerate(styles(figure).items()):
        with _drawing() as new:
            image = new(figsize=(0.5, 0.18))
            image.add_artist(_sample(look))
            found.append((name, _svg(image, f"{prefix}-key{number}", None)))
    return found


def short(value: float, label: str) -> str:
    """A number on an axis of this label: 2e6 is 2M; where tokens are counted, 8192 is 8k; 1e9 bytes are 1G, others 1B."""
    size = abs(value)
    counted = any(word in label.lower() for word in ("token", "length", "context"))
    if counted and size and size % 1024 == 0 and size % 1000:
        unit, letter = (2**20, "M") if size % 2**20 == 0 else (2**10, "k")
        return f"{value / unit:g}{letter}"
    giga = "G" if any(word in label.lower() for word in ("byte", "flop")) else "B"
    for unit, letter in ((10**9, giga), (10**6, "M"), (10**3, "k")):
        if size >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:g}"


@contextmanager
def _drawing() -> Iterator[Any]:
    """matplotlib's class `Figure`, under our settings instead of the user's."""
    require_packages("figures need", "study", "matplotlib")
    matplotlib, module = import_module("matplotlib"), import_module("matplotlib.figure")
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a box stands in its place
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield module.Figure


def _draw(ax: Axes, panel: Panel | Bars, looks: dict[Key, Style]) -> None:
    if isinstance(panel, Bars):
        _draw_bars(ax, panel)
        return
    drawn = [
        points
        for line in panel.lines
        if (points := _draw_line(ax, line, looks[line.name, line.dashed], panel))
    ]
    ax.set_xlabel(textwrap.fill(panel.x_label, 60))
    ax.set_ylabel(textwrap.fill(panel.y_label, 44))
    for name, log in (("x", panel.log_x), ("y", panel.log_y)):
        ax.set(**{f"{name}scale": "log" if log and drawn else "linear"})
    if not drawn:
        _say_nothing(ax)
        return
    if panel.from_zero:
        ax.set_ylim(bottom=0)
    _ticks(ax.xaxis, panel.log_x, panel.x_label, sorted({x for points in drawn for x in points}))
    _ticks(ax.yaxis, panel.log_y, panel.y_label)
    ax.grid(visible=True)
    ax.set_axisbelow(True)


def _draw_bars(ax: Axes, bars: Bars) -> None:
    ax.set_xlabel(textwrap.fill(bars.x_label, 60))
    if not bars.names:
        _say_nothing(ax)
        return
    places, medians = range(len(bars.names)), [s.median for s in bars.seen]
    beside = [[s.median - s.low for s in bars.seen], [s.high - s.median for s in bars.seen]]
    ax.barh(places, medians, xerr=beside, color=COLORS[0][0], alpha=0.75, capsize=3, ecolor=INK)
    ax.set_yticks(places, [textwrap.fill(name, 36) for name in bars.names])
    widest = max(s.high for s in bars.seen)
    for place, seen in zip(places, bars.seen, strict=True):
        ax.text(seen.high + 0.02 * widest, place, f"{seen.median:.3g}", va="center")
    ax.set_xlim(0, 1.15 * max(widest, bars.limit or 0))
    if bars.limit is not None:
        ax.axvline(bars.limit, color=INK, linestyle=":")
    ax.invert_yaxis()
    ax.set_axisbelow(True)


def _say_nothing(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    ax.text(0.5, 0.5, "nothing measured yet", ha="center", va="center", transform=ax.transAxes)


def _draw_line(ax: Axes, line: Line, look: Style, panel: Panel) -> list[float]:
    """Draws what of a line has a place on these axes; returns where it lies along x."""
    keep = [i for i, x in enumerate(line.x) if _placed(x, panel.log_x)]
    xs = [line.x[i] for i in keep]
    ys, lows, highs = (
        [values[i] if values and _placed(values[i], panel.log_y) else math.nan for i in keep]
        for values in (line.y, line.low, line.high)
    )
    if all(map(math.isnan, ys)):
        return []
    ax.plot(xs, ys, markevery=max(1, len(xs) // _BARS), **look.keywords())
    color = look.keywords()["color"]
    if len(xs) > _BARS:
        ax.fill_between(xs, lows, highs, color=color, alpha=0.18, linewidth=0)
    elif not all(map(math.isnan, lows + highs)):
        beside = [[max(0.0, y - v) for y, v in zip(ys, lows, strict=True)]]
        beside += [[max(0.0, v - y) for y, v in zip(ys, highs, strict=True)]]
        ax.errorbar(xs, ys, beside, fmt="none", color=color, capsize=3, linewidth=1.2)
    return [x for x, y in zip(xs, ys, strict=True) if not math.isnan(y)]


def _placed(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _ticks(axis: Axis, log: bool, label: str, places: Sequence[float] = ()) -> None:
    """Sets readable ticks: at the places measured where they are few, else at round numbers."""
    ticker: Any = import_module("matplotlib.ticker")
    low, high = axis.get_view_interval()
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: short(value, label)))
    apart = _apart([math.log(x) for x in places] if log else places)
    if len(apart) == len(places) <= 10 and places:
        axis.set_major_locator(ticker.FixedLocator(places))
    elif not log or high < 6 * low:
        axis.set_major_locator(ticker.MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    else:
        subs = (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
        axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=8))


def _apart(places: Sequence[float]) -> list[float]:
    """Those of sorted places that leave room for their labels."""
    found: list[float] = []
    for place in places:
        if not found or place - found[-1] >= (places[-1] - places[0]) / 12:
            found.append(place)
    return found


def _sample(look: Style) -> Any:  # noqa: ANN401
    """An artist: a piece of a line across the whole width, with its marker in the middle."""
    module: Any = import_module("matplotlib.lines")
    return module.Line2D([0, 0.5, 1], [0.5] * 3, markevery=[1], **look.keywords())


def _words(panel: Panel | Bars) -> str:
    """What a panel shows, for those who do not see it."""
    if isinstance(panel, Bars):
        pairs = zip(panel.names, panel.seen, strict=True)
        shown = "; ".join(f"{name}: {seen.median:.4g}" for name, seen in pairs)
        return f"{panel.title}. {panel.x_label}. {shown or 'nothing measured yet'}"
    said = []
    for line in panel.lines:
        points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
        ends = [
            f"{y:.4g} at {short(x, panel.x_label)}"
            for x, y in ([points[0], points[-1]] if points[1:] else points)
        ]
        said.append(f"{line.name}: {' to '.join(ends) or 'nothing measured yet'}")
    return f"{panel.title}. {panel.y_label} by {panel.x_label}. " + "; ".join(said)


def _svg(image: Any, prefix: str, label: str | None) -> str:  # noqa: ANN401
    """A drawing as an SVG element fit to stand in a page: own ids, colours by CSS variables, a label or hidden."""
    buffer = io.BytesIO()
    image.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # The metadata differ with versions; the style sheet would hold for the whole page.
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        if "id" in element.attrib:
            element.set("id", f"{prefix}-{element.get('id')}")
        if _XLINK in element.attrib:  # `href` alone is SVG 2 and HTML
            element.set("href", element.attrib.pop(_XLINK).replace("#", f"#{prefix}-", 1))
        for key in ("style", "clip-path"):
            if key in element.attrib:
                element.set(key, _variables(element.attrib[key].replace("url(#", f"url(#{prefix}-")))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"role": "img", "aria-label": label} if label else {"aria-hidden": "true"})
    ElementTree.register_namespace("", _SVG)
    return ElementTree.tostring(root, encoding="unicode")


def _variables(style: str) -> str:
    """Our colours as CSS variables."""
    names = {INK: "--ink"} | {light: f"--line-{number}" for number, (light, _) in enumerate(COLORS)}
    return re.sub(r"#[0-9a-f]{6}", lambda m: f"var({names[m[0]]}, {m[0]})" if m[0] in names else m[0], style)
