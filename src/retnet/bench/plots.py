"""Pictures of the records of `retnet bench`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retnet.measure import peers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP*X<>"

Record = dict[str, Any]
Panel = Callable[[Record, "Axes"], None]


def draw(record: Record, path: Path) -> None:
    """Draws a record, finished by `report.complete`, to a PNG file.

    Raises:
        UserError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    (module,) = peers.need("matplotlib.figure")  # no pyplot: neither a display nor global state is wanted
    panels = _panels(record)
    wide = min(len(panels), 3)
    high = -(-len(panels) // wide)
    figure = module.Figure(figsize=(6 * wide if wide > 1 else 8, 5 * high), layout="constrained")
    axes = list(figure.subplots(high, wide, squeeze=False).flat)
    for panel, ax in zip(panels, axes, strict=False):
        panel(record, ax)
        ax.grid(alpha=0.3)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    about = record["host"]
    figure.suptitle(
        f"{about['cpu']}, {about['threads']} threads, torch {about['versions']['torch']}, {record['date'][:10]}: "
        "medians over rounds, bars from the least to the greatest",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def _panels(record: Record) -> list[Panel]:
    if "steps" in record:
        shapes = _groups(record["rows"], "heads", "key_dim", "value_dim")
        return [*(partial(_op_times, shape) for shape in shapes), _op_rates, _steps]
    panels: list[Panel] = [_rates, _of_limit, _op] if "op" in record else [_decoding]
    if "throughput" in record:
        panels.append(_throughput)
    return [*panels, _long] if record.get("long") else panels


def _rates(record: Record, ax: Axes) -> None:
    _by_length(record, ax, "tokens_per_s")
    ax.set_title("Training steps")
    ax.set_ylabel("tokens per second")


def _of_limit(record: Record, ax: Axes) -> None:
    _by_length(record, ax, "of_limit")
    ax.set_title("Beside the machine's matrix products")
    ax.set_ylabel("model flops ÷ fp32 products")


def _by_length(record: Record, ax: Axes, key: str) -> None:
    for marker, ((name,), rows) in zip(MARKERS, _groups(record["rows"], "name").items(), strict=False):
        line = "-" if len(rows) > 1 else "none"
        lengths = [row["length"] for row in rows]
        _line(ax, lengths, [row[key] for row in rows], label=name, marker=marker, ls=line)
    _token_axis(ax, {row["length"] for row in record["rows"]})
    ax.set_ylim(bottom=0)
    ax.set_xlabel("tokens of a sequence (equal tokens a step)")
    ax.legend()


def _op(record: Record, ax: Axes) -> None:
    rows = record["op"]["rows"]
    medians = [row["seconds"]["median"] * 1e3 for row in rows]
    bars = ax.barh([row["name"].replace(", ", ",\n") for row in rows], medians)
    ax.bar_label(bars, [f"{m:.3g}" for m in medians], padding=3)
    ax.set_xlim(0, 1.15 * max(medians))
    ax.invert_yaxis()
    ax.set_title(f"The op alone, T {record['op']['shape']['T']:,}")
    ax.set_xlabel("milliseconds, forward + backward")


def _op_times(shape: tuple[int, int, int], record: Record, ax: Axes) -> None:
    """Forward + backward of every contender, by length."""
    rows = _groups(record["rows"], "heads", "key_dim", "value_dim")[shape]
    both = [row for row in rows if row["mode"] == "forward + backward"]
    for marker, ((name,), line) in zip(MARKERS, _groups(both, "name").items(), strict=False):
        lengths = [row["length"] for row in line]
        style = "-" if len(line) > 1 else "none"
        _line(
            ax, lengths, [row["seconds_per_token"] for row in line], 1e6, label=name, marker=marker, ls=style
        )
    _token_axis(ax, {row["length"] for row in both})
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.set_title("Forward + backward, H {}, K {}, V {}".format(*shape))
    ax.set_xlabel("tokens of a sequence")
    ax.set_ylabel("microseconds per token")
    ax.legend(fontsize=8)


def _op_rates(record: Record, ax: Axes) -> None:
    """Ours beside the matrix products, by length."""
    ours = [row for row in record["rows"] if row["name"] == record["rows"][0]["name"]]
    lines = _groups(ours, "heads", "key_dim", "value_dim", "mode").items()
    for marker, ((*shape, mode), rows) in zip(MARKERS, lines, strict=False):
        label = "H {}, K {}, V {}, {}".format(*shape, mode)
        style = "--" if mode == "forward" else "-"
        _line(
            ax,
            [r["length"] for r in rows],
            [r["of_torch_mm"] for r in rows],
            label=label,
            marker=marker,
            ls=style,
        )
    _token_axis(ax, {row["length"] for row in ours})
    ax.set_ylim(bottom=0)
    ax.set_title("Our op beside the machine's matrix products")
    ax.set_xlabel("tokens of a sequence")
    ax.set_ylabel("flops ÷ products by torch.mm")
    ax.legend(fontsize=8)


def _steps(record: Record, ax: Axes) -> None:
    rows = [row for row in record["steps"] if row["cold"]]
    shares = [row["of_bandwidth"] for row in rows]
    medians = [share["median"] for share in shares]
    beside = [[abs(share["median"] - share[end]) for share in shares] for end in ("low", "high")]
    names = [f"{row['name']}\nB {row['batch']}: {m:.2f}" for row, m in zip(rows, medians, strict=True)]
    ax.barh([name.replace(", ", ",\n") for name in names], medians, xerr=beside, capsize=3, color="C7")
    ax.axvline(1.0, color="black", ls=":")
    ax.invert_yaxis()
    ax.set_title("A step of decoding, H {heads}, K {key_dim}, V {value_dim}".format(**rows[0]))
    ax.set_xlabel("bytes of the state, in and out ÷ bandwidth of an update")


def _decoding(record: Record, ax: Axes) -> None:
    names = list(_groups(record["rows"], "name"))
    for marker, ((name, batch), rows) in zip(
        MARKERS, _groups(record["rows"], "name", "batch").items(), strict=False
    ):
        contexts, color = [row["context"] for row in rows], f"C{names.index((name,))}"
        seconds = [row["seconds_per_step"] for row in rows]
        line = "-" if batch == 1 else "--"
        _line(
            ax,
            contexts,
            seconds,
            scale=1e3,
            label=f"{name}, batch {batch}",
            marker=marker,
            color=color,
            ls=line,
        )
        if batch == 1:
            floors = [row["floor_seconds"]["median"] * 1e3 for row in rows]
            ax.plot(contexts, floors, color=color, ls=":", label=f"{name}, batch 1: memory floor")
    _token_axis(ax, {row["context"] for row in record["rows"]})
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_title("Decoding, one token a sequence")
    ax.set_xlabel("tokens of context")
    ax.set_ylabel("milliseconds per step")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.5)  # room for the legend
    ax.legend(loc="upper left", ncols=2, fontsize=9)


def _throughput(record: Record, ax: Axes) -> None:
    """Tokens written per second after each context, fp32 drawn through, 8 bits dashed."""
    rows = [row for row in record["throughput"]["rows"] if row["work"] == "write"]
    names = list(_groups(rows, "name"))
    for (name, weights), line in _groups(rows, "name", "weights").items():
        place = names.index((name,))
        _line(
            ax,
            [row["tokens"] for row in line],
            [row["tokens_per_s"] for row in line],
            label=f"{name}, {weights}",
            marker=MARKERS[place],
            color=f"C{place}",
            ls="-" if weights == "fp32" else "--",
        )
    _token_axis(ax, {row["tokens"] for row in rows})
    ax.set_ylim(bottom=0)
    ax.set_title(f"Writing one sequence, {record['throughput']['parameters'] / 1e6:.0f} M parameters")
    ax.set_xlabel("tokens of context")
    ax.set_ylabel("tokens per second")
    ax.legend(fontsize=8)


def _long(record: Record, ax: Axes) -> None:
    marks = record["long"]["marks"]
    tokens = [mark["token"] for mark in marks]
    _line(ax, tokens, [mark["ratio_to_first"] for mark in marks], label="time per token", marker="o")
    memory = [mark["rss_bytes"] / marks[0]["rss_bytes"] for mark in marks]
    ax.plot(tokens, memory, marker="s", ls="--", label="resident memory")
    ax.set_xscale("log")
    ax.set_ylim(0, 1.5)
    ax.set_title(f"One generation, {record['long']['parameters'] / 1e6:.1f} M parameters")
    ax.set_xlabel("tokens generated")
    ax.set_ylabel(f"relative to token {tokens[0]}")
    ax.legend(loc="lower left")


def _groups(rows: Sequence[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _line(
    ax: Axes, places: Sequence[float], values: Sequence[Mapping[str, float]], scale: float = 1.0, **style: str
) -> None:
    """A line through medians, with bars from the least to the greatest."""
    medians = [v["median"] * scale for v in values]
    below = [(v["median"] - v["low"]) * scale for v in values]
    above = [(v["high"] - v["median"]) * scale for v in values]
    ax.errorbar(places, medians, [below, above], capsize=3, **style)  # type: ignore[arg-type]


def _token_axis(ax: Axes, places: set[int]) -> None:
    """A logarithmic axis whose only labels are the places measured."""
    ax.set_xscale("log", base=2)
    ax.minorticks_off()
    labels = {p: f"{p // 1024}k" if p % 1024 == 0 else f"{p}" for p in sorted(places)}
    ax.set_xticks(list(labels), list(labels.values()))
