"""Finding a checkpoint in a run directory."""

from __future__ import annotations

from pathlib import Path

from retnet.errors import dangling
from retnet.settings import UserError, nearest

HOME, CONFIG = "checkpoints", "config.toml"  # in a run
POINTERS = ("best", "last")  # files in the folder of checkpoints, which name one each
MODEL = "model.toml"  # in a checkpoint


def meant(path: str | Path) -> Path:
    """The run or checkpoint that a path inside one means; any other path as it is.

    A file of a checkpoint stands for the checkpoint, ``checkpoints/best`` for the one it names, the folder of checkpoints
    and what else lies in a run for the run.
    """
    path = Path(path)
    above = path.parent
    if path.is_dir():
        return above if path.name == HOME and (above / CONFIG).is_file() else path
    if not path.is_file():
        return path
    if (above / MODEL).is_file():
        return above
    if above.name == HOME and path.name in POINTERS:
        named = above / path.read_text(encoding="utf-8", errors="replace").strip()
        return named if named.is_dir() and named != above else path
    return above if (above / HOME).is_dir() else path


def find_checkpoint(path: str | Path, name: str | None = None) -> tuple[Path, str]:
    """The checkpoint directory of a run, and the name under which it was found.

    Args:
        path: a run directory, or a checkpoint directory.
        name: "best", "last" or a name such as "step-00001000"; None is the best, or the last while there is no best yet.

    Raises:
        UserError: nothing there, or no such checkpoint.
    """
    path = meant(path)
    if path.is_file():
        raise UserError(f"{path} is a file, and neither of a run nor of a checkpoint; give the folder of one")
    if not path.is_dir():
        raise UserError(f"no run at {path}{dangling(path)}{_neighbours(path)}")
    if (path / "manifest.json").is_file():
        if name is not None:
            raise UserError(f"{path} is a checkpoint itself; leave out the checkpoint name {name!r}")
        return path, path.name
    home = path / HOME
    if not home.is_dir():
        raise UserError(
            f"{path} is neither a run (no checkpoints directory) nor a checkpoint (no manifest.json)"
        )
    pointers = [pointer for pointer in POINTERS if (home / pointer).is_file()]
    steps = sorted(step.name for step in home.iterdir() if (step / "manifest.json").is_file())
    known = [*pointers, *steps]
    if not known:
        raise UserError(f"{path} has no checkpoint yet; it gets its first when training saves one")
    chosen = name if name is not None else known[0] if pointers else steps[-1]
    if chosen not in known:
        raise UserError(f"no checkpoint {chosen!r} in {path}; {nearest(chosen, known)}")
    if chosen not in pointers:
        return home / chosen, chosen
    target = (home / chosen).read_text(encoding="utf-8", errors="replace").strip()
    if target not in steps:
        raise UserError(
            f"{home / chosen} names {target!r}, which is not there; choose from: {', '.join(steps) or 'none'}"
        )
    return home / target, chosen


def _neighbours(path: Path) -> str:
    """For a mistyped run: what its parent directory has."""
    if not path.parent.is_dir():
        return ""
    runs = sorted(found.parent.name for found in path.parent.glob("*/checkpoints"))
    return f"; {nearest(path.name, runs)}" if runs else ""
