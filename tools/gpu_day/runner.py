"""Runs steps, each in a process of its own, ends what takes too long, and plans anew after each of them."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path

from retnet.errors import UserError, told
from tools.gpu_day import family, identity, plan
from tools.gpu_day.notebook import Notebook, file_name
from tools.gpu_day.plan import GLANCE, GRACE, POISONED, UNWRITABLE, Part

ROOT = Path(__file__).parents[2]
Say = Callable[[str], None]
# no fault of the part that was at work
TIME_OVER, CALL_STOPPED = "the call's time was over", "the call was stopped"


class Day:
    """One call's work.

    Args:
        out: the folder of all records.
        rehearsal: see `tools.gpu_day.place.Place`.
        seconds: until everything has ended.
        only: steps; all others are left out.
        say: where progress goes.
    """

    def __init__(self, out: Path, rehearsal: bool, seconds: float, only: Collection[str], say: Say) -> None:
        self.out, self.rehearsal, self.say = out, rehearsal, say
        self.steps = [step for step in plan.STEPS if step in only]
        self.end = time.time() + seconds
        parts = [part for part in plan.PARTS if part.step in only and plan.is_possible(part)]
        # a rehearsal leaves nothing out, and starts a process a step
        self.parts = [part._replace(rank=1) for part in parts] if rehearsal else parts
        self.failed: set[tuple[str, str]] = set()  # in this call; the next one tries again
        self.stopped = False

    def chosen(self) -> list[Part]:
        """What is done in the time that is left, in its order."""
        return plan.choose(self.parts, self.done() | self.failed, self.end - time.time(), self._tried())

    def done(self) -> set[tuple[str, str]]:
        """(step, part) of all that need not be done again."""
        return {(step, name) for step in self.steps for name in self._notebook(step).done()}

    def require_same_place(self) -> None:
        """Refuses to go on beside records of another card, another torch, or other sources, whichever steps are asked for.

        Raises:
            UserError: in which points they differ.
        """
        here: dict[str, str | None] = {}
        for step in plan.STEPS:
            try:
                record = self._notebook(step).read()
            except UserError:
                if step in self.steps:
                    raise
                continue  # a damaged record stops its own step alone
            if not record:
                continue
            here = here or identity.current(self.rehearsal)
            if found := identity.differences(record, here):
                raise UserError(
                    f"{self._notebook(step).path} cannot go on here: {'; '.join(found)}. Numbers of both may not stand in "
                    "one record: choose another --out"
                )

    def run(self) -> bool:
        """Does all that fits; whether nothing failed or was stopped.

        Raises:
            UserError: records cannot be read or written.
        """
        for step in self.steps:
            self._notebook(step).close()
        while todo := self.chosen():
            first = plan.processes(todo)[0]
            self._run(first[0].step, first)
        return not self.failed and not self.stopped

    def stop(self) -> None:
        """Ends the step at work within `GLANCE` seconds, and with it the day."""
        self.stopped, self.end = True, 0.0

    def _run(self, step: str, parts: Sequence[Part]) -> None:
        """One process of a step; what it did not come to is planned again."""
        notebook, names = self._notebook(step), [part.name for part in parts]
        self.say(f"{step}: {', '.join(names)}")
        log = self.out / file_name(f"{step}.log", self.rehearsal)
        mark, since = secrets.token_hex(8), time.time()
        with told(f"write {log}"), log.open("ab") as file:
            process = subprocess.Popen(
                self._command(step, names),
                cwd=ROOT,
                env={**self._environment(), family.MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the step
            )
            try:
                why = self._watch(process, notebook, {part.name: part for part in parts})
            finally:  # whatever the step left behind holds the card, and most of all what does not listen
                family.end(mark)
        if process.returncode == UNWRITABLE:
            raise UserError(f"the record of {step} cannot be written; {log} says why")
        if (cut := notebook.open()) is not None:
            end = notebook.stop if why in (TIME_OVER, CALL_STOPPED) else notebook.fail
            end(cut, why or f"the process ended with status {process.returncode}; see {log.name}")
        after = notebook.parts()
        for name, part in zip(names, parts, strict=True):
            now = after.get(name, {})
            # not that of an earlier call
            state = now.get("state") if now.get("began", 0.0) >= since else None
            if state == "done":
                self.say(f"{step}: {name} done in {now['seconds']:.0f} s")
            elif state in ("failed", "stopped"):
                self.failed.add((step, name))
                self.say(
                    f"{step}: {name} {state}{': ' + now['why'].splitlines()[0] if now.get('why') else ''}"
                )
            elif not part.is_worth(self.end - plan.PAGE - time.time()):
                self.say(f"{step}: {name} was not reached; another call does it")
            elif (
                process.returncode != POISONED and cut is None
            ):  # it never began: it would not the next time either
                self.failed.add((step, name))
                self.say(f"{step}: {name} was not reached (status {process.returncode}); see {log.name}")

    def _watch(self, process: subprocess.Popen[bytes], book: Notebook, parts: dict[str, Part]) -> str:
        """Waits for a step; why it was ended, if it was."""
        while process.poll() is None:
            time.sleep(GLANCE)
            now, name = time.time(), book.open()
            if now > self.end - plan.PAGE / 2:
                self._end_process(process, GRACE if self.stopped else plan.PAGE / 2)
                return CALL_STOPPED if self.stopped else TIME_OVER
            if name is None:
                continue
            part = parts[name]
            most = part.most(self.rehearsal)
            if not part.least and now - book.parts()[name]["began"] > most:
                self._end_process(process, GLANCE)
                return f"it took more than {most:.0f} s; {part.seconds:g} were expected"
        return ""

    def _end_process(self, process: subprocess.Popen[bytes], grace: float) -> None:
        """SIGTERM, and SIGKILL to what is left; a process that a driver holds is left to it."""
        for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, GRACE)):
            if process.poll() is None:
                os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(patience)

    def _command(self, step: str, names: Sequence[str]) -> list[str]:
        until = f"{self.end - plan.PAGE:.1f}"
        words = [step, "--out", str(self.out), "--until", until, "--of", str(os.getpid()), "--parts", *names]
        rehearse = ["--rehearse"] if self.rehearsal else []
        return [sys.executable, "-m", "tools.gpu_day.step", *words, *rehearse]

    def _environment(self) -> dict[str, str]:
        """Of a step: this checkout's sources, and in a rehearsal the interpreter.

        torch keeps compiled backward passes by what the forward pass looks like; those of other sources must not be used.
        """
        sources = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
        more = {"PYTHONPATH": sources, "PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        more["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
        if self.rehearsal:
            more |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        return {**os.environ, **more}

    def _tried(self) -> set[tuple[str, str]]:
        """What an earlier call began and did not finish."""
        return {
            (step, name)
            for step in self.steps
            for name, part in self._notebook(step).parts().items()
            if part["state"] != "done"
        }

    def _notebook(self, step: str) -> Notebook:
        return Notebook(self.out, step, self.rehearsal)
