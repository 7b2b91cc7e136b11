"""The record of a step: one JSON file, written anew after each of its parts, so that nothing that was found is ever lost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from retnet.errors import UserError, told
from retnet.io import write_json

REHEARSAL = "rehearsal"
Found = dict[str, Any]  # what a part found, plain JSON


def file_name(name: str, rehearsal: bool) -> str:
    """Of a file of the day: what a rehearsal wrote says so."""
    return f"{REHEARSAL}.{name}" if rehearsal else name


class Notebook:
    """The parts of a step and how each of them ended.

    ``parts`` of the record maps a part to its ``state`` (``begun``, ``done``, ``failed``, or ``stopped``: it can go on),
    when it ``began``, the ``seconds`` it took, what it ``found`` and ``why`` it did not end; and, where it was tried before,
    the same of each of those ``attempts``, the oldest first. ``identity`` is what `tools.gpu_day.identity` says.
    """

    def __init__(self, out: Path, step: str, rehearsal: bool) -> None:
        self.step, self.rehearsal = step, rehearsal
        self.path = out / file_name(f"{step}.json", rehearsal)

    def read(self) -> dict[str, Any]:
        """The record; empty before anything was written.

        Raises:
            UserError: it cannot be read, is no record of this step, or is a rehearsal's under the name of another.
        """
        with told(f"read {self.path}", "move it away, and the step is done anew"):
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
            except (FileNotFoundError, NotADirectoryError):
                return {}
        if not _is_record(found):
            raise UserError(f"{self.path} is no record of a step; move it away, and the step is done anew")
        if found["configuration"]["rehearsal"] is not self.rehearsal:
            what = "a rehearsal's" if not self.rehearsal else "that of a card"
            raise UserError(
                f"{self.path} is {what}; rehearsals and measurements are kept apart: move it away"
            )
        return dict(found)

    def parts(self) -> dict[str, Found]:
        """Name → how that part stands."""
        found: dict[str, Found] = self.read().get("parts", {})
        return found

    def done(self) -> set[str]:
        """Names of the parts that need not be done again."""
        return {name for name, part in self.parts().items() if part["state"] == "done"}

    def open(self) -> str | None:
        """The part that began and did not end."""
        return next((name for name, part in self.parts().items() if part["state"] == "begun"), None)

    def close(self) -> None:
        """Ends a part that an earlier call left open, for it was killed before it could say so."""
        if (left := self.open()) is not None:
            self._change(left, {"state": "failed", "why": "the call that did it was killed"})

    def begin(self, part: str) -> None:
        """A part begins; where and with what it is measured is noted with the first of them."""
        record = self.read()
        if not record:
            from retnet.measure import records
            from tools.gpu_day import identity

            name = file_name(f"gpu-{self.step}", self.rehearsal).replace(".", "-")
            more = {"identity": identity.current(self.rehearsal), "parts": {}}
            record = records.complete(name, {"rehearsal": self.rehearsal}, more)
        before = record["parts"].get(part)
        earlier = {} if before is None else {"attempts": attempts(before)}
        record["parts"][part] = {"state": "begun", "began": time.time(), **earlier}
        write_json(self.path, record)

    def note(self, part: str, found: Found) -> None:
        """What a part has found so far; it goes on."""
        self._change(part, {"found": found})

    def finish(self, part: str, found: Found) -> None:
        """A part is done."""
        self._end(part, {"state": "done", "found": found})

    def fail(self, part: str, why: str) -> None:
        """A part ended in an error, or was ended; what it had found stays."""
        self._end(part, {"state": "failed", "why": why.strip()})

    def stop(self, part: str, why: str) -> None:
        """A part was stopped at its time, and goes on where it ended in another call."""
        self._end(part, {"state": "stopped", "why": why})

    def _end(self, part: str, how: dict[str, Any]) -> None:
        began = self.parts().get(part, {}).get("began", time.time())
        self._change(part, {"seconds": round(time.time() - began, 1), **how})

    def _change(self, part: str, values: dict[str, Any]) -> None:
        record = self.read()
        record["parts"].setdefault(part, {}).update(values)
        write_json(self.path, record)


def attempts(part: Found) -> list[Found]:
    """All that were made at a part, the oldest first, the last of them this one."""
    return [*part.get("attempts", []), {key: value for key, value in part.items() if key != "attempts"}]


def _is_record(found: Any) -> bool:  # noqa: ANN401
    """Whether JSON has the form of a record."""
    try:
        parts = found["parts"]
        return isinstance(found["configuration"]["rehearsal"], bool) and all(
            isinstance(part["state"], str)
            and all(isinstance(one.get("found", {}), dict) for one in attempts(part))
            for part in parts.values()
        )
    except (KeyError, TypeError, AttributeError):
        return False
