"""Runner of a study's jobs, each in a process of its own: resumable, with progress over all, surviving failures.

A finished job is never done again; one that was interrupted goes on where its own files say; one that failed is listed
with its reason and tried again by the next call.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, NamedTuple

from rich.console import Console

from retnet import host
from retnet.io import write_text
from retnet.lock import sole_owner
from retnet.progress import Say, shown
from retnet.settings import UserError, dump
from retnet.studies import estimate
from retnet.studies.folder import StudyFolder
from retnet.studies.protocols import Job
from retnet.studies.study import Study
from retnet.studies.worker import STOPPED, Order
from retnet.train.run_dir import changes

# What may differ when a study is continued: how it is worked off, and how many seeds there are.
HARMLESS = {"hours", "workers", "processes", "measure.seeds"}
GRACE = 60.0  # seconds a job has to save its work when the study is stopped


class Ended(NamedTuple):
    """How a call of `run_study` ended."""

    finished: int
    failed: dict[str, str]  # name → reason
    stopped: bool  # by a signal; the next call goes on


def run_study(study: Study, out: Path, console: Console) -> Ended:
    """Does all jobs of a study that are not done yet.

    Args:
        study: what to do.
        out: its folder; one that holds a part of the same study is continued.
        console: where progress goes.

    Raises:
        UserError: the folder holds another study or another process works in it, or this machine cannot do this one.
    """
    folder = StudyFolder(out)
    if folder.exists and (changed := changes(folder.study(), study, HARMLESS)):
        raise UserError(
            f"{out} holds a study with other settings: {'; '.join(changed)}. Choose another --out"
        )
    study.measure.check()
    plans = study.measure.plans()
    if plans and not folder.exists:  # what is begun was judged before
        hours = estimate.require(plans, study.hours, study.processes, study.workers)
        console.print(f"about {hours:.2g} hours of training on this machine, if it does nothing else")
    with sole_owner(out, "study's", "--out"):
        folder.create(study, {**host.describe(), "started": _now(), "seconds": 0.0, **folder.environment()})
        study.measure.prepare(out, lambda text: console.print(text, markup=False, soft_wrap=True))
        with shown(console) as say:
            progress = _Progress(study.measure.count(), len(folder.results()), console, say)
            return _Runner(study, folder, progress).run()


def command(place: Path, processes: int) -> list[str]:
    """What does the job of a folder, in one process or in several that torchrun starts."""
    worker = ["-m", "retnet.studies.worker", str(place)]
    if processes > 1:
        worker = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *worker]
    return [sys.executable, *worker]


class _Runner:
    """One call's work."""

    def __init__(self, study: Study, folder: StudyFolder, progress: _Progress) -> None:
        self.study, self.folder, self.progress = study, folder, progress
        self.failed: dict[str, str] = {}
        self.running: dict[str, subprocess.Popen[str]] = {}
        self.stopping = False
        self.lock = threading.Lock()

    def run(self) -> Ended:
        begin, before = time.monotonic(), float(self.folder.environment().get("seconds", 0.0))
        futures: dict[Future[None], str] = {}
        with self._signals(), ThreadPoolExecutor(self.study.workers) as pool:
            try:
                while True:
                    for name, job in self._next(set(futures.values())):
                        futures[pool.submit(self._attempt, name, job)] = name
                    if not futures:
                        break
                    done, _ = wait(futures, timeout=1.0, return_when=FIRST_COMPLETED)
                    for future in done:
                        del futures[future]
                        future.result()
                    self.progress.show()
                    if done:
                        self.folder.note(seconds=before + time.monotonic() - begin)
            except BaseException:  # the folder cannot be written: nobody would hear of what the jobs still do
                self._ask(signal.SIGTERM)
                raise
        self.folder.note(seconds=before + time.monotonic() - begin, finished=_now())
        return Ended(len(self.folder.results()), self.failed, self.stopping)

    def _next(self, busy: set[str]) -> list[tuple[str, Job]]:
        """Jobs that can begin: one for each free worker."""
        if self.stopping or len(busy) >= self.study.workers:
            return []
        results = self.folder.results()
        known = self.study.measure.jobs(self.folder.path, results, self.failed)
        waiting = [
            (name, job)
            for name, job in known.items()
            if name not in results and name not in self.failed and name not in busy
        ]
        return waiting[: self.study.workers - len(busy)]

    def _attempt(self, name: str, job: Job) -> None:
        """Does a job, and notes how it ended."""
        place = self.folder.job(name)
        place.mkdir(parents=True, exist_ok=True)
        write_text(place / "job.toml", dump(Order(job)))
        self.folder.clear_failure(name)
        with (place / "log.txt").open("a", encoding="utf-8") as log:
            status = self._process(name, place, log)
        if status == 0 and name in self.folder.results():
            self.progress.finished(name)
        elif status != STOPPED and not self.stopping:
            self._fail(name, status)

    def _process(self, name: str, place: Path, log: IO[str]) -> int:
        """Runs the worker to its end; returns its exit status."""
        threads = max((os.cpu_count() or 1) // (self.study.workers * self.study.processes), 1)
        with self.lock:
            if self.stopping:
                return STOPPED
            process = subprocess.Popen(
                command(place, self.study.processes),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                start_new_session=True,  # Ctrl-C reaches this process alone, which then asks the jobs to save
            )
            self.running[name] = process
        with process:  # closes the pipe
            assert process.stdout is not None
            for line in process.stdout:
                try:
                    self.progress.tell(name, float(line))
                except ValueError:
                    log.write(line)
        with self.lock:
            del self.running[name]
        return process.returncode

    def _fail(self, name: str, status: int) -> None:
        reason = self.folder.failures().get(name)
        if reason is None:  # it did not come to say so itself
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            if status == -signal.SIGKILL:
                how += ", most likely because memory ran out"
            reason = f"{how}; see {self.folder.job(name) / 'log.txt'}"
            self.folder.write_failure(name, reason)
        self.failed[name] = reason
        self.progress.failed(name, reason)

    def _ask(self, to_do: signal.Signals) -> None:
        """Sends a signal to all jobs; no further one begins."""
        with self.lock:
            self.stopping = True
            jobs = list(self.running.values())
        for process in jobs:
            os.killpg(process.pid, to_do)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGTERM or Ctrl-C asks all jobs to save and stop; a second one, or `GRACE` seconds, kills them."""

        def stop(number: int, _: object) -> None:
            again = self.stopping
            self._ask(signal.SIGKILL if again else signal.SIGTERM)
            if not again:
                self.progress.say(
                    f"{signal.Signals(number).name}: the jobs save and stop; once more ends at once"
                )
                threading.Timer(GRACE, lambda: stop(number, None)).start()

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Progress:
    """Progress over all jobs."""

    def __init__(self, total: int, finished: int, console: Console, shown: Say) -> None:
        self.total, self.done, self.console, self.shown = total, finished, console, shown
        self.parts: dict[str, float] = {}  # of jobs in work
        self.begin, self.begun_at = time.monotonic(), float(finished)
        self.say(f"{total} jobs, {finished} of them done before")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def tell(self, name: str, part: float) -> None:
        self.parts[name] = part

    def finished(self, name: str) -> None:
        self.parts.pop(name, None)
        self.done += 1
        self.say(f"{self.done}/{self.total} {name}: done")

    def failed(self, name: str, reason: str) -> None:
        self.parts.pop(name, None)
        self.total -= 1
        self.say(f"{name}: FAILED: {reason}")

    def show(self) -> None:
        """How far all and those in work are, and the time that is left."""
        parts = sorted(self.parts.copy().items())
        at = self.done + sum(part for _, part in parts)
        rate = (at - self.begun_at) / (time.monotonic() - self.begin)
        left = timedelta(seconds=round((self.total - at) / rate)) if rate > 0 else "?"
        now = ", ".join(f"{name} {part:.0%}" for name, part in parts)
        self.shown(f"{self.done}/{self.total} done, {left} left; now {now}", at / max(self.total, 1))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
