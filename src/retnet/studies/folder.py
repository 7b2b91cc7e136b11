"""A study's folder: `study.toml` (resolved), `env.json`, and `jobs/NAME/` with what each job was told and has left.

A job's folder holds `job.toml`, `log.txt`, and either `result.json` when it has finished or `error.txt` when it failed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from retnet.errors import UserError, told
from retnet.io import write_text
from retnet.settings import dump, load
from retnet.studies.protocols import Result
from retnet.studies.study import Study

RESULT, ERROR = "result.json", "error.txt"
_CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")  # colours of terminals and the like


class StudyFolder:
    """The files of one study."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.study_file = path / "study.toml"
        self.environment_file = path / "env.json"
        self.jobs = path / "jobs"

    @property
    def exists(self) -> bool:
        """Whether a study was begun here."""
        return self.study_file.is_file()

    def job(self, name: str) -> Path:
        """The folder of a job, which need not exist yet."""
        if name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"the name of a job, {name!r}, is no file name")
        return self.jobs / name

    def study(self) -> Study:
        """The study begun here.

        Raises:
            UserError: there is none, or its file is damaged.
        """
        if not self.exists:
            what = "holds no study: there is no study.toml in it" if self.path.is_dir() else "is no folder"
            raise UserError(f"{self.path} {what}; name the folder that `retnet study` was given as --out")
        return load(Study, self.study_file)

    def create(self, study: Study, environment: dict[str, Any]) -> None:
        """Begins a study: writes what is done and where.

        Raises:
            UserError: the folder cannot be written.
        """
        with told(f"write the study's folder {self.path}"):
            self.jobs.mkdir(parents=True, exist_ok=True)
            write_text(self.environment_file, _json(environment))
            write_text(self.study_file, dump(study))  # the last: it says that a study was begun

    def results(self) -> dict[str, Result]:
        """Name → result of the jobs that have finished, in the order of names.

        Raises:
            UserError: a result is damaged.
        """
        files = sorted(self.jobs.glob(f"*/{RESULT}"))
        return {file.parent.name: _read(file, "remove it, and the job is done again") for file in files}

    def failures(self) -> dict[str, str]:
        """Name → reason of the jobs that failed and have not been done since, in the order of names."""
        files = sorted(self.jobs.glob(f"*/{ERROR}"))
        waiting = [file for file in files if not file.with_name(RESULT).exists()]
        texts = {file.parent.name: _bytes(file).decode(errors="replace") for file in waiting}
        return {name: _CONTROL.sub("", text).strip() or "no reason was left" for name, text in texts.items()}

    def begun(self) -> list[str]:
        """Names of the jobs that have neither finished nor failed but left something, in order."""
        folders = sorted(folder for folder in self.jobs.glob("*") if folder.is_dir())
        return [f.name for f in folders if not (f / RESULT).exists() and not (f / ERROR).exists()]

    def write_result(self, name: str, result: Result) -> None:
        """Leaves what a job has found, whole or not at all; NaN and infinities are kept as Python writes them."""
        self._write(name, RESULT, _json(result))

    def write_failure(self, name: str, reason: str) -> None:
        """Leaves why a job failed."""
        self._write(name, ERROR, reason.strip().encode(errors="replace").decode() + "\n")

    def clear_failure(self, name: str) -> None:
        """Forgets that a job failed, because it is tried again."""
        (self.job(name) / ERROR).unlink(missing_ok=True)

    def environment(self) -> dict[str, Any]:
        """Where and when the study ran; empty where that was not kept.

        Raises:
            UserError: the file is damaged.
        """
        if not self.environment_file.exists():
            return {}
        hint = "remove it; reports will then not say where the study ran"
        return _read(self.environment_file, hint)

    def note(self, **values: Any) -> None:  # noqa: ANN401
        """Adds to, or replaces, what the environment says."""
        write_text(self.environment_file, _json({**self.environment(), **values}))

    def _write(self, name: str, file: str, text: str) -> None:
        folder = self.job(name)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / file, text)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _read(path: Path, hint: str) -> dict[str, Any]:
    try:
        found = json.loads(_bytes(path))
    except ValueError:  # no JSON, or no UTF-8
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it is no JSON object; {hint}")
    return found


def _bytes(path: Path) -> bytes:
    with told(f"read {path}"):
        return path.read_bytes()
