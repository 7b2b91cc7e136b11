"""What a GPU should show, a line for each target: what is wanted, what was measured, and whether it is met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from retnet.bench.implementations import BOTH, FLA, NARROW, WIDE
from retnet.measure.clock import Spread, spread
from retnet.measure.records import seen
from retnet.measure.summary import Summary
from retnet.paper import TRAINED
from retnet.tables import MISSING, Table
from tools.gpu_day.decode import FROM, WANTED
from tools.gpu_day.notebook import Found
from tools.gpu_day.ops import WITH_FLA
from tools.gpu_day.train import LABELS, PAPER_LENGTH

Steps = Mapping[str, Mapping[str, Found]]  # step → part → what it found
FLASH_FROM = 4096  # tokens from which on attention should be slower
OF_PRODUCTS = 0.6  # of the rate of matrix products, for OUT
_, FLASH, OURS = TRAINED


class Seen(NamedTuple):
    """A number, and where it was seen."""

    value: Spread
    where: str


class Target(NamedTuple):
    """One line.

    Attributes:
        what: is measured.
        least: that it should be; above: it must be more than that.
        of: the worst that was seen of it; None where nothing was.
        above: whether it must be more than `least`.
    """

    what: str
    least: float
    of: Callable[[Steps], Seen | None]
    above: bool = False

    def row(self, steps: Steps) -> tuple[str, str, str, str, str]:
        """Of the table."""
        wanted = f"{'>' if self.above else '≥'} {self.least:g}"
        try:
            found = self.of(steps)
        except (KeyError, TypeError, ValueError):  # a record of another version
            found = None
        if found is None:
            return self.what, wanted, "not measured", MISSING, "not known"
        median = found.value.median
        met = median > self.least if self.above else median >= self.least
        return self.what, wanted, found.value.written(), found.where, "yes" if met else "no"


def _worst(found: Iterable[Seen]) -> Seen | None:
    return min(found, key=lambda one: one.value.median, default=None)


def _than_fla(shape: str) -> Callable[[Steps], Seen | None]:
    """The faster of its two kernels, at the length where we are least ahead of it."""

    def of(steps: Steps) -> Seen | None:
        return _ahead(steps, WITH_FLA + shape, (FLA,), 0)

    return of


def _than_flash(width: str) -> Callable[[Steps], Seen | None]:
    def of(steps: Steps) -> Seen | None:
        return _ahead(steps, "256-512", (width,), FLASH_FROM)

    return of


def _ahead(steps: Steps, part: str, names: tuple[str, ...], length: int) -> Seen | None:
    rows = steps.get("ops", {}).get(part, {}).get("rows", ())
    return _worst(
        Seen(seen(row, "times_ours"), f"{row['name']}, T {row['length']:,}")
        for row in rows
        if row["name"].startswith(names) and row["mode"] == BOTH and row["length"] >= length
    )


def _out(steps: Steps) -> Seen | None:
    rows = steps.get("ops", {}).get("kernels", {}).get("rows", ())
    return _worst(
        Seen(seen(row, "of_products"), f"{row['kernel']}, K {row['key_dim']}, V {row['value_dim']}")
        for row in rows
        if row["kernel"].startswith("OUT") and row["key_dim"] == 256
    )


def _step(steps: Steps) -> Seen | None:
    rows = steps.get("decode", {}).get("steps", {}).get("steps", ())
    return _worst(
        Seen(seen(row, "of_bandwidth"), f"batch {row['batch']}, K {row['key_dim']}, V {row['value_dim']}")
        for row in rows
        if row["batch"] >= FROM
    )


def _training(label: str, key: str) -> Callable[[Steps], Seen | None]:
    """How many times what we take the Transformer takes: seconds, round by round, or bytes."""

    def of(steps: Steps) -> Seen | None:
        rows = steps.get("train", {}).get(label, {}).get("rows", ())
        at = {row["kind"]: row for row in rows if row["length"] == PAPER_LENGTH and key in row}
        if not {FLASH, OURS} <= at.keys():
            return None
        pairs = zip(
            *(x if isinstance(x, list) else [x] for x in (at[FLASH][key], at[OURS][key])), strict=True
        )
        return Seen(spread(theirs / ours for theirs, ours in pairs), f"T {PAPER_LENGTH:,}")

    return of


TARGETS = (
    Target("times as fast as flash-linear-attention, forward + backward, K 256, V 512", 3.0, _than_fla("256-512")),
    *(
        Target(f"the same, K = V = {n}", 1.0, _than_fla(f"{n}-{n}"), above=True)
        for n in (64, 128)
    ),
    Target(
        f"times as fast as FlashAttention, H·K wide, forward + backward, K 256, V 512, from {FLASH_FROM:,} tokens",
        1.0,
        _than_flash(NARROW),
        above=True,
    ),
    Target("the same, H·V wide", 1.0, _than_flash(WIDE), above=True),
    Target("rate of OUT ÷ rate of matrix products, K 256, the slowest of its passes", OF_PRODUCTS, _out),
    Target(f"share of the bandwidth that the decoding step reaches, from batch {FROM}", WANTED, _step),
    *(
        Target(
            f"training, {label}: {what} of Transformer + FlashAttention ÷ RetNet's", 1.0, _training(label, key), above=True
        )
        for label in LABELS
        for what, key in (("time", "seconds"), ("memory", "peak_bytes"))
    ),
)  # fmt: skip


def summarise(steps: Steps) -> Summary:
    """A line for each target, and whether the kernels are right at all."""
    rows = [_right(steps), *(target.row(steps) for target in TARGETS)]
    met, known = (sum(row[-1] in words for row in rows) for words in (("yes",), ("yes", "no")))
    columns = ("target", "wanted", "measured, at worst", "where", "met")
    notes = ("Median (least..greatest) over rounds; where several sizes count, the worst of them.",)
    findings = [
        f"{met} of {len(rows)} targets are met, {known - met} are not, {len(rows) - known} were not measured."
    ]
    if rows[0][-1] == "no":
        findings.append("A kernel is wrong: no speed of it counts before that is mended.")
    return Summary((Table("Targets", columns, tuple(rows), notes),), (), tuple(findings))


def _right(steps: Steps) -> tuple[str, str, str, str, str]:
    what, parts = "cases that are wrong against fp64", steps.get("verify", {})
    cases = sum(found.get("cases", 0) for found in parts.values())
    if not cases:
        return what, "0", "not measured", MISSING, "not known"
    wrong = {name: len(found.get("wrong", ())) for name, found in parts.items() if found.get("wrong")}
    where = ", ".join(f"{name} {count}" for name, count in wrong.items()) or MISSING
    return what, "0", f"{sum(wrong.values())} of {cases:,}", where, "no" if wrong else "yes"
