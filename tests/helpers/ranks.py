"""Processes of a gloo group on this machine, for tests: `launch` starts them, `main` is what they run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launch(module: str, ranks: int, folder: Path, *words: str) -> list[dict]:
    """Runs `python -m module` as so many ranks; what each rank's cases returned, by name."""
    place = folder / "store"
    place.unlink(missing_ok=True)
    commands = [
        [sys.executable, "-W", "error", "-m", module, str(rank), str(ranks), str(folder), *words]
        for rank in range(ranks)
    ]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # as torchrun has it: more threads than cores wait for each other
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=env, text=True, stderr=subprocess.PIPE)
        for command in commands
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()  # one that has ended hears nothing
    assert not any(process.returncode for process in processes), "\n".join(said)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def main(cases: Callable[[], dict], argv: list[str]) -> None:
    """One rank: joins the group, and leaves what `cases` returns beside those of the others."""
    import torch.distributed as dist

    rank, ranks, folder = int(argv[1]), int(argv[2]), Path(argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    found = cases()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
