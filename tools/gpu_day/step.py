"""One step in a process of its own: `python -m tools.gpu_day.step STEP --out DIR --parts NAME …` (started by the runner).

Each part is noted before it begins and when it has ended. A part that fails does not end the others, unless it leaves the
card unusable for this process: then it ends with status `POISONED`, and the runner starts another for those that are left.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from importlib import import_module
from pathlib import Path

import torch

from retnet.errors import UserError
from tools.gpu_day import family
from tools.gpu_day.notebook import Notebook
from tools.gpu_day.place import Place, Run, StoppedError, interpret_exactly, usable
from tools.gpu_day.plan import GLANCE, GRACE, POISONED, UNWRITABLE, find

REHEARSED = 120.0  # seconds of a part in a rehearsal, whatever a card would take


def main(arguments: list[str] | None = None) -> int:
    """Does the parts of a step; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_day.step")
    parser.add_argument("step")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument(
        "--of", type=int, required=True, help="the process that started it, and without which it ends"
    )
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args(arguments)
    threading.Thread(target=_end_without, args=(given.of,), daemon=True).start()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    device = torch.device("cpu" if given.rehearse else "cuda")
    if given.rehearse:
        interpret_exactly()
    notebook = Notebook(given.out, given.step, given.rehearse)
    runs: dict[str, Run] = import_module(f"tools.gpu_day.{given.step}").PARTS
    try:
        return _work(given, notebook, runs, device)
    except UserError as error:  # the record cannot be written: whatever was found would be lost
        print(error, file=sys.stderr)
        return UNWRITABLE


def _work(given: argparse.Namespace, notebook: Notebook, runs: dict[str, Run], device: torch.device) -> int:
    for name in given.parts:
        part, now = find(given.step, name), time.time()
        if not part.is_worth(given.until - now):  # what came before took longer: it is left to another call
            print(f"{given.step} {name}: no time is left", file=sys.stderr, flush=True)
            continue
        print(f"{given.step} {name}: begins", file=sys.stderr, flush=True)
        seconds = REHEARSED if given.rehearse else given.until - now if part.least else part.seconds
        notebook.begin(name)
        ended = given.until if part.least else min(given.until, now + part.most(given.rehearse))
        place = Place(given.out, given.rehearse, device, notebook, name, given.until, seconds, ended)
        try:
            notebook.finish(name, runs[name](place))
        except StoppedError as stopped:
            notebook.stop(name, str(stopped))
        except Exception as error:  # whatever it is, the other parts are worth doing
            traceback.print_exc()
            notebook.fail(name, f"{type(error).__name__}: {error}")
            if not usable(device):
                return POISONED
    return 0


def _end_without(starter: int) -> None:
    """Ends this process and its workers when the one that started it is gone: nobody else would, and they hold the card.

    Whoever minds SIGTERM (a study) has time to save its work. All others are killed by another process, this one first: it
    would take the death of its workers for an answer, and a signal that ends it would leave nobody to end them.
    """
    while os.getppid() == starter:
        time.sleep(GLANCE)
    if callable(signal.getsignal(signal.SIGTERM)):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
    if mark := os.environ.get(family.MARK):
        environment = {name: value for name, value in os.environ.items() if name != family.MARK}
        words = [sys.executable, "-m", "tools.gpu_day.family", mark]
        subprocess.Popen(words, env=environment, start_new_session=True).wait()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
