"""Processes of a gloo group on this machine, for tests: `launch` starts them, `main` is what they run."""

import importlib
import json
import sys
import warnings
from pathlib import Path

from tests.helpers.forks import shared

ROOT = Path(__file__).parents[2]


def launch(module: str, ranks: int, folder: Path, *words: str) -> list[dict]:
    """Runs `module` as so many ranks, warnings being errors; what each rank's cases returned, by name."""
    place = folder / "store"
    place.unlink(missing_ok=True)
    commands = [[module, rank, ranks, folder, *words] for rank in range(ranks)]
    done = shared().together(commands, ROOT, call=f"{__name__}:main", seconds=300)
    assert not any(one.returncode for one in done), "\n".join(one.stderr for one in done)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    """One rank: joins the group, and leaves what `cases` of its module returns beside those of the others."""
    import torch.distributed as dist

    warnings.simplefilter("error")
    rank, ranks, folder = int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    found = importlib.import_module(sys.argv[1]).cases()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
