"""Prefix cache: states kept at block boundaries of texts, found by token ids, in memory up to a budget and on disk beyond.

A state is kept after a multiple of `BLOCK` tokens under a key that is the hash of the model and of all tokens up to there,
block by block. So a radix tree is not needed: the longest kept beginning of a text is the last of its keys that is there,
whoever read it, and a folder of states can be shared by processes that know nothing of each other. Nothing here is needed
to be right: what is not kept is read again.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from retnet.errors import UserError, told
from retnet.io import write_bytes

BLOCK = 128  # tokens
_log = logging.getLogger("retnet.engine")


def keys_of(model: str, tokens: Sequence[int]) -> list[str]:
    """The keys of the states after BLOCK, 2 BLOCK, … tokens of a text, for the model of this fingerprint."""
    ids, key, keys = np.asarray(tokens, dtype=np.int64), model, []
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        key = hashlib.sha256(key.encode() + ids[end - BLOCK : end].tobytes()).hexdigest()
        keys.append(key)
    return keys


def kept_positions(length: int, marks: Iterable[int] = ()) -> list[int]:
    """Where states of a text of this length are worth keeping: the last block boundary, those before marks, and a grid.

    The grid's spacing grows with the distance from the end: about a quarter of it, a power of two times `BLOCK`, so that
    what is kept for a longer text was also kept when it was shorter. Their number grows with the logarithm of the length.
    """
    places = {mark // BLOCK * BLOCK for mark in marks if mark <= length}
    place = length // BLOCK * BLOCK
    while place > 0:
        places.add(place)
        quarter = (length - place) // (4 * BLOCK)
        spacing = BLOCK << max(0, quarter.bit_length() - 1)
        place = (place - 1) // spacing * spacing
    return sorted(places - {0})


class StateStore:
    """Kept states by key, the least recently used ones dropped when they are more than a budget.

    A state that somebody holds is written to `directory` instead of being dropped, and comes back when it is wanted.
    Without a directory it is dropped too: it can be read again from its tokens.

    Args:
        template: a state of one row, whose structure all have.
        max_bytes: of the states in memory.
        directory: where to write; made when it is missing.

    Attributes:
        bytes: of the states in memory now.

    Raises:
        UserError: a directory that cannot be made.
    """

    def __init__(self, template: Any, max_bytes: int, directory: str | Path | None = None) -> None:  # noqa: ANN401
        self.template, self._max_bytes = template, max_bytes
        self._directory = None if directory is None else Path(directory)
        self._states: OrderedDict[str, Any] = OrderedDict()  # the most recently used last
        self._held: dict[str, set[str]] = {}  # owner → keys
        self._owners: defaultdict[str, int] = defaultdict(int)  # key → how many
        self.bytes, self._said = 0, False
        if self._directory is not None:
            with told(f"make the state directory {directory}"):
                self._directory.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Any | None:  # noqa: ANN401
        """The state of a key, or None. It is shared: whoever changes it must copy it."""
        if key in self._states:
            self._states.move_to_end(key)
            return self._states[key]
        state = self._load(key)
        if state is not None:
            self.put(key, state)
        return state

    def longest(self, keys: Sequence[str]) -> tuple[int, Any | None]:
        """Of a text's keys the last one that is kept: its number of tokens and state, or 0 and None."""
        for i in range(len(keys), 0, -1):
            if (state := self.get(keys[i - 1])) is not None:
                return i * BLOCK, state
        return 0, None

    def put(self, key: str, state: Any) -> None:  # noqa: ANN401
        """Keeps a state of one row, which nobody may change any more."""
        if key not in self._states:
            self._states[key] = state
            self.bytes += state_size(state)
        self._states.move_to_end(key)
        while self.bytes > self._max_bytes and self._states:
            oldest, dropped = self._states.popitem(last=False)
            self.bytes -= state_size(dropped)
            if self._owners.get(oldest):
                self._save_or_drop(oldest, dropped)

    def hold(self, owner: str, keys: Iterable[str]) -> None:
        """Says which states an owner wants kept from now on, instead of those it named before."""
        new, old = set(keys), self._held.pop(owner, set())
        if new:
            self._held[owner] = new
        for key in new - old:
            self._owners[key] += 1
        for key in old - new:
            self._owners[key] -= 1
            if not self._owners[key]:
                del self._owners[key]
                self._forget(key)

    def flush(self) -> None:
        """Writes all states that are held to the directory, as before the process ends.

        Raises:
            OSError: one of them could not be written; those after it have not been tried.
        """
        for key in self._owners:
            if key in self._states:
                self._save(key, self._states[key])

    def __len__(self) -> int:
        return len(self._states)

    def _file(self, key: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{key}.safetensors"

    def _save(self, key: str, state: Any) -> None:  # noqa: ANN401
        if self._directory is None or self._file(key).exists():
            return
        write_bytes(self._file(key), safetensors.torch.save(to_tensors(state)))

    def _save_or_drop(self, key: str, state: Any) -> None:  # noqa: ANN401
        try:
            self._save(key, state)
        except OSError as error:  # it costs time, not text: what it was made of is read again
            if not self._said:
                _log.warning("states are not kept in %s: %s", self._directory, error.strerror)
            self._said = True

    def _load(self, key: str) -> Any | None:  # noqa: ANN401
        if self._directory is None:
            return None
        try:
            tensors = safetensors.torch.load(self._file(key).read_bytes())
            return from_tensors(tensors, self.template)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, UserError):  # damaged: as if it were not there
            self._forget(key)
            return None

    def _forget(self, key: str) -> None:
        if self._directory is not None:
            with suppress(OSError):  # no longer there, or not ours to remove
                self._file(key).unlink()


