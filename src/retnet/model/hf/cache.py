"""What a recurrent model remembers between calls, with the operations that `generate` asks of a cache."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from retnet.mixers.states import select_rows
from retnet.model import ModelState
from retnet.settings import UserError


class RetNetCache(Cache):  # type: ignore[misc]  # transformers has no types
    """The mixers' states, whatever they are made of, and how many tokens were read; constant in size.

    A call of the model updates the cache it is given, states in place where a mixer does so. To continue one text in
    two ways, fork it: ``copy.deepcopy(cache)``. Nothing can be taken back: there is no `crop`.

    Attributes:
        states: one mixer state a layer, batch first; None before the first token.
        seen: int64 [], tokens read so far, padding included. A tensor, for a Python number would be a constant of a
            compiled step, compiled anew for every token.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: ModelState | None = None
        self.seen: Tensor | None = None

    def advance(self, states: ModelState, tokens: int) -> None:
        """Takes the states after `tokens` more tokens of every row."""
        if self.seen is None:
            self.seen = torch.zeros((), dtype=torch.int64, device=_first_tensor(states).device)
        self.states = states
        self.seen = self.seen + tokens

    def leave_inference_mode(self) -> None:
        """Copies states made under `torch.inference_mode`, which may not be updated in place outside of it."""
        if self.states is not None and _first_tensor(self.states).is_inference():
            self.states = select_rows(self.states, torch.arange(self.batch_size))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return 0 if self.seen is None else int(self.seen)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """−1: there is no limit."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(Tokens after `query_length` more, 0)."""
        return self.get_seq_length() + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether anything was read."""
        return self.states is not None

    def __len__(self) -> int:
        return 0 if self.states is None else len(self.states)

    def __repr__(self) -> str:
        return f"RetNetCache({self.get_seq_length()} tokens, {len(self)} layers)"

    @property
    def batch_size(self) -> int:
        """Rows, or −1 before the first token."""
        return -1 if self.states is None else _first_tensor(self.states).shape[0]

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.states is not None

    @property
    def is_croppable(self) -> bool:
        """False: a state cannot forget its last tokens."""
        return False

    def reset(self) -> None:
        """Forgets everything."""
        self.states = self.seen = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps copies of the rows `indices` (int64, or bool [B])."""
        if self.states is not None:
            rows = indices.nonzero()[:, 0] if indices.dtype is torch.bool else indices
            self.states = select_rows(self.states, rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, side by side."""
        if self.states is not None:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses.

        Raises:
            UserError: anything but 0 tokens.
        """
        if tokens_to_remove != 0:
            raise UserError(
                "a recurrent state cannot forget its last tokens, so the cache cannot be cropped; "
                "keep a copy from before them: copy.deepcopy(cache)"
            )

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ANN401
        """Refuses: there are no keys and values."""
        raise UserError("RetNetCache holds the states of recurrent layers; it takes no keys and values")


def require_states(cache: object) -> None:
    """Refuses any other cache.

    Raises:
        UserError: `cache` holds keys and values.
    """
    if not isinstance(cache, RetNetCache):
        raise UserError(
            f"past_key_values is a {type(cache).__name__}; the layers here have states, which RetNetCache() holds"
        )


def _first_tensor(state: Any) -> Tensor:  # noqa: ANN401
    while not isinstance(state, Tensor):
        state = next(part for part in state if part is not None)
    return state
