"""What may not change inside one folder of records: the card, torch, Triton and the sources."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retnet import host

ROOT = Path(__file__).parents[2]
SOURCES = ("src", "tools/gpu_day", "tests/helpers", "configs/studies")
ENDINGS = (".py", ".toml", ".jinja")
SHOWN = 12  # digits of a commit or a digest


def current(rehearsal: bool) -> dict[str, str | None]:
    """Of this machine and this checkout. Sources are told apart without Git, too, by a digest of all of them.

    Args:
        rehearsal: runs on the CPU, whatever cards there are.
    """
    about = host.describe()
    versions = host.versions("torch", "triton")
    return {
        "card": about["cpu"] if rehearsal else about["gpu"] or about["cpu"],
        **versions,
        "commit": (about["commit"] or "")[:SHOWN] or None,
        "sources": _digest(),
    }


def differences(record: Mapping[str, Any], here: Mapping[str, str | None]) -> list[str]:
    """In which points a record was made elsewhere or with something else, each as words; empty where it can go on."""
    there = record.get("identity")
    if not isinstance(there, dict):
        return ["it was begun by another version of this tool"]
    return [
        f"{name} was {there.get(name)} and is {here[name]}" for name in here if there.get(name) != here[name]
    ]


def _digest() -> str:
    """Of all files that a step runs."""
    found = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in ENDINGS and path.is_file():
                found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:SHOWN]
