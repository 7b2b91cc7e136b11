"""What the ranks of tests/train/test_restarts.py do: torchrun --max-restarts 2 -m tests.train.restarts CONFIG FOLDER

In the first attempt a rank is killed while checkpoints are written, in the second one hangs; the third has its way.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from retnet.train import elastic, hangs
from retnet.train.hangs import HangDetector
from retnet.train.trainer import train
from tests.train.driver import wrap
from tests.train.ranks import base, note_batches

PATIENCE = 4.0
HUNG = 5  # step


def impatient() -> None:
    """From the step on that hangs: the first steps of a process may take long on a busy machine."""
    plain = HangDetector.at

    def at(self, step, place):
        if step == HUNG:
            self._patience = PATIENCE
        plain(self, step, place)

    hangs.LONGEST, HangDetector.at = 0.5, at


def main() -> None:
    config, folder = sys.argv[1], Path(sys.argv[2])
    attempt, rank = elastic.restarts(), int(os.environ["RANK"])
    with (folder / f"{attempt}.{rank}.batches").open("a", encoding="utf-8", buffering=1) as file:
        note_batches(lambda found: file.write(json.dumps(found) + "\n"))
        if (attempt, rank) == (0, 1):  # two files of step 3, and then the first of step 6 is written
            wrap("retnet.model.sharded:entry:3", lambda: os.kill(os.getpid(), signal.SIGKILL))
        if attempt == 1:
            impatient()
        if (attempt, rank) == (1, 1):  # it has begun with step 4
            wrap(f"retnet.data.batches:Batches.batch:{HUNG - 3}", lambda: time.sleep(1000))
        train(base(config), folder / "run")


if __name__ == "__main__":
    main()
