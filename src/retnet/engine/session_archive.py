"""Sessions as safetensors files: ids, states, a header in JSON; a state is read and checked when it is wanted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from retnet.engine.store import BLOCK, digest_of, from_tensors, parse_tensors, to_tensors
from retnet.errors import UserError, told

FORMAT = 2  # 1 had one hash of everything
_HEADER = "retnet_session"


def session_bytes(
    tokens: Sequence[int], marks: Sequence[int], states: Mapping[int, Any], names: Mapping[str, str]
) -> bytes:
    """A session as bytes.

    Args:
        tokens: all ids.
        marks: positions where something was appended.
        states: by position, of one row.
        names: "model" and "tokenizer", fingerprints, and the session's own "name".
    """
    parts = {"tokens": {"tokens": torch.tensor(tokens)}}
    for position, state in states.items():
        found = to_tensors(state)
        parts[str(position)] = {f"{position}.{name}": part for name, part in found.items()}
    hashes = {place: digest_of(tensors) for place, tensors in parts.items()}
    header = {"format": FORMAT, **names, "marks": [*marks], "sha256": hashes}
    tensors = {name: part for each in parts.values() for name, part in each.items()}
    return safetensors.torch.save(tensors, {_HEADER: json.dumps(header)})


class SessionArchive:
    """A session that was written: what the header says and its ids, checked; states where they lie until they are asked for.

    Args:
        names: of all tensors.
        metadata: of the file.
        tensor: gives one by its name.

    Attributes:
        tokens: all ids.
        marks: positions where something was appended.
        name: of the session.
        positions: of its states, rising.

    Raises:
        UserError: it is no session, one of another format, or its ids are damaged.
    """

    def __init__(
        self, names: Iterable[str], metadata: Mapping[str, str], tensor: Callable[[str], Tensor]
    ) -> None:
        self._tensor, self._header = tensor, _header_of(metadata)
        names = {*names}
        tokens = tensor("tokens") if "tokens" in names else torch.empty(0)
        if tokens.dtype is not torch.int64 or tokens.dim() != 1:
            raise UserError("this is no session: it has no tokens")
        self._require_whole("tokens", {"tokens": tokens})
        self.tokens: list[int] = tokens.tolist()
        self.name: str = self._header["name"]
        self.marks = [mark for mark in self._header["marks"] if 0 < mark <= len(self.tokens)]
        self._states = _by_position(names - {"tokens"}, len(self.tokens))
        self.positions = sorted(self._states)

    @classmethod
    def from_bytes(cls, content: bytes) -> SessionArchive:
        """Of what `session_bytes` has made."""
        try:
            tensors, metadata = parse_tensors(content)
        except UserError:
            raise UserError("this is no session, or part of one: it cannot be read") from None
        return cls(tensors, metadata, tensors.__getitem__)

    @classmethod
    def open(cls, path: Path) -> SessionArchive:
        """Of a file of that, which stays open for as long as anybody has this.

        Raises:
            UserError: also, it cannot be read.
        """
        with told(f"read the session {path}"):
            file: Any = safe_open(path, "pt")
            names, metadata = file.keys(), file.metadata() or {}

        def tensor(name: str) -> Tensor:
            with told(f"read the session {path}"):
                return file.get_tensor(name)

        return cls(names, metadata, tensor)

    def require(self, names: Mapping[str, str]) -> None:
        """Refuses a session of another model or tokenizer than those of these fingerprints.

        Raises:
            UserError: naming which.
        """
        for what, own in names.items():
            if self._header.get(what) != own:
                raise UserError(f"the session is of another {what}; open it with the one it was made with")

    def state(self, position: int, template: Any) -> Any:  # noqa: ANN401
        """The state at one of the positions, of the model whose states are like the template.

        Raises:
            UserError: it is damaged, cannot be read, or is of another model.
        """
        tensors = {
            f"{position}.{name}": self._tensor(f"{position}.{name}") for name in self._states[position]
        }
        self._require_whole(str(position), tensors)
        parts = {name: tensors[f"{position}.{name}"] for name in self._states[position]}
        state = from_tensors(parts, template)
        seen = [part for name, part in parts.items() if name.endswith((".position", ".length"))]
        if any(int(part.max()) != position for part in seen):
            raise UserError(f"the session's state is not that after its first {position} tokens")
        return state

    def _require_whole(self, place: str, tensors: dict[str, Tensor]) -> None:
        if self._header["sha256"].get(place) != digest_of(tensors):
            raise UserError("the session is damaged: its content is not what was written")


def _header_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        header = json.loads(metadata[_HEADER])
    except (ValueError, KeyError, RecursionError):  # of brackets in brackets without end
        raise UserError("this is no session, or part of one: it cannot be read") from None
    marks = header.get("marks") if isinstance(header, dict) else None
    if not (isinstance(marks, list) and all(isinstance(mark, int) for mark in marks)) or not isinstance(
        header.get("name"), str
    ):
        raise UserError("this is no session: its header does not say its name and marks")
    if header.get("format") != FORMAT:
        raise UserError(
            f"the session has format {header.get('format')!r}; this version reads {FORMAT}: open it with the version "
            "that wrote it, and take its text from there"
        )
    if not isinstance(header.get("sha256"), dict):
        raise UserError("this is no session: its header has no hashes of its content")
    return header


def _by_position(names: Iterable[str], length: int) -> dict[int, list[str]]:
    """Names of the tensors of each state by its position, from names such as "256.0.kv"."""
    states: dict[int, list[str]] = {}
    for key in sorted(names):
        place, _, name = key.partition(".")
        position = int(place) if place.isdecimal() and len(place) < 20 else 0
        if not 0 < position <= length or position % BLOCK:
            raise UserError(
                f"the session has a state {key[:40]!r}, which is at no place of its {length} tokens"
            )
        states.setdefault(position, []).append(name)
    return states
