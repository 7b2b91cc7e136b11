"""Commands of `retnet` in file systems of their own.

Where the system lets it, the server lives in a mount namespace of its own, so that a full or a read-only file system is a
real one and is gone when it ends; elsewhere the same faults are had from a limit on the size of files, and from files that
stand where folders should be.
"""

import os
import shutil
import subprocess
from pathlib import Path

from tests.helpers.forks import Forks, serve

_UNSHARE = ["unshare", "--map-root-user", "--mount"]


class Places(Forks):
    """Full and read-only folders, and commands that run with one fault each.

    Args:
        home: a folder for what is mounted.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        # what is mounted must stay out of sight of others, and a mount needs the right to make one
        self.mounts = (
            subprocess.run([*_UNSHARE, "mount", "-t", "tmpfs", "x", home], capture_output=True).returncode
            == 0
        )
        super().__init__(_UNSHARE if self.mounts else (), __name__)

    def make(self, name: str, kind: str, content: Path | None = None, free: int = 0) -> Path:
        """A folder ``full`` (but for so many bytes) or ``read-only``, with a copy of `content` in it."""
        place = self.home / name
        self.ask({"make": str(place), "kind": kind, "content": content and str(content), "free": free})
        return place

    def relieve(self, place: Path) -> None:
        """Makes room in a full folder."""
        self.ask({"relieve": str(place)})


def _make(order: dict) -> dict:
    place, read_only = Path(order["make"]), order["kind"] == "read-only"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], check=True)
    if order["content"]:
        shutil.copytree(order["content"], place / "content", symlinks=True)
    if read_only:
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        return {}
    with (place / ".filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            os.ftruncate(filler.fileno(), filler.tell() - order["free"])
    return {}


def _relieve(order: dict) -> dict:
    (Path(order["relieve"]) / ".filler").unlink()
    return {}


if __name__ == "__main__":
    serve({"make": _make, "relieve": _relieve})
