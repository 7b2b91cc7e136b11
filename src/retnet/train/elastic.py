"""Restarts by torchrun (`--max-restarts`): which attempt this is, and what the ones before left for it.

torchrun starts all processes again when one has failed, and knows neither why nor how far they were. What must not be done
twice is noted in its folder of this launch, which goes with it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

MISTAKE = "mistake"  # of the user, which was said, and which starting again does not mend
_noted: set[str] = set()  # by this process


def restarts() -> int:
    """How often torchrun has started the processes of this machine again because one of them failed.

    On several machines it may be another number on each: torchrun counts no restarts that a failure elsewhere brings about.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def note(what: str) -> None:
    """Notes something for later attempts on this machine."""
    if place := _place():
        _noted.add(what)
        with suppress(OSError):
            (place / what).touch()


def noted(what: str) -> bool:
    """Whether another process of this launch has noted something on this machine; an earlier one, if all ask first."""
    place = _place()
    return place is not None and what not in _noted and (place / what).exists()


def said() -> bool:
    """Whether an attempt before this one has ended with a mistake of the user, so that there is nothing more to say."""
    return restarts() > 0 and noted(MISTAKE)


def _place() -> Path | None:
    """torchrun's folder of this launch: of LAUNCH/attempt_0/RANK/error.json, which it names, the first."""
    folders = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents
    return folders[2] if len(folders) > 2 and folders[1].name.startswith("attempt_") else None


def own_store() -> Store | None:
    """Where the processes of this attempt meet, apart from those before; None where torch's own way is right.

    torchrun keeps one store for all attempts, and keys that an attempt left there let the next one wait for ever. Each has
    its own with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which must be set for torchrun; on one machine a prefix does the same.
    On several, attempts are not counted alike everywhere.
    """
    if not _shared() or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return None
    return connection(f"meet {restarts()}")


def connection(prefix: str) -> Store:
    """A connection of its own to the store where the processes met; `prefix` is of its keys, the same on all of them."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # where torch was built with them

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store: Store = PrefixStore(prefix, TCPStore(*place, is_master=False))
    return store


def advice() -> str:
    """What to set for restarts on several machines, if it is not; empty where all is well."""
    several = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    if not several or not _shared() or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return ""
    return (
        "restarts on several machines may hang: on all of them, start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in "
        "its environment"
    )


def _shared() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
