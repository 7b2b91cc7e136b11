"""`python -m tools.gpu_day --out DIR`: everything that has to be learned from a GPU; see docs/gpu.md."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from retnet.errors import UserError, told
from retnet.io import expanded
from retnet.lock import sole_owner
from tools.gpu_day import plan
from tools.gpu_day.runner import ROOT, Day

MINUTES = 25.0
REHEARSED = 120.0  # estimates are those of a card: a rehearsal leaves nothing out for them, and takes minutes
RECORDS = ROOT / "benchmarks/results"
# what no step can do without, by the name it is imported by
NEEDED = (
    "click", "msgspec", "numpy", "psutil", "rich", "safetensors", "tokenizers", "tomli_w", "torch", "triton",
)  # fmt: skip
DISK = 12 << 30  # bytes that a day leaves at most: checkpoints of the study, prepared text, compiled kernels


def main(arguments: list[str] | None = None) -> int:
    """0 if all that was tried was done, 1 if something failed or was stopped, 2 if nothing could begin."""
    began = time.time()  # what torch takes to be imported is a part of the call
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_day", description="Measures everything on a GPU. Called again, it goes on."
    )
    parser.add_argument("--out", required=True, help="folder of records and page; continued if there")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"for everything; what matters most is done first. Default: {MINUTES:g}; of a rehearsal {REHEARSED:g}",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="STEP", choices=list(plan.STEPS), help=", ".join(plan.STEPS)
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and do nothing")
    parser.add_argument(
        "--rehearse", action="store_true", help="on a CPU, at tiny sizes: shows that all of it runs"
    )
    given = parser.parse_args(arguments)
    if given.minutes is None:
        given.minutes = REHEARSED if given.rehearse else MINUTES
    if not 1 <= given.minutes < 24 * 60:
        parser.error(f"--minutes is {given.minutes:g}; allowed: from 1 to a day's 1,440")
    try:
        return _day(given, began + 60 * given.minutes)
    except UserError as error:
        parser.error(str(error))


def _day(given: argparse.Namespace, end: float) -> int:
    """The whole call, until `end` as `time.time` counts; its exit status.

    Raises:
        UserError: it cannot begin, or records cannot be read or written.
    """
    out = Path(expanded(given.out)).resolve()
    if given.rehearse and out.is_relative_to(RECORDS):
        raise UserError(
            f"{given.out} is where records are kept, and a rehearsal is none; choose another --out"
        )
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if lacking and not given.dry_run:
        raise UserError(
            f"{', '.join(lacking)} cannot be imported by {sys.executable}; docs/gpu.md says what has to be installed"
        )
    if not given.rehearse and not given.dry_run and (why := _no_gpu()):
        raise UserError(f"{why}; --rehearse runs everything on this machine's CPU, at sizes that say nothing")
    day = Day(out, given.rehearse, end - time.time(), given.only or list(plan.STEPS), _say)
    _print_plan(day, given.minutes)
    if given.dry_run:
        return 0
    with sole_owner(out, "day's", "--out"):
        day.require_same_place()
        whole = _run(day)
        _tell(out, given.rehearse)
    return 0 if whole else 1


def _run(day: Day) -> bool:
    """Whether nothing failed or was stopped."""
    with told(f"write {day.out}"):
        free = shutil.disk_usage(day.out).free
    if free < DISK and not day.rehearsal:
        _say(f"{free >> 30} GiB are free in {day.out}; the study of quality may take {DISK >> 30}")

    def stop(number: int, _: FrameType | None) -> None:
        _say(f"{signal.Signals(number).name}: the step at work is ended; the same command goes on")
        day.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return day.run()


def _tell(out: Path, rehearsal: bool) -> None:
    """Prints what was found, and writes the page."""
    from tools.gpu_day.page import ALARM, chapters, write_page, write_patch

    if rehearsal:
        print(f"\n{ALARM}")
    for title, summary in chapters(out, rehearsal):
        print(f"\n{title}")
        for sentence in summary.findings:
            print(f"* {sentence}")
    try:
        with told("write the page", "records are whole"):
            if (patch := write_patch(out, rehearsal)) and not rehearsal:
                print(f"\nFor src/retnet/ops/triton/tile_table.py:\n{patch.read_text(encoding='utf-8')}")
            if patch:
                _say(f"wrote {patch}")
            _say(f"wrote {write_page(out, rehearsal)}")
    except UserError as error:
        _say(f"no page: {error}")


def _no_gpu() -> str:
    """Why nothing can be measured here; empty if it can."""
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU here"
    return ""


def _print_plan(day: Day, minutes: float) -> None:
    """What is done, in its order; then what is not, and why."""
    chosen = day.chosen()
    print(
        f"{minutes:g} minutes hold {len(chosen)} of {len(day.parts)} parts; seconds are estimates for an H100:"
    )
    for together in plan.processes(chosen):
        step = together[0].step
        print(f"  {step}: {plan.STEPS[step]}")
        for part in together:
            whole = plan.find(*part.key).seconds
            some = f", of {whole:.0f} s" if part.seconds < whole else ""
            print(f"    {part.seconds:4.0f} s  {part.name}{some} (rank {part.rank}): {part.what}")
    print(f"about {plan.expected(chosen) / 60:.1f} minutes in all")
    _print_rest(day, {part.key for part in chosen}, minutes)
    sys.stdout.flush()


def _print_rest(day: Day, chosen: Collection[tuple[str, str]], minutes: float) -> None:
    done = day.done()
    everything = plan.choose(day.parts, done, float("inf"))
    if left := [part for part in everything if part.key not in chosen]:
        print(f"left out, for {minutes:g} minutes are too few; another call does it:")
        for part in left:
            print(f"    {part.seconds:4.0f} s  {part.step} {part.name} (rank {part.rank})")
        print(f"all that is not done would take about {plan.expected(everything) / 60:.0f} minutes")
    for part in plan.PARTS:
        if part.step in day.steps and not plan.is_possible(part):
            print(f"left out: {part.step} {part.name}, for {part.needs} is not installed")
        elif part.key in done:
            print(f"done before: {part.step} {part.name}")


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
