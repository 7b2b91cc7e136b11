"""The step ``verify``: every kernel against fp64 on the card itself, in several processes, for kernels compile slowly.

What is wrong is listed with the smallest case that still fails.
"""

from __future__ import annotations

import itertools
import random
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from itertools import chain
from typing import Any

from retnet.measure.memory import free_memory
from retnet.measure.summary import Summary
from retnet.ops.triton import tile_table
from retnet.settings import UserError
from retnet.tables import MISSING, Table
from tools.gpu_day.cases import Case
from tools.gpu_day.checks import MARGIN, Checks, group_of, patience
from tools.gpu_day.notebook import Found
from tools.gpu_day.place import Place, Run, StoppedError

HEADS = ((64, 128), (128, 256), (256, 512))
TYPES = ("bfloat16", "float16", "float32")
FINE = ("bfloat16", "float32")  # where addresses are looked at: types and addresses do not meet in a kernel
NOTES = (
    "heads: the head shapes of the tile table in every type; layouts: all that changes addresses; step: decoding; rows: "
    "rotation, norm, a whole model; torch: opcheck, one graph, CUDA graphs, export; tiles: those of other architectures; "
    "sizes: K 16 to 256, V 16 to 512; far: beyond 2³¹ numbers; fuzz: anything.",
)
SIZES = ((16, 17, 33, 60, 100, 128, 256), (16, 33, 100, 128, 300, 512))
REHEARSED = {"torch": 4, "fuzz": 2}  # cases of a group in a rehearsal; of all others one


def base(**values: Any) -> Case:  # noqa: ANN401
    """A case of the op."""
    plain = {"kind": "op", "B": 1, "T": 300, "H": 2, "K": 64, "V": 128, "dtype": "bfloat16", "state": False}
    return {**plain, "seed": secrets.randbits(30), **values}


def tiny(case: Case) -> Case:
    """The same case, small enough for the interpreter."""
    T = 1200 if case["kind"] == "far" else min(case.get("T", 40), 40)
    small = {"K": 16, "V": 32, "T": T, "H": 1, "d_model": 64}
    changed = {key: value for key, value in small.items() if key in case}
    if case.get("lengths"):
        changed |= {"lengths": [0, 1, 20], "T": 21}
    if case.get("cuts"):
        changed |= {"cuts": [7, 8]}
    if (case.get("chunk") or 16) > 16:
        changed |= {"chunk": 16}
    return {**case, **changed}


def heads() -> Iterator[Case]:
    """The head shapes that the table is made for, in every type, forward and backward, from nothing and from a state."""
    for (K, V), dtype in itertools.product(HEADS, TYPES):
        yield from of_heads(K, V, dtype)


def of_heads(K: int, V: int, dtype: str, **more: Any) -> Iterator[Case]:  # noqa: ANN401
    """Rows and packed documents at one head shape, from nothing and from a state, with states kept or made anew."""
    yield base(K=K, V=V, dtype=dtype, B=2, T=600, **more)
    yield base(K=K, V=V, dtype=dtype, T=300, lengths=[0, 257, 1, 42], state=True, keep=True, **more)


def layouts() -> Iterator[Case]:
    """Everything that changes addresses, and nothing that changes sizes of heads."""
    for T, dtype in itertools.product((1, 2, 15, 16, 17, 127, 128, 129, 255, 256, 257, 1000), FINE):
        yield base(T=T, state=True, dtype=dtype)
    for lengths, dtype in itertools.product(
        ([600], [1] * 20, [0, 0, 300, 0], [31, 256, 1, 512, 0, 90]), FINE
    ):
        yield base(T=sum(lengths), lengths=lengths, state=True, dtype=dtype)
    for layout, state in itertools.product(("heads first", "slice", "every second"), (False, True)):
        yield base(layout=layout, state=state, dtype="float32")
        yield base(layout=layout, state=state, K=256, V=512)
    for gammas in ([1.0], [1e-3], [1 - 2**-12], [0.5, 1.0]):
        yield base(gammas=gammas, T=700, state=True, dtype="float32")
    for chunk, keep in itertools.product((16, 48, 64, 512), (False, True)):
        yield base(chunk=chunk, T=530, state=keep, keep=keep, dtype="float32")
        yield base(chunk=chunk, T=530, state=not keep, keep=keep, K=256, V=512)
    yield base(form="parallel", dtype="float32", T=530)
    yield base(form="parallel", K=256, V=512, T=530)
    for cuts in ([1], [255, 256], [100, 101, 290]):
        yield base(cuts=cuts, state=True, dtype="float32")
    yield base(B=3, H=5, T=270, keep=True, state=True)


