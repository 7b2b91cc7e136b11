"""Prefix cache: states kept at block boundaries of texts, found by token ids, in memory up to a budget and in files beyond.

A state is kept after a multiple of `BLOCK` tokens, under a key that is the hash of the model and of all tokens up to there,
block by block. So two texts have the same key at a boundary if and only if they agree up to it, whoever read them; the
longest kept beginning of a text is the last of its keys that is there. That is every hit that a radix tree of token ids
would give which keeps states at the same places: there, too, a state is found where the path from the root, all tokens
before it, is the text's. What a tree could do beyond is to keep a state between two boundaries, at the very end of a
message; here the boundary before it is kept, and at most `BLOCK` - 1 tokens are read again. In return prompts are cut at
the same places whatever is kept, which is what makes a hit change no bit; a lookup is one dictionary access a block,
without nodes to split and join; and a folder of states can be shared by processes that know nothing of each other.

Nothing here is needed to be right: what is not kept is read again.
"""

# ruff: noqa: ANN401 (the state of a mixer is a type of its own)

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from retnet.engine.storage import open_storage
from retnet.errors import UserError, reason_of

BLOCK = 128  # tokens
_log = logging.getLogger("retnet.engine")


def root_of(model: str, salt: str) -> str:
    """What the keys of texts begin with that share states with one another alone: those of a model and a salt.

    Args:
        model: its fingerprint.
        salt: any text; empty is the model alone.
    """
    return hashlib.sha256(f"{model} {salt}".encode()).hexdigest() if salt else model


def keys_of(root: str, tokens: Sequence[int], known: Sequence[str] = ()) -> list[str]:
    """The keys of the states after BLOCK, 2 BLOCK, … tokens of a text.

    Args:
        root: of the model, see `root_of`.
        tokens: of the text.
        known: the first of the keys, which are not computed again.
    """
    keys = [*known]
    left = np.asarray(tokens[len(keys) * BLOCK :], dtype=np.int64)
    for start in range(0, len(left) - BLOCK + 1, BLOCK):
        keys.append(next_key(keys[-1] if keys else root, left[start : start + BLOCK]))
    return keys


def next_key(key: str, block: Sequence[int] | NDArray[np.int64]) -> str:
    """The key of the state `BLOCK` tokens after that of a key; before the first it is `root_of` the model."""
    return hashlib.sha256(key.encode() + np.asarray(block, dtype=np.int64).tobytes()).hexdigest()


