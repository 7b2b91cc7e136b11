"""Packed documents (unpad and pad) for mixers that are written for batches of sequences of one length."""

# ruff: noqa: ANN401 (the state of a mixer is a type of its own)

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from retnet.mixers.base import Mixer
from retnet.mixers.states import join_tensors
from retnet.nn import Positions, Rotary


class SequenceMixer(Mixer):
    """A mixer made of two functions of batches: `_whole`, for training, and `_extend`, from a state.

    Packed documents are cut out of their row and laid side by side. In training those of similar length are filled up
    with zeros behind their last token, where a causal function does not look; nothing is ever more than doubled. From a
    state only documents of equal length stand together, so that the state after them is that after their last token.
    A mixer that has `positions` (see `batch_positions`) gets them in both as a keyword, where all rows share them.
    """

    def _whole(self, x: Tensor) -> Tensor:
        """Sequences from their beginning: x [B,T,D], T ≥ 1 → [B,T,D]."""
        return self._extend(x, self.init_state(x.shape[0], device=x.device, dtype=x.dtype))[0]

    def _extend(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Sequences from a state: x [B,T,D], T ≥ 1 → [B,T,D] and the state after them."""
        raise TypeError(f"{type(self).__name__} does not define _extend")

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, positions: Positions | None = None
    ) -> Tensor:
        """x [B,T,D] → [B,T,D], every sequence from its beginning."""
        if positions is None:
            positions = self.positions(x, cu_seqlens)
        if cu_seqlens is None:
            return self._whole(x, **handed(positions)) if x.numel() else x
        lengths = document_lengths(x, cu_seqlens)
        documents = x[0].split(lengths)
        outputs = list(documents)  # the empty ones stay as they are
        alike = defaultdict(list)
        for i, length in enumerate(lengths):
            alike[length.bit_length()].append(i)
        alike.pop(0, None)
        for rows in alike.values():
            batch = pad_sequence([documents[i] for i in rows], batch_first=True)
            first = None if positions is None else positions.first(batch.shape[1])
            for i, y in zip(rows, self._whole(batch, **handed(first)).unbind(), strict=True):
                outputs[i] = y[: lengths[i]]
        return torch.cat(outputs)[None] if outputs else x

    def prefill(
        self,
        x: Tensor,
        state: Any,
        *,
        cu_seqlens: Tensor | None = None,
        positions: Positions | None = None,
    ) -> tuple[Tensor, Any]:
        """x [B,T,D] from `state` → [B,T,D] and the state after it; with `cu_seqlens`, a row of the state a document."""
        if cu_seqlens is None:
            return self._extend(x, state, **handed(positions)) if x.numel() else (x, state)
        lengths = document_lengths(x, cu_seqlens)
        if len(state[0]) != len(lengths):
            raise ValueError(
                f"state has {len(state[0])} rows for {len(lengths)} documents; give one a document"
            )
        if not any(lengths):
            return x, state
        documents = x[0].split(lengths)
        outputs, order, after = list(documents), [], []
        equal = defaultdict(list)
        for i, length in enumerate(lengths):
            equal[length].append(i)
        for length, rows in equal.items():
            part = _select(state, rows, x.device)
            if length:
                batch, part = self._extend(torch.stack([documents[i] for i in rows]), part)
                for i, y in zip(rows, batch.unbind(), strict=True):
                    outputs[i] = y
            order += rows
            after.append(part)
        joined = type(state)(*(_join(parts) for parts in zip(*after, strict=True)))
        back = sorted(range(len(order)), key=order.__getitem__)
        return torch.cat(outputs)[None], _select(joined, back, x.device)

    def step(self, x: Tensor, state: Any, *, positions: Positions | None = None) -> tuple[Tensor, Any]:
        """x [B,D] from `state` → [B,D] and the state after it."""
        y, state = self._extend(x[:, None], state, **handed(positions))
        return y[:, 0], state


def handed(positions: Positions | None) -> dict[str, Any]:
    """The keyword for a function that takes positions where there are any."""
    return {} if positions is None else {"positions": positions}


def batch_positions(
    rotary: Rotary, x: Tensor, cu_seqlens: Tensor | None, start: Tensor | None
) -> Positions | None:
    """Positions of the batches a `SequenceMixer` makes of x [B,T,D] or [B,D], whose rows begin at `start` [B], else at 0.

    Documents that are cut out of a row from the beginning read the first of them; documents of several ages have none.
    """
    if start is None:
        return rotary.positions(x)
    return (
        None if cu_seqlens is not None else rotary.positions(x if x.dim() == 3 else x[:, None], None, start)
    )


def document_lengths(x: Tensor, cu_seqlens: Tensor) -> list[int]:
    """Lengths of the documents packed in x [1,T,D].

    Raises:
        ValueError: bounds that do not rise from 0 to T, or more than one row.
    """
    if x.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens packs documents in one row, but x has batch {x.shape[0]}; allowed: B = 1"
        )
    bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != x.shape[1] or sorted(bounds) != bounds:
        raise ValueError(f"cu_seqlens is {bounds}; allowed: non-decreasing from 0 to T = {x.shape[1]}")
    return [end - start for start, end in itertools.pairwise(bounds)]


def _join(parts: Sequence[Any]) -> Any:
    return list(itertools.chain(*parts)) if isinstance(parts[0], list) else join_tensors(parts)


def _select(state: Any, rows: list[int], device: torch.device) -> Any:
    index = torch.tensor(rows, dtype=torch.long, device=device)

    def select(part: Any) -> Any:
        return [part[i] for i in rows] if isinstance(part, list) else part.index_select(0, index)

    return type(state)(*map(select, state))