def step() -> Iterator[Case]:
    """The decoding step."""
    for (K, V), dtype, T in itertools.product((*HEADS, (60, 100), (1, 3), (256, 1024)), TYPES, (1, 3)):
        yield {**base(K=K, V=V, dtype=dtype, B=5, T=T), "kind": "step"}


def rows() -> Iterator[Case]:
    """The kernels around retention, and all of them together in a model."""
    for K, dtype, layout in itertools.product((64, 60, 256), TYPES, ("interleaved", "halves")):
        yield {**base(K=K, dtype=dtype, B=2, T=70), "kind": "rotary", "layout": layout}
    for V, dtype, name in itertools.product((128, 512, 100), TYPES, ("group", "rms", "none")):
        yield {**base(V=V, dtype=dtype, B=2, T=70), "kind": "norm", "norm": name}
    for d_model in (128, 200, 512):
        yield {"kind": "model", "d_model": d_model, "T": 300, "seed": secrets.randbits(30)}


def contracts() -> Iterator[Case]:
    """What torch asks of an operator."""
    for name in ("opcheck", "compile", "graphs", "export"):
        yield {"kind": "contract", "name": name}


def sizes() -> Iterator[Case]:
    """K from 16 to 256 and V from 16 to 512, odd ones among them.

    Types, with and without a state, make a Latin square over them that begins elsewhere every time: each of the six stands
    beside every K, and beside every V.
    """
    shift, found = secrets.randbelow(6), []
    for (i, K), (j, V) in itertools.product(*map(enumerate, SIZES)):
        turn = (i + j + shift) % 6
        found.append(base(K=K, V=V, dtype=TYPES[turn % 3], state=turn % 2 == 0))
    secrets.SystemRandom().shuffle(found)  # what there is no time for is not always the same
    yield from found


def foreign(place: Place) -> Iterator[Case]:
    """The tiles of the other architectures in the table."""
    from retnet.ops.triton.capability import architecture

    own = tile_table.family(architecture(place.device))
    for name, (K, V) in itertools.product(tile_table.TABLES, HEADS):
        if name != own:
            yield base(K=K, V=V, tiles=name)


def anything(seed: int) -> Iterator[Case]:
    """Whatever comes, for ever."""
    dice = random.Random(seed)
    while True:
        lengths = [dice.randrange(200) for _ in range(dice.randrange(1, 6))] if dice.random() < 0.4 else None
        T = sum(lengths) if lengths else dice.randrange(1, 700)
        K, V = (dice.choice((16, 17, 24, 32, 33, 64, 128)) for _ in range(2))
        yield base(
            K=K, V=V, T=T, B=1 if lengths else dice.randrange(1, 4), H=dice.randrange(1, 5), lengths=lengths,
            dtype=dice.choice(TYPES), chunk=dice.choice((None, None, 16, 48, 128)), state=dice.random() < 0.5,
            keep=dice.random() < 0.5, gammas=[dice.choice((1.0, 0.99, dice.random() or 1.0))], seed=dice.randrange(2**30),
            layout=dice.choice(("plain", "plain", "heads first", "slice")),
        )  # fmt: skip


