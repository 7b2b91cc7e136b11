"""Worker process of a study, which runs one job: ``python -m retnet.studies.worker FOLDER``.

Reads ``job.toml`` there and prints how far it is on standard output, a number from 0 to 1 a line. It ends with status 0
when ``result.json`` was written, `STOPPED` when a signal asked it to stop and it can go on later, 1 when it failed; then
``error.txt`` says why.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from retnet.errors import UserError, reason_of, shortage, told
from retnet.settings import load
from retnet.studies.folder import StudyFolder
from retnet.studies.protocols import Job

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later


@dataclass(frozen=True)
class Order:
    """The file ``job.toml``."""

    job: Job


def main(folder: Path) -> int:
    """Does the job of a folder; returns the exit status."""
    study, name = StudyFolder(folder.parent.parent), folder.name
    speaks = int(os.environ.get("RANK", "0")) == 0  # of several processes, one
    try:
        job = load(Order, folder / "job.toml").job
        with told("do the job"):
            result = job.run(folder, _tell if speaks else lambda done: None)
    except UserError as error:
        reason = str(error)
    except Exception as error:  # a failing job must not end the study; the traceback goes to its log
        traceback.print_exc()
        why = shortage(error)
        reason = f"memory ran out: {why}" if why else f"{type(error).__name__}: {error}"
    else:
        if not speaks:
            return 0
        if result is None:
            return STOPPED
        try:
            study.write_result(name, result)
        except OSError as error:
            reason = reason_of(error)
        else:
            return 0
    print(reason, file=sys.stderr)  # to its log
    if speaks:
        with suppress(OSError):  # a full disk: the log, or whoever waits, says what there is to say
            study.write_failure(name, reason)
    return 1


def _tell(done: float) -> None:
    print(f"{done:.4f}", flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
