"""Runs steps, each in a process of its own, ends what takes too long, and plans anew after each of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from retnet.errors import UserError, told
from tools.gpu_day import plan
from tools.gpu_day.notebook import Notebook, file_name
from tools.gpu_day.plan import GLANCE, GRACE, POISONED, UNWRITABLE, Part

ROOT = Path(__file__).parents[2]
PATIENCE = 3.0  # times its estimate that a part may take
AT_LEAST = 60.0  # seconds that it may take anyhow
Say = Callable[[str], None]


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
        self.end = time.time() + seconds
        self.parts = [part for part in plan.PARTS if part.step in only and plan.is_possible(part)]
        self.failed: set[tuple[str, str]] = set()  # in this call; the next one tries again
        self.stopped = False

    def chosen(self) -> list[Part]:
        """What is done in the time that is left."""
        return plan.choose(self.parts, self.done() | self.failed, self.end - time.time())

    def done(self) -> set[tuple[str, str]]:
        """(step, part) of all that need not be done again."""
        return {(step, name) for step in plan.STEPS for name in self._notebook(step).done()}

    def run(self) -> bool:
        """Does all that fits; whether nothing failed or was stopped.

        Raises:
            UserError: records cannot be read or written.
        """
        for step in plan.STEPS:
            self._notebook(step).close()
        while todo := self.chosen():
            step = todo[0].step
            self._run(step, [part for part in todo if part.step == step])
        return not self.failed and not self.stopped

    def stop(self) -> None:
        """Ends the step at work within `GLANCE` seconds, and with it the day."""
        self.stopped, self.end = True, 0.0

    def _run(self, step: str, parts: Sequence[Part]) -> None:
        """One process of a step; what it did not come to is planned again."""
        notebook, names = self._notebook(step), [part.name for part in parts]
        self.say(f"{step}: {', '.join(names)}")
        log = self.out / file_name(f"{step}.log", self.rehearsal)
        with told(f"write {log}"), log.open("ab") as file:
            process = subprocess.Popen(
                self._command(step, names),
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the step
            )
            why = self._watch(process, notebook, {part.name: part for part in parts})
        if process.returncode == UNWRITABLE:
            raise UserError(f"the record of {step} cannot be written; {log} says why")
        if (cut := notebook.open()) is not None:
            notebook.fail(cut, why or f"the process ended with status {process.returncode}; see {log.name}")
        after = notebook.parts()
        for name in names:
            state = after.get(name, {}).get("state")
            if state == "done":
                self.say(f"{step}: {name} done in {after[name]['seconds']:.0f} s")
            elif state in ("failed", "stopped"):
                self.failed.add((step, name))
                self.say(f"{step}: {name} {state}{': ' + after[name]['why'] if 'why' in after[name] else ''}")
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
                return "the call was stopped" if self.stopped else "the call's time was over"
            if name is None:
                continue
            part = parts[name]
            most = max(AT_LEAST, PATIENCE * part.seconds)
            if not part.least and now - book.parts()[name]["began"] > most:
                self._end_process(process, GRACE)
                return f"it took more than {most:.0f} s, {PATIENCE:g} times what was expected"
        return ""

    def _end_process(self, process: subprocess.Popen[bytes], grace: float) -> None:
        for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, None)):
            if process.poll() is None:
                os.killpg(process.pid, number)
                try:
                    process.wait(patience)
                except subprocess.TimeoutExpired:
                    continue

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

    def _notebook(self, step: str) -> Notebook:
        return Notebook(self.out, step, self.rehearsal)
