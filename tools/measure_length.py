"""Trains one step on one sequence of a million tokens: cut over four processes, and in one, with what each came to hold.

    python -m tools.measure_length FOLDER [--tokens 1048576] [--processes 4] [--out benchmarks/results/tools]

The text is one document, so that all of it depends on all before. One process makes the step first, with as much memory as
it wants. Then both begin again where nobody may hold more than half of that (RLIMIT_DATA, of each process): the processes
that share the sequence have to reach the same loss, and the one that has it alone has to end for want of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from retnet.measure import records
from retnet.measure.footprint import footprint
from retnet.settings import load
from retnet.tables import Table, print_table
from retnet.train.config import ParallelConfig, RunConfig

MODEL = "vocab_size = 257\nd_model = 32\nnum_layers = 2\n[model.mixer]\nname = 'retention'\nnum_heads = 2"
SHORTAGE = ("memory ran out", "not enough memory")  # what a process says that may have no more


def configuration(folder: Path, tokens: int) -> Path:
    """A tiny model, and a text of one document that is a little longer than the sequence."""
    folder.mkdir(parents=True, exist_ok=True)
    words = "".join(
        f"{n} is {'odd' if n % 2 else 'even'}; its square is {n * n}.\n" for n in range(tokens // 24)
    )
    for name, size in (("train", tokens + 100), ("held-out", 1000)):
        assert len(words) >= size
        (folder / f"{name}.txt").write_text(words[-size:], encoding="utf-8")
    path = folder / "long.toml"
    path.write_text(
        f'[model]\n{MODEL}\n[data]\ncorpus = "{folder}/train.txt"\nvalidation = "{folder}/held-out.txt"\n'
        f'cache = "{folder}/cache"\n[train]\nsteps = 1\nseq_len = {tokens}\nbatch_size = 1\nthreads = 1\n'
        'precision = "fp32"\neval_every = 0\nlog_every = 1\n',
        encoding="utf-8",
    )
    return path


def trained(path: Path, run: Path, processes: int, limit: int | None = None) -> dict[str, Any]:
    """Trains in a program of its own; what its step came to, and the most that one of its processes held."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = [*(launcher if processes > 1 else ()), "-m", "retnet", "train", str(path), "--run-dir", str(run)]
    words += ["--parallel.cp", str(processes)]

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *words], stderr=subprocess.PIPE, text=True, preexec_fn=limited
    ) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    held = used.ru_maxrss * 1024  # the largest of a program and all that it started
    if process.returncode == 0:
        (line,) = (line for line in metrics(run) if "loss" in line)
        found = {name: line[name] for name in ("loss", "gradient_norm")}
    else:
        found = {
            "said": next(
                (line for line in said.splitlines() if any(w in line for w in SHORTAGE)), said[-2000:]
            )
        }
    return {
        "processes": processes,
        "limit_bytes": limit,
        "peak_bytes": held,
        "expected_bytes": footprint(loaded(path, processes), processes).memory.peak,
        "seconds": time.perf_counter() - begin,
        **found,
    }


def loaded(path: Path, processes: int) -> RunConfig:
    """The configuration as these processes share it."""
    return load(RunConfig, path, {"parallel": vars(ParallelConfig(cp=processes).of(processes))})


def metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def compared(folder: Path, tokens: int, processes: int) -> dict[str, Any]:
    """The four runs, and whether they showed what they should.

    Raises:
        SystemExit: they did not.
    """
    path = configuration(folder, tokens)
    free = trained(path, folder / "one", 1)
    limit = free["peak_bytes"] // 2
    cut = trained(path, folder / "cut", processes, limit)
    alone = trained(path, folder / "one-limited", 1, limit)
    apart = abs(cut["loss"] / free["loss"] - 1) if "loss" in cut else None
    if apart is None or apart > 1e-5 or "loss" in alone or not any(w in alone["said"] for w in SHORTAGE):
        raise SystemExit(f"not shown: {json.dumps([free, cut, alone], indent=1)}")
    return {"tokens": tokens, "loss_apart": apart, "rows": [free, cut, alone]}


def table(found: dict[str, Any]) -> Table:
    """What each run held."""
    rows = tuple(
        (
            str(row["processes"]),
            f"{row['limit_bytes'] / 1e9:.2f}" if row["limit_bytes"] else "none",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['expected_bytes'] / 1e9:.2f}",
            f"{row['loss']:.6f}" if "loss" in row else row["said"][:80],
            f"{row['seconds']:.0f}",
        )
        for row in found["rows"]
    )
    columns = ("processes", "limit, GB", "held at most, GB", "dry run, GB", "loss", "s")
    return Table(f"one step on a sequence of {found['tokens']:,} tokens", columns, rows)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new one, for text and runs")
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--out", type=Path, help="where the record goes; nowhere by default")
    asked = parser.parse_args()
    found = compared(asked.folder.resolve(), asked.tokens, asked.processes)
    print_table(table(found), Console())
    if asked.out:
        record = records.complete("length", {"model": MODEL}, found)
        print(f"wrote {records.write(record, asked.out / f'{records.stem(record)}.json', ())[0]}")


if __name__ == "__main__":
    main()
