"""Kills processes of a training run at random moments, and checks that it ends as one that nobody killed.

    python -m tools.kill_runs FOLDER [--kills 20] [--processes 2] [--seed 0]

One torchrun with as many restarts trains a small model into FOLDER/killed; FOLDER/whole is trained by as many
processes, and left alone. In each attempt a random process gets SIGKILL at a random time, once in six while it
starts, else up to some seconds after it has begun to train: in mid-step, while checkpoints are copied, written,
hashed and completed. At the end losses, checkpoints and what was lost are compared, and written to FOLDER/kills.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from retnet.model.checkpoint import verify

EVERY = 5  # steps


def config(folder: Path, steps: int) -> Path:
    """A small run that saves often."""
    text = folder / "text.txt"
    words = [f"{n} is {'odd' if n % 2 else 'even'}; its square is {n * n}." for n in range(20_000)]
    text.write_text("\n".join(words), encoding="utf-8")
    path = folder / "run.toml"
    path.write_text(
        f"""
[model]
d_model = 128
num_layers = 4
[model.mixer]
name = "retention"
num_heads = 2
[data]
corpus = "{text}"
cache = "{folder / "cache"}"
[train]
steps = {steps}
seq_len = 128
batch_size = 2
accumulate = 4
precision = "fp32"
eval_every = 0
eval_tokens = 2000
checkpoint_every = {EVERY}
log_every = 1
patience = 60.0
""",
        encoding="utf-8",
    )
    return path


def start(path: Path, run: Path, processes: int, restarts: int) -> subprocess.Popen[bytes]:
    """torchrun, which trains into `run`."""
    words = f"--standalone --nproc-per-node={processes} --max-restarts={restarts} -m retnet train".split()
    command = [sys.executable, "-m", "torch.distributed.run", *words, str(path), "--run-dir", str(run)]
    with run.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def children(pid: int) -> list[int]:
    """Processes that a process has started, which are those of one attempt."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(each) for each in text.split()]


def complete(run: Path) -> list[str]:
    """Names of checkpoints that are there under their names."""
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def kill(process: subprocess.Popen[bytes], run: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """Kills one process after another until as many were killed, or the run has ended."""
    rng, done, before = random.Random(seed), [], set[int]()
    while len(done) < kills and process.poll() is None:
        found = [pid for pid in children(process.pid) if pid not in before]
        if len(found) < 2:
            time.sleep(0.02)
            continue
        before |= set(found)
        starting, wait = rng.random() < 1 / 6, rng.uniform(0, 6)
        while not (starting or begun(run, len(done)) or process.poll() is not None):
            time.sleep(0.02)
        ended = time.monotonic() + wait
        while time.monotonic() < ended and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is not None:
            break
        there, number = complete(run), rng.randrange(len(found))
        writing = [path.name for path in (run / "checkpoints").glob(".step-*")]
        os.kill(found[number], signal.SIGKILL)
        done.append(
            {
                "after_s": round(wait, 2),
                "while": "starting" if starting else "training",
                "process": number,
                "complete": there,
                "writing": writing,
            }
        )
        print(
            f"kill {len(done)}: process {number} after {wait:.1f} s, {there[-1:]} complete, {writing} begun",
            flush=True,
        )
    return done


def begun(run: Path, restarts: int) -> bool:
    """Whether the attempt after so many restarts has begun to train."""
    file = run / "launches.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return any(json.loads(line)["restarts"] >= restarts for line in lines)


def losses(run: Path) -> dict[int, float]:
    """Step → loss."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def lost(run: Path, done: list[dict[str, Any]]) -> list[str]:
    """Attempts that began before the last checkpoint that was complete when the attempt before was killed."""
    launches = [json.loads(line) for line in (run / "launches.jsonl").read_text().splitlines()]
    found = []
    for number, each in enumerate(done):
        newest = int(each["complete"][-1].removeprefix("step-")) if each["complete"] else 0
        for later in (line for line in launches if line["restarts"] > number):
            if later["step"] < newest:
                found.append(
                    f"restart {later['restarts']} began with step {later['step']}, and {newest} was complete"
                )
    return found


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    path = config(given.folder, given.steps)
    killed, whole = given.folder / "killed", given.folder / "whole"
    process, began = start(path, killed, given.processes, given.kills + 2), time.monotonic()
    done = kill(process, killed, given.kills, given.seed)
    status, seconds = process.wait(), time.monotonic() - began
    start(path, whole, given.processes, 0).wait()
    got, want = losses(killed), losses(whole)
    for name in complete(killed):
        verify(killed / "checkpoints" / name)
    result = {
        "kills": len(done),
        "while_writing": sum(bool(each["writing"]) for each in done),
        "status": status,
        "seconds": round(seconds, 1),
        "steps": [len(got), len(want)],
        "largest_difference": max(abs(got[step] / want[step] - 1) for step in want)
        if got.keys() == want.keys()
        else None,
        "lost": lost(killed, done),
        "moments": done,
    }
    (given.folder / "kills.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "moments"}, indent=1))
    sys.exit(status or bool(result["lost"]) or result["largest_difference"] is None)


if __name__ == "__main__":
    main()