def kept_positions(length: int, marks: Iterable[int] = ()) -> list[int]:
    """Where states of a text of this length are worth keeping: the last block boundary, those before marks, and a grid.

    The grid's spacing grows with the distance from the end: about a quarter of it, a power of two times `BLOCK`, so that
    what is kept for a longer text was also kept when it was shorter. Marks thin out in the same way, to the last one in
    each span of about a sixteenth of its distance. So the number of states grows with the logarithm of the length.
    """
    places = _thinned({mark // BLOCK * BLOCK for mark in marks if mark <= length}, length)
    place = length // BLOCK * BLOCK
    while place > 0:
        places.add(place)
        quarter = (length - place) // (4 * BLOCK)
        spacing = BLOCK << max(0, quarter.bit_length() - 1)
        place = (place - 1) // spacing * spacing
    return sorted(places - {0})


def _thinned(places: set[int], length: int) -> set[int]:
    """Of block boundaries the last in each span, a power of two times `BLOCK` that grows with the distance from the end."""
    kept, later = set(), -1
    for place in sorted(places, reverse=True):
        span = BLOCK << max(0, ((length - place) // (16 * BLOCK)).bit_length() - 1)
        if place // span != later // span:
            kept.add(place)
        later = place
    return kept


class StateStore:
    """Kept states by key, the least recently used ones dropped when they are more than a budget.

    A state that somebody holds is written to `directory` instead of being dropped, and comes back when it is wanted. Its
    hash lies beside it: what is damaged there is as if it were not. Without a directory it is dropped too: it can be read
    again from its tokens.

    Args:
        template: a state of one row, whose structure all have.
        max_bytes: of the states in memory.
        directory: where to write: a directory, made when it is missing, or a URL of fsspec; several processes may share it.

    Attributes:
        bytes: of the states in memory now.

    Raises:
        UserError: a directory that cannot be made, or a URL that cannot be opened.
    """

    def __init__(self, template: Any, max_bytes: int, directory: str | Path | None = None) -> None:
        self.template, self._max_bytes = template, max_bytes
        self._files = None if directory is None else open_storage(directory)
        self._states: OrderedDict[str, Any] = OrderedDict()  # the most recently used last
        self._held: dict[str, set[str]] = {}  # owner → keys
        self._owners: defaultdict[str, int] = defaultdict(int)  # key → how many
        self._lent: dict[str, Callable[[], Any | None]] = {}  # held states that lie elsewhere
        self._saved: set[str] = set()  # keys that have a file, as far as is known
        self.bytes, self._said = 0, False

    def get(self, key: str) -> Any | None:
        """The state of a key, or None. It is shared: whoever changes it must copy it."""
        if key in self._states:
            self._states.move_to_end(key)
            return self._states[key]
        state = self._borrow(key)
        if state is None:
            state = self._load(key)
        if state is not None:
            self.put(key, state)
        return state

    def longest(self, keys: Sequence[str]) -> tuple[int, Any | None]:
        """Of a text's keys the last one that is kept: its number of tokens and state, or 0 and None."""
        inside = next((i for i in range(len(keys), 0, -1) if keys[i - 1] in self._states), 0)
        for i in reversed(self._elsewhere(keys, inside)):
            if (state := self.get(keys[i - 1])) is not None:
                return i * BLOCK, state
        return (inside * BLOCK, self.get(keys[inside - 1])) if inside else (0, None)

    def _elsewhere(self, keys: Sequence[str], after: int) -> list[int]:
        """How many blocks the keys stand for that come after so many and are lent or have a file, rising."""
        left = keys[after:]
        found = self._lent.keys() & left
        if self._files is not None and left:
            try:
                files = self._files.among([_file(key) for key in left])
                found |= {key for key in left if _file(key) in files}
            except OSError as error:
                self._say(error)
        return [after + i + 1 for i, key in enumerate(left) if key in found]

    def put(self, key: str, state: Any) -> None:
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

    def lend(self, states: Mapping[str, Callable[[], Any | None]]) -> None:
        """Says how to get states that somebody holds and that lie elsewhere, such as in a session's file.

        Args:
            states: by key a function that gives the state, or None where it cannot be had. It is forgotten when nobody holds
                the key any more; keys that nobody holds now are passed over.
        """
        self._lent |= {key: get for key, get in states.items() if key in self._owners}

    def flush(self, owner: str | None = None) -> None:
        """Writes the states that an owner holds to the directory, or those of all, as before the process ends.

        Raises:
            OSError: one of them could not be written; those after it have not been tried.
        """
        for key in list(self._owners) if owner is None else self._held.get(owner, ()):
            state = self._states[key] if key in self._states else self._borrow(key)
            if state is not None:
                self._save(key, state)

    def sweep(self, seconds: float) -> int:
        """Removes files that nobody here holds and that are older than so many seconds, such as those of a killed process.

        Where processes share a directory, whoever sweeps must have said with `hold` what the sessions of all of them want.

        Returns:
            How many files.
        """
        if self._files is None:
            return 0
        try:
            return self._files.sweep({_file(key) for key in self._owners}, seconds)
        except OSError as error:
            self._say(error)
            return 0

    def __len__(self) -> int:
        return len(self._states)

    def _save(self, key: str, state: Any) -> None:
        if self._files is None or key in self._saved:
            return
        if not self._files.among([_file(key)]):
            tensors = to_tensors(state)
            content = safetensors.torch.save(tensors, {"sha256": digest_of(tensors)})
            self._files.write(_file(key), content)
        self._saved.add(key)

    def _save_or_drop(self, key: str, state: Any) -> None:
        try:
            self._save(key, state)
        except OSError as error:
            self._say(error)

    def _say(self, error: OSError) -> None:
        """Once; it costs time, not text: what a state was made of is read again."""
        if not self._said and self._files is not None:
            _log.warning("states are not kept in %s: %s", self._files.url, reason_of(error))
        self._said = True

    def _borrow(self, key: str) -> Any | None:
        state = self._lent[key]() if key in self._lent else None
        if state is None:
            self._lent.pop(key, None)
        return state

    def _load(self, key: str) -> Any | None:
        if self._files is None:
            return None
        try:
            content = self._files.read(_file(key))
            if content is None:
                return None
            tensors, metadata = parse_tensors(content)
            if metadata.get("sha256") != digest_of(tensors):
                raise UserError("the state is damaged")
            return from_tensors(tensors, self.template)
        except OSError as error:
            self._say(error)
        except UserError:  # damaged: as if it were not there
            self._forget(key)
        return None

    def _forget(self, key: str) -> None:
        self._lent.pop(key, None)
        self._saved.discard(key)
        if self._files is not None:
            with suppress(OSError):  # not ours to remove
                self._files.remove(_file(key))


def _file(key: str) -> str:
    return f"{key}.safetensors"


def parse_tensors(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        UserError: it is none, or part of one.
    """
    try:
        tensors = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")
        return tensors, json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"it cannot be read: {reason_of(error)}") from None


def digest_of(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, types and shapes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        part = tensors[name].contiguous().cpu()
        found.update(f"{name} {part.dtype} {tuple(part.shape)} ".encode())
        found.update(part.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def state_size(state: Any) -> int:
    """Bytes of the tensors of a state."""
    return sum(part.nbytes for part in to_tensors(state).values())


def to_tensors(state: Any) -> dict[str, Tensor]:
    """A state as tensors by name, "layer.field", such as safetensors keeps."""
    return {
        f"{number}.{name}": part.contiguous()
        for number, layer in enumerate(state)
        for name, part in _fields(layer)
    }


def from_tensors(tensors: dict[str, Tensor], template: Any) -> Any:
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
    for name in sorted(want, key=lambda name: not name.endswith(".length")):  # caches are as long as it says
        part, like = tensors[name], want[name]
        fits = part.dtype is like.dtype and part.shape == like.shape
        length = f"{name.split('.')[0]}.length"
        if not fits and length in want and part.dtype is like.dtype and part.dim() == like.dim() > 1:
            fits = part.shape == (1, int(tensors[length]), *like.shape[2:])
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


def _fields(layer: Any) -> list[tuple[str, Tensor]]:
    names = getattr(layer, "_fields", None)
    return [("state", layer)] if names is None else list(zip(names, layer, strict=True))
