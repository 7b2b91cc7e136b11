"""The studies that come with the project, by name and scale. Nothing heavy is imported here: help is instant."""

from __future__ import annotations

from pathlib import Path

from retnet.settings import UserError, config_path, nearest, shipped_configs


def shipped_studies() -> dict[str, list[str]]:
    """Name → scales of the studies that come with the project."""
    found: dict[str, list[str]] = {}
    for config in shipped_configs(studies=True):
        _, name, scale = config.split("/")
        found.setdefault(name, []).append(scale)
    return found


def check_study(name: str) -> None:
    """Refuses a name that is neither a shipped study nor the path of a .toml file.

    Raises:
        UserError: answers with the nearest names.
    """
    if not name.lower().endswith(".toml") and name not in shipped_studies():
        raise UserError(f"no study {name!r}; {nearest(name, shipped_studies())}; or the path of a .toml file")


def find_study(name: str, scale: str) -> Path:
    """The file of a shipped study at a scale, or of one given by its path.

    Raises:
        UserError: no such study, or not at this scale; answers with the nearest ones.
    """
    if name.lower().endswith(".toml"):
        return config_path(name)
    check_study(name)
    if scale not in (scales := shipped_studies()[name]):
        raise UserError(f"the study {name!r} has no scale {scale!r}; {nearest(scale, scales)}")
    return config_path(f"studies/{name}/{scale}")
