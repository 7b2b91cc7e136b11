"""Runs cases in several processes, notes what is wrong as it is found, and looks for the smallest case that still fails."""

from __future__ import annotations

import atexit
import itertools
import json
import math
import os
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from threading import Lock

import torch

from tools.gpu_day.cases import CARD_LOST, Answer, Case
from tools.gpu_day.notebook import Found
from tools.gpu_day.place import Place

WORKERS = 14  # kernels compile slowly, each on one core
CASE_SECONDS = 60.0  # a case may take, the compilation of its kernels in it
REHEARSED_SECONDS = 150.0  # the same under Triton's interpreter
MARGIN = 8.0  # seconds before the end of a part in which nothing is waited for any more
SMALLER = 48  # smaller cases tried for each that fails
SEARCH = 30.0  # seconds for all searches of smaller cases
NO_MORE = 3  # failing cases of a kind that smaller ones are looked for of
GONE = 5.0  # seconds that a process has to be gone
NOTED = 1.0  # seconds between notes of what is right; what is wrong is noted at once
Note = Callable[[Found], None]
# kind of case → size → the least it may be; and of which number it must be a multiple
LEAST: dict[str, dict[str, int]] = {
    "op": {"T": 1, "B": 1, "H": 1, "K": 16, "V": 16},
    "step": {"T": 1, "B": 2, "H": 1, "K": 1, "V": 1},
    "rotary": {"T": 1, "B": 1, "H": 1, "K": 2},
    "norm": {"T": 1, "B": 1, "H": 1, "V": 1},
    "model": {"T": 1, "d_model": 16},
}
MULTIPLE = {("rotary", "K"): 2, ("model", "d_model"): 8}
PLAIN = {"state": False, "keep": False, "layout": "plain", "chunk": None, "form": "chunkwise"}  # of an op