def far() -> Iterator[Case]:
    """Beyond 2³¹ numbers."""
    yield {
        "kind": "far",
        "H": 8,
        "K": 256,
        "V": 512,
        "T": (2**31 // 4096 + 8000),
        "seed": secrets.randbits(30),
    }


def check(place: Place, cases: Iterator[Case], *, endless: bool = False) -> Found:
    """Checks cases, or those that the last attempt missed, as long as the part may take; plain data.

    Random ones, which have no end, are checked for as long as was planned; of others, each has its full time.

    Raises:
        UserError: the comparisons cannot be imported.
        StoppedError: there was no time for some; the next attempt goes on with them.
    """
    if find_spec("pytest") is None:
        raise UserError("the comparisons of the tests need pytest, which is not installed")
    missed = None if endless else place.before().get("missed")
    # none were missed: all are in the record already
    some: Iterable[Case] = cases if missed is None else missed
    if place.rehearsal:
        some = _some_of_each(some)
    planned, last = time.time() + 60 * place.minutes, place.ended - MARGIN - patience(place)
    checks = Checks(place, some if endless and not place.rehearsal else list(some), place.note)
    found = checks.run(planned if endless else max(planned, last))
    if found["missed"]:
        raise StoppedError(f"{len(found['missed'])} of its cases were not reached")
    return found


def _some_of_each(cases: Iterable[Case]) -> Iterator[Case]:
    """For a rehearsal: some of each group, tiny; of cases without an end, there is one group."""
    seen: Counter[str] = Counter()
    for case in cases:
        seen[group_of(case)] += 1
        if seen[group_of(case)] <= REHEARSED.get(group_of(case), 1):
            yield tiny(case)
        elif group_of(case) == "fuzz":
            return


def grouped(**groups: Iterable[Case]) -> Iterator[Case]:
    """All cases, each with the name of its group."""
    for name, cases in groups.items():
        for case in cases:
            yield {**case, "of": name}


def run_far(place: Place) -> Found:
    """Beyond 2³¹ numbers, where the memory for it is."""
    need, have = 48 * 2**30, free_memory(place.device)
    if not place.rehearsal and have < need:
        return {"cases": 0, "skipped": f"takes about {need >> 30} GiB, and {have >> 30} are free"}
    return check(place, grouped(far=far()))


# what takes longest comes first, so that no process works on it while all others have nothing left to do
PARTS: dict[str, Run] = {
    "kernels": lambda place: check(
        place, grouped(heads=heads(), rows=rows(), layouts=layouts(), step=step())
    ),
    "shapes": lambda place: check(place, grouped(torch=contracts(), tiles=foreign(place), sizes=sizes())),
    "far": run_far,
    "fuzz": lambda place: check(place, grouped(fuzz=anything(secrets.randbits(30))), endless=True),
}


def joined(attempts: Sequence[Found]) -> Found:
    """What all attempts at a part have checked; the last one knows what is still missed."""
    found = dict(attempts[-1])
    for name in ("cases", "right"):
        found[name] = sum(one.get(name, 0) for one in attempts)
    for name in ("wrong", "refused"):
        found[name] = [each for one in attempts for each in one.get(name, ())]
    groups = [one.get("groups", {}) for one in attempts]
    found["groups"] = {
        name: _together([one[name] for one in groups if name in one])
        for name in dict.fromkeys(chain(*groups))
    }
    return found


def _together(groups: Sequence[Found]) -> Found:
    """A group in several attempts."""
    worst: dict[str, float | None] = {}
    for kind in dict.fromkeys(chain(*(one["worst"] for one in groups))):
        errors = [one["worst"][kind] for one in groups if kind in one["worst"]]
        worst[kind] = None if None in errors else max(errors)  # None: JSON has no word for infinity
    return {**{name: sum(one[name] for one in groups) for name in ("cases", "right")}, "worst": worst}


def _written(error: float | None) -> str:
    """An error as text; JSON has no word for what is no number, and holds nothing instead."""
    return "no number" if error is None else f"{error:.1e}"


def shown(case: Case) -> str:
    """A case in a line."""
    return ", ".join(f"{key} {value}" for key, value in case.items() if value not in (None, False, []))


def _rows(found: Found) -> Iterator[tuple[str, ...]]:
    """A line for each group of cases of a part, those that nothing is known of yet among them."""
    others = {
        key: Counter(group_of(each.get("case", each)) for each in found.get(key, ()))
        for key in ("wrong", "refused", "missed")
    }
    known = found.get("groups", {})
    for name in dict.fromkeys([*known, *others["missed"]]):
        group = known.get(name, {"cases": 0, "right": 0, "worst": {}})
        counts = (group["cases"], group["right"], *(count[name] for count in others.values()))
        errors = "; ".join(f"{kind} {_written(error)}" for kind, error in group["worst"].items())
        yield name, *(f"{count:,}" for count in counts), errors or MISSING


def summarise(parts: dict[str, Found]) -> Summary:
    """How many cases were right, the worst errors, and what is wrong."""
    columns = (
        "what",
        "cases",
        "right",
        "wrong",
        "do not fit this card",
        "not reached",
        "largest error, relative to fp64",
    )
    rows = tuple(row for found in parts.values() for row in _rows(found))
    tables = [Table("Against fp64", columns, rows, NOTES)]
    wrong = [each for found in parts.values() for each in found.get("wrong", [])]
    if wrong:
        listed = tuple(
            (
                group_of(each["case"]),
                "; ".join(each["faults"][:3]),
                shown(each.get("smallest") or each["case"]),
            )
            for each in wrong
        )
        tables.append(Table("What is wrong", ("what", "error", "smallest case that fails"), listed))
    cases = sum(found["cases"] for found in parts.values())
    findings = [f"{cases:,} cases were checked against fp64, {len(wrong)} of them are wrong."]
    if missed := sum(len(found.get("missed", ())) for found in parts.values()):
        findings.append(
            f"{missed:,} cases were not reached in the time of their parts; the same command goes on with them."
        )
    findings += [f"{name}: {found['skipped']}." for name, found in parts.items() if "skipped" in found]
    return Summary(tuple(tables), (), tuple(findings))
