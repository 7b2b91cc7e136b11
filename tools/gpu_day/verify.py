"""The step ``verify``: every kernel against fp64 on the card itself, in several processes, for kernels compile slowly.

What is wrong is listed with the smallest case that still fails.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import random
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from threading import Lock, Timer
from typing import Any

import torch

from retnet.measure.memory import free_memory
from retnet.measure.summary import Summary
from retnet.ops.triton import tile_table
from retnet.settings import UserError
from retnet.tables import MISSING, Table
from tools.gpu_day.cases import Answer, Case
from tools.gpu_day.notebook import Found
from tools.gpu_day.place import Place, Run

HEADS = ((64, 128), (128, 256), (256, 512))
TYPES = ("bfloat16", "float16", "float32")
SIZES = ((16, 32, 60, 100, 128, 256), (16, 33, 100, 128, 300, 512))
WORKERS = 8
CASE_SECONDS = 150.0  # a case may take, the compilation of its kernels in it
SMALLER = 24  # smaller cases tried for each that fails
ENDLESS = 100_000  # cases, more than anybody can check in a day
NO_MORE = 5  # failing cases that smaller ones are looked for of


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
        yield base(K=K, V=V, dtype=dtype, B=2, T=600)
        lengths = [0, 257, 1, 42]
        yield base(K=K, V=V, dtype=dtype, T=300, lengths=lengths, state=True, keep=True)


def layouts() -> Iterator[Case]:
    """Everything that changes addresses, and nothing that changes sizes of heads."""
    for T in (1, 2, 15, 16, 17, 127, 128, 129, 255, 256, 257, 1000):
        yield base(T=T, state=True, dtype="float32" if T % 2 else "bfloat16")
    for lengths in ([600], [1] * 20, [0, 0, 300, 0], [31, 256, 1, 512, 0, 90]):
        yield base(T=sum(lengths), lengths=lengths, state=True, dtype="float32")
    for layout in ("heads first", "slice", "every second"):
        yield base(layout=layout, state=True, dtype="float32")
        yield base(layout=layout, K=256, V=512)
    for gammas in ([1.0], [1e-3], [1 - 2**-12], [0.5, 1.0]):
        yield base(gammas=gammas, T=700, state=True, dtype="float32")
    for chunk in (16, 48, 64, 512):
        yield base(chunk=chunk, T=530, state=True, dtype="float32")
        yield base(chunk=chunk, T=530, K=256, V=512, keep=True)
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
    """K from 16 to 256 and V from 16 to 512, odd ones among them."""
    for number, (K, V) in enumerate(itertools.product(*SIZES)):
        yield base(K=K, V=V, dtype=TYPES[number % 3], state=number % 2 == 0)


def foreign(place: Place) -> Iterator[Case]:
    """The tiles of the other architectures in the table."""
    from retnet.ops.triton.capability import architecture

    own = architecture(place.device)
    for name, (K, V) in itertools.product(tile_table.TABLES, HEADS):
        if name != own:
            yield base(K=K, V=V, tiles=name)


def anything(seed: int) -> Iterator[Case]:
    """Whatever comes, for ever."""
    dice = random.Random(seed)
    while True:
        lengths = [dice.randrange(200) for _ in range(dice.randrange(1, 6))] if dice.random() < 0.4 else None
        T = sum(lengths) if lengths else dice.randrange(1, 700)
        K, V = (dice.choice((16, 24, 32, 64, 128)) for _ in range(2))
        yield base(
            K=K, V=V, T=T, B=1 if lengths else dice.randrange(1, 4), H=dice.randrange(1, 5), lengths=lengths,
            dtype=dice.choice(TYPES), chunk=dice.choice((None, None, 16, 48, 128)), state=dice.random() < 0.5,
            keep=dice.random() < 0.5, gammas=[dice.choice((1.0, 0.99, dice.random() or 1.0))], seed=dice.randrange(2**30),
            layout=dice.choice(("plain", "plain", "heads first", "slice")),
        )  # fmt: skip


def far(place: Place) -> Iterator[Case]:
    """Beyond 2³¹ numbers."""
    yield {
        "kind": "far",
        "H": 8,
        "K": 256,
        "V": 512,
        "T": (2**31 // 4096 + 8000),
        "seed": secrets.randbits(30),
    }


class Worker:
    """A process that checks one case after the other, and another one when it has died."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process: subprocess.Popen[str] | None = None

    def ask(self, case: Case) -> Answer:
        """What comes of a case."""
        process = self._process
        if process is None or process.poll() is not None:
            words = [sys.executable, "-m", "tools.gpu_day.cases", self._device.type]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        assert process.stdin is not None
        assert process.stdout is not None
        late = Timer(CASE_SECONDS, process.kill)
        late.start()
        try:
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late.cancel()
        if line:
            found: Answer = json.loads(line)
            return found
        status = process.wait()
        return {"failed": f"the process died with status {status}, or took more than {CASE_SECONDS:g} s"}

    def end(self) -> None:
        """No more cases."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@cache
def _workers(device: torch.device, count: int) -> list[Worker]:
    """Those of all parts of a step, ended with it."""
    workers = [Worker(device) for _ in range(count)]
    for worker in workers:
        atexit.register(worker.end)
    return workers


def check(place: Place, cases: Iterator[Case], most: int | None = None) -> Found:
    """Checks cases until they or the time of the part are used up; what was found, as plain data."""
    if find_spec("pytest") is None:
        raise UserError("the comparisons of the tests need pytest, which is not installed")
    until = time.time() + 60 * place.minutes
    if most is not None:
        cases = itertools.islice(cases, most)
    if place.rehearsal:
        cases = map(tiny, itertools.islice(cases, 1 if most is None else most))
    count = 1 if place.rehearsal else max(1, min(WORKERS, (os.cpu_count() or 2) // 2))
    lock, answers, missed = Lock(), [], 0

    def work(worker: Worker) -> None:
        nonlocal missed
        while True:
            with lock:
                case = next(cases, None)
                if case is None:
                    return
                if time.time() > until:
                    missed += 1 + (0 if most == ENDLESS else sum(1 for _ in cases))
                    return
            found = worker.ask(case)
            with lock:
                answers.append((case, found))

    workers = _workers(place.device, count)
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, workers))
    wrong = [(case, found) for case, found in answers if faults(found)]
    listed = [
        {"case": case, **found, "faults": faults(found), **_smallest(workers[0], case, until, number)}
        for number, (case, found) in enumerate(wrong)
    ]
    refused = [{"case": case, **found} for case, found in answers if "refused" in found]
    return {
        "cases": len(answers),
        "missed": missed,
        "right": len(answers) - len(wrong) - len(refused),
        "refused": refused,
        "wrong": listed,
        "worst": _worst(answers),
    }


def faults(found: Answer) -> list[str]:
    """What is wrong with an answer, each a name and its numbers; nothing if it is right or was refused."""
    if "failed" in found:
        return [found["failed"]]
    allowed = found.get("allowed")
    return [
        f"{name}: {error:.2e}, allowed {limit:.0e}"
        for name, error in found.get("errors", {}).items()
        if not error <= (limit := allowed[name] if isinstance(allowed, dict) else allowed)
    ]


def _worst(answers: Sequence[tuple[Case, Answer]]) -> dict[str, float]:
    """Type → the largest error of any right or wrong case of it."""
    worst: dict[str, float] = {}
    for case, found in answers:
        for error in found.get("errors", {}).values():
            kind = case.get("dtype", "contracts and models")
            worst[kind] = max(worst.get(kind, 0.0), error)
    return worst


def smaller(case: Case) -> Iterator[Case]:
    """Cases like this one, each simpler by one thing."""
    for name, least in (("T", 1), ("B", 1), ("H", 1), ("K", 16), ("V", 16)):
        if case.get("lengths") and name == "T":
            continue
        value = case.get(name, least)
        for less in (least, value // 2, value - 1):
            if least <= less < value:
                cuts = (
                    [cut for cut in case.get("cuts", []) if cut < less]
                    if name == "T"
                    else case.get("cuts", [])
                )
                yield {**case, name: less, **({"cuts": cuts} if cuts else {})}
    if lengths := case.get("lengths"):
        for n in range(len(lengths)):
            rest = [*lengths[:n], *lengths[n + 1 :]]
            if sum(rest):
                yield {**case, "lengths": rest, "T": sum(rest)}
    for name, plain in (
        ("state", False),
        ("keep", False),
        ("layout", "plain"),
        ("chunk", None),
        ("form", "chunkwise"),
    ):
        if case.get(name, plain) != plain:
            yield {**case, name: plain}


def _smallest(worker: Worker, case: Case, until: float, number: int) -> Found:
    """The simplest case found that is still wrong."""
    if case["kind"] != "op" or number >= NO_MORE:
        return {}
    tried, best, found = 0, case, True
    while found and tried < SMALLER and time.time() < until + 30:
        found = False
        for other in smaller(best):
            tried += 1
            if faults(worker.ask(other)):
                best, found = other, True
                break
            if tried >= SMALLER:
                break
    return {"smallest": best}


def run_far(place: Place) -> Found:
    """Beyond 2³¹ numbers, where the memory for it is."""
    need, have = 48 * 2**30, free_memory(place.device)
    if not place.rehearsal and have < need:
        return {"cases": 0, "skipped": f"takes about {need >> 30} GiB, and {have >> 30} are free"}
    return check(place, far(place), 1)


PARTS: dict[str, Run] = {
    "heads": lambda place: check(place, heads()),
    "layouts": lambda place: check(place, layouts()),
    "step": lambda place: check(place, step()),
    "rows": lambda place: check(place, rows()),
    "torch": lambda place: check(place, contracts(), 4),
    "far": run_far,
    "sizes": lambda place: check(place, sizes()),
    "tiles": lambda place: check(place, foreign(place)),
    "fuzz": lambda place: check(place, anything(secrets.randbits(30)), 2 if place.rehearsal else ENDLESS),
}


def _written(error: float | None) -> str:
    """An error as text; JSON has no word for what is no number, and holds nothing instead."""
    return "no number" if error is None else f"{error:.1e}"


def shown(case: Case) -> str:
    """A case in a line."""
    return ", ".join(f"{key} {value}" for key, value in case.items() if value not in (None, False, []))


def summarise(parts: dict[str, Found]) -> Summary:
    """How many cases were right, the worst errors, and what is wrong."""
    rows = tuple(
        (
            name,
            f"{found['cases']:,}",
            f"{found.get('right', 0):,}",
            f"{len(found.get('wrong', [])):,}",
            f"{len(found.get('refused', [])):,}",
            f"{found.get('missed', 0):,}",
            "; ".join(f"{kind} {_written(error)}" for kind, error in found.get("worst", {}).items())
            or MISSING,
        )
        for name, found in parts.items()
    )
    columns = (
        "part",
        "cases",
        "right",
        "wrong",
        "do not fit this card",
        "not reached",
        "largest error, relative to fp64",
    )
    tables = [Table("Against fp64", columns, rows)]
    wrong = [(name, each) for name, found in parts.items() for each in found.get("wrong", [])]
    if wrong:
        listed = tuple(
            (name, "; ".join(each["faults"][:3]), shown(each.get("smallest") or each["case"]))
            for name, each in wrong
        )
        tables.append(Table("What is wrong", ("part", "error", "smallest case that fails"), listed))
    cases = sum(found["cases"] for found in parts.values())
    findings = [f"{cases:,} cases were checked against fp64, {len(wrong)} of them are wrong."]
    if missed := sum(found.get("missed", 0) for found in parts.values()):
        findings.append(
            f"{missed:,} cases were not reached in the time of their parts; --only verify in another --out checks them."
        )
    findings += [f"{name}: {found['skipped']}." for name, found in parts.items() if "skipped" in found]
    return Summary(tuple(tables), (), tuple(findings))