class Worker:
    """A process that checks one case after the other, and another one when it has died."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, case: Case, seconds: float) -> Answer | None:
        """What comes of a case; None if there is no answer within these seconds."""
        for _ in range(2):
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(BrokenPipeError):  # then there is no line, either
                process.stdin.write(json.dumps(case).encode() + b"\n")
                process.stdin.flush()
            if not select.select([process.stdout], [], [], seconds)[0]:
                self.end()
                return None
            if line := process.stdout.readline():
                found: Answer = json.loads(line)
                return found
            self.end(GONE)
            if process.returncode != CARD_LOST:  # by an earlier case, which said so: this one is asked anew
                break
        return {"failed": f"its process died: status {process.returncode}"}

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            words = [sys.executable, "-m", "tools.gpu_day.cases", self._device.type]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, env=environment)
        return self._process

    def end(self, patience: float = 0.0) -> None:
        """No more cases; it has these seconds to end by itself. A process that a driver holds is left to it."""
        process, self._process = self._process, None
        if process is None:
            return
        for seconds in (patience, GONE):
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
                break
            process.kill()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def patience(place: Place) -> float:
    """Seconds that a case may take."""
    return REHEARSED_SECONDS if place.rehearsal else CASE_SECONDS


@cache
def _workers(device: torch.device, count: int) -> list[Worker]:
    """Those of all parts of a step, ended with it."""
    workers = [Worker(device) for _ in range(count)]
    for worker in workers:
        atexit.register(worker.end)
    return workers


class Checks:
    """Cases of a part, and what has come of them so far.

    Args:
        place: where the part works.
        cases: to be checked; an iterator without an end is checked as long as there is time.
        note: told what there is so far.
    """

    def __init__(self, place: Place, cases: Iterable[Case], note: Note) -> None:
        self._place, self._note, self._noted = place, note, 0.0
        self._endless = isinstance(cases, Iterator)
        self._cases = iter(cases)
        self._open: list[Case] = []  # begun and not answered
        self._lock = Lock()
        self._count: Counter[str] = Counter()
        self._wrong: list[Found] = []
        self._refused: list[Found] = []
        self._groups: dict[str, Found] = {}
        count = 1 if place.rehearsal else max(1, min(WORKERS, (os.cpu_count() or 2) - 2))
        self._workers = _workers(place.device, count)

    def run(self, until: float) -> Found:
        """Begins cases until then; afterwards looks for smaller cases of those that fail."""
        with ThreadPoolExecutor(len(self._workers)) as pool:
            list(pool.map(lambda worker: self._work(worker, until), self._workers))
            self._reduce(pool, min(time.time() + SEARCH, self._place.ended - MARGIN))
        found = self._found()
        self._note(found)
        return found

    def _ask(self, worker: Worker, case: Case) -> Answer | None:
        """What comes of a case; None if its part had to end before it had its time, for then nothing is known of it."""
        most = patience(self._place)
        left = self._place.ended - MARGIN - time.time()
        if left <= 0 or ((answer := worker.ask(case, min(most, left))) is None and left < most):
            return None
        return answer or {"failed": f"no answer in time: {most:.0f} s"}

    def _work(self, worker: Worker, until: float) -> None:
        while time.time() < until:
            with self._lock:
                if (case := next(self._cases, None)) is None:
                    return
                self._open.append(case)
            if (answer := self._ask(worker, case)) is None:
                return  # it stays among those that were not reached
            with self._lock:
                self._open.remove(case)
                self._add(case, answer)

    def _add(self, case: Case, answer: Answer) -> None:
        group = self._groups.setdefault(group_of(case), {"cases": 0, "right": 0, "worst": {}})
        group["cases"] += 1
        self._count["cases"] += 1
        if wrong := faults(answer):
            self._wrong.append({"case": case, **answer, "faults": wrong})
        elif "refused" in answer:
            self._refused.append({"case": case, **answer})
        else:
            group["right"] += 1
            self._count["right"] += 1
        kind, worst = case.get("dtype", "largest"), group["worst"]
        for error in answer.get("errors", {}).values():
            worst[kind] = max(worst.get(kind, 0.0), math.inf if math.isnan(error) else error)
        if wrong or time.time() > self._noted + NOTED:
            self._note(self._found())
            self._noted = time.time()

    def _found(self) -> Found:
        """As plain data. `missed` are the cases that nothing is known of; of those without an end none is missed."""
        if not self._endless:
            rest = list(self._cases)
            self._cases = iter(rest)
        return {
            "cases": self._count["cases"],
            "right": self._count["right"],
            "refused": self._refused,
            "wrong": self._wrong,
            "groups": self._groups,
            "missed": [] if self._endless else [*self._open, *rest],
        }

    def _reduce(self, pool: ThreadPoolExecutor, until: float) -> None:
        """The smallest case of some of each kind, one of every kind first."""
        kinds: Counter[str] = Counter()
        ranked = []
        for entry in self._wrong:
            ranked.append((kinds[entry["case"]["kind"]], entry))
            kinds[entry["case"]["kind"]] += 1

        def ask(cases: Sequence[Case]) -> list[Answer]:
            return [answer or {} for answer in pool.map(self._ask, self._workers, cases)]

        for number, entry in sorted(ranked, key=lambda pair: pair[0]):
            if number < NO_MORE and time.time() < until:
                entry["smallest"] = smallest(entry["case"], entry, ask, len(self._workers), until)
                self._note(self._found())


def group_of(case: Case) -> str:
    """The heading that a case is counted under."""
    return str(case.get("of", case["kind"]))


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


def smallest(
    case: Case,
    answer: Answer,
    ask: Callable[[Sequence[Case]], list[Answer]],
    at_once: int,
    until: float,
) -> Case:
    """The simplest case found that fails in the same way.

    Args:
        case: that fails.
        answer: what came of it.
        ask: what comes of several cases.
        at_once: how many of them.
        until: as `time.time` counts; nothing is asked after it.
    """
    tried, best, found = 0, case, True
    while found:
        found, waiting = False, smaller(best)
        while not found and tried < SMALLER and time.time() < until:
            if not (some := list(itertools.islice(waiting, at_once))):
                break
            tried += len(some)
            wrong = [other for other, came in zip(some, ask(some), strict=True) if _alike(came, answer)]
            if wrong:
                best, found = wrong[0], True
    return best


def _alike(one: Answer, other: Answer) -> bool:
    """Whether both are wrong in the same way: a size that is no size at all fails in its own."""
    if not faults(one):
        return False
    ways = [str(x["failed"]).partition(":")[0] if "failed" in x else "" for x in (one, other)]
    return ways[0] == ways[1]


def smaller(case: Case) -> Iterator[Case]:
    """Cases like this one, each simpler by one thing."""
    kind, lengths = case["kind"], case.get("lengths")
    for name, least in LEAST.get(kind, {}).items():
        if lengths and name == "T":
            continue
        value, unit = case[name], MULTIPLE.get((kind, name), 1)
        for less in dict.fromkeys((least, value // 2 // unit * unit, value - unit)):
            if least <= less < value:
                cuts = [cut for cut in case.get("cuts", []) if name != "T" or cut < less]
                yield {**case, name: less, **({"cuts": cuts} if case.get("cuts") else {})}
    for n in range(len(lengths or ())):
        rest = [*lengths[:n], *lengths[n + 1 :]]
        if sum(rest):
            yield {**case, "lengths": rest, "T": sum(rest)}
    for name, plain in PLAIN.items() if kind == "op" else ():
        if case.get(name, plain) != plain:
            yield {**case, name: plain}