def state_size(state: Any) -> int:  # noqa: ANN401
    """Bytes of the tensors of a state."""
    return sum(part.nbytes for part in to_tensors(state).values())


def to_tensors(state: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """A state as tensors by name, "layer.field", such as safetensors keeps."""
    return {
        f"{number}.{name}": part.contiguous()
        for number, layer in enumerate(state)
        for name, part in _fields(layer)
    }


def from_tensors(tensors: dict[str, Tensor], template: Any) -> Any:  # noqa: ANN401
    """The state of one row that `to_tensors` made these of.

    Args:
        tensors: by name.
        template: a state of the same model; of a cache only the number of places may differ.

    Raises:
        UserError: names, shapes or types that are not those of the model's states, or numbers that are not finite.
    """
    want = to_tensors(template)
    if want.keys() != tensors.keys():
        raise UserError("the state has other layers than the model's; it is of another model")
    for name, like in want.items():
        part = tensors[name]
        fits = part.dtype is like.dtype and part.shape == like.shape
        layer = template[int(name.split(".")[0])]
        if not fits and hasattr(layer, "length") and part.dtype is like.dtype and part.dim() == like.dim():
            places = int(tensors[f"{name.split('.')[0]}.length"].max())
            fits = part.shape == (1, places, *like.shape[2:])
        if not fits:
            raise UserError(
                f"the state's {name} has shape {tuple(part.shape)} and type {part.dtype}, the model's "
                f"{tuple(like.shape)} and {like.dtype}; it is of another model"
            )
        if part.is_floating_point() and not bool(torch.isfinite(part).all()):
            raise UserError(f"the state's {name} has numbers that are not finite; it is damaged")
    device = next(iter(want.values())).device
    layers = []
    for number, layer in enumerate(template):
        parts = [tensors[f"{number}.{name}"].to(device) for name, _ in _fields(layer)]
        layers.append(type(layer)(*parts) if hasattr(layer, "_fields") else parts[0])
    return tuple(layers)


def _fields(layer: Any) -> list[tuple[str, Tensor]]:  # noqa: ANN401
    names = getattr(layer, "_fields", None)
    return [("state", layer)] if names is None else list(zip(names, layer, strict=True))
