"""Decoders: a language model and a pool of slots for states, from tokens to logits, for any number of rows."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor

from retnet.engine.slots import SlotPool, rows_of
from retnet.model import Block, LanguageModel, ModelState
from retnet.settings import dump_changed


class Decoder(ABC):
    """Turns tokens of many sequences into logits of their next tokens; each sequence has a slot that holds its state.

    Sequences come and go without copying others. A slot holds anything until it is `reset`, written or copied to. What a row
    gets does not depend on other rows, but for rounding where a decoder does not promise more.

    A decoder is made for a model that stays as it is: weights may change in place, but whoever gives the model other layers,
    hooks or memory (`.to`, loading by assignment, `train()`) makes another decoder.

    Slots are int64 [B] on the CPU, all different. A decoder is used by one thread at a time.

    Attributes:
        vocab_size: logits a row.
        slots: how many sequences it has room for.
        device: where tokens are expected and logits are made.
        rows_are_exact: whether the bits of a row that `step` gives do not depend on the other rows, nor on the slot.
    """

    rows_are_exact: ClassVar[bool] = False

    vocab_size: int
    slots: int
    device: torch.device

    @abstractmethod
    def prefill(self, tokens: Tensor, cu_seqlens: Tensor, slots: Tensor) -> Tensor:
        """Reads pieces of sequences of any length, each on from its slot's state.

        Args:
            tokens: int64 [T], all pieces one after the other.
            cu_seqlens: int32 or int64 [N+1], where each begins and the last one ends, from 0 to T.
            slots: of each piece, [N].

        Returns:
            Logits [N,vocab_size] after the last token of each piece; zeros for a piece without tokens, whose state stays.

        Raises:
            ValueError: shapes, types, bounds, slots or tokens that do not fit.
        """

    def prefill_logits(self, tokens: Tensor, slot: Tensor) -> Tensor:
        """As `prefill` of one piece, int64 [T], in one slot, [1]: logits [T,vocab_size] after each of its tokens.

        Raises:
            ValueError: shapes, types, slots or tokens that do not fit.
        """
        return torch.cat([self.step(token, slot) for token in tokens.split(1)])

    @abstractmethod
    def step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """One token a row, which moves the state of its slot on.

        Args:
            tokens: int64 [B].
            slots: of each row, [B]; −1 is padding, whose token is not looked at and whose logits are zero.

        Returns:
            Logits [B,vocab_size].

        Raises:
            ValueError: shapes, types, slots or tokens that do not fit.
        """

    @abstractmethod
    def reset(self, slots: Tensor) -> None:
        """Makes slots what they are before the first token."""

    def free(self, slots: Tensor) -> None:  # noqa: B027 (a state of one size has nothing to give back)
        """Gives back what the caches of slots hold that nobody uses any more."""

    @abstractmethod
    def copy(self, source: Tensor, target: Tensor) -> None:
        """Forks sequences: slot target[i] becomes what slot source[i] is. A source may be named several times."""

    @abstractmethod
    def read(self, slots: Tensor) -> ModelState:
        """A copy of the states of slots: of each layer the mixer's state, a row a slot."""

    @abstractmethod
    def write(self, slots: Tensor, state: ModelState) -> None:
        """Puts the rows of a state, as `read` and `LanguageModel.prefill` give it, in the place of what slots held."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of what the states depend on, the model's configuration and weights; states of another one do not fit."""

    @abstractmethod
    def state_bytes(self, tokens: int) -> int:
        """Bytes of one sequence's state after so many tokens: a constant, but where a cache grows."""


class ComposedDecoder(Decoder):
    """The decoder of any mixer on any device, made of the model's own parts: the law that faster ones are tested against.

    Caches are read and grow where they lie. So are other states where slots, in any order, leave none out; else they are
    gathered and put back.

    Args:
        model: in evaluation mode.
        slots: how many sequences, at least one.

    Raises:
        ValueError: a model in training mode, or no slots.
    """

    def __init__(self, model: LanguageModel, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"slots is {slots}; it must be at least 1")
        if model.training:
            raise ValueError(
                "the model is in training mode, where dropout is active; call model.eval() first"
            )
        weight = model.embedding.weight
        self.vocab_size, self.slots, self.device = model.embedding.num_embeddings, slots, weight.device
        self._model = model
        mixers = [cast("Block", block).mixer for block in model.blocks]
        with torch.inference_mode(False):  # else nobody outside of it could change them
            self.pools = [SlotPool(mixer, slots, weight) for mixer in mixers]

    @torch.no_grad()
    def prefill(self, tokens: Tensor, cu_seqlens: Tensor, slots: Tensor) -> Tensor:
        """See `Decoder.prefill`."""
        lengths = self._check_prefill(tokens, cu_seqlens, slots)
        logits = torch.zeros(
            len(lengths), self.vocab_size, dtype=self._model.embedding.weight.dtype, device=self.device
        )
        if not any(lengths):
            return logits
        bounds = cu_seqlens.to(self.device, torch.int32)
        features = self._features(tokens, bounds, slots, lengths)
        full = [i for i, length in enumerate(lengths) if length]
        last = bounds[1:][full].long() - 1
        logits[full] = self._model.head(features[last])
        return logits

    @torch.no_grad()
    def prefill_logits(self, tokens: Tensor, slot: Tensor) -> Tensor:
        """See `Decoder.prefill_logits`; one pass."""
        bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
        self._check_prefill(tokens, bounds, slot)
        return self._model.head(self._features(tokens, bounds.to(self.device), slot, [len(tokens)]))

    def _features(self, tokens: Tensor, bounds: Tensor, slots: Tensor, lengths: Sequence[int]) -> Tensor:
        """What the head reads after each token, [T,D], of pieces that have been checked; moves their slots on."""
        rows = rows_of(slots, self.device)
        before = tuple(pool.take(rows, lengths) for pool in self.pools)
        features, after = self._model.read(tokens[None], before, cu_seqlens=bounds)
        for pool, old, new in zip(self.pools, before, after, strict=True):
            pool.put(rows, old, new)
        return features[0]

    @torch.no_grad()
    def step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """See `Decoder.step`."""
        live = self._check_step(tokens, slots)
        if live and len(live) == len(slots):
            return self._step(tokens, slots)
        logits = torch.zeros(
            len(slots), self.vocab_size, dtype=self._model.embedding.weight.dtype, device=self.device
        )
        if live:
            logits[live] = self._step(tokens[live], slots[live])
        return logits

    def _step(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """Rows without padding, checked."""
        rows, order = rows_of(slots, self.device), slots.argsort()
        if not isinstance(rows, slice) and isinstance(rows_of(slots[order], self.device), slice):
            # in the order of the pool, whose states then move on where they are
            ordered, back = order.to(self.device), order.argsort().to(self.device)
            return self._step(tokens[ordered], slots[order])[back]
        before = tuple(pool.take(rows, [1] * len(slots)) for pool in self.pools)
        logits, after = self._model.step(tokens, before)
        for pool, old, new in zip(self.pools, before, after, strict=True):
            pool.put(rows, old, new)
        return logits

    @torch.no_grad()
    def reset(self, slots: Tensor) -> None:
        """See `Decoder.reset`."""
        self._check_slots(slots)
        for pool in self.pools:
            pool.reset(rows_of(slots, self.device))

    def free(self, slots: Tensor) -> None:
        """See `Decoder.free`."""
        for pool in self.pools:
            if pool.grows:
                pool.free(slots)

    @torch.no_grad()
    def copy(self, source: Tensor, target: Tensor) -> None:
        """See `Decoder.copy`."""
        self._check_slots(source, repeated=True)
        self._check_slots(target)
        if source.shape != target.shape:
            raise ValueError(f"{len(source)} slots to copy from and {len(target)} to copy to; give as many")
        for pool in self.pools:
            pool.copy(rows_of(source, self.device), rows_of(target, self.device))

    @torch.no_grad()
    def read(self, slots: Tensor) -> ModelState:
        """See `Decoder.read`."""
        self._check_slots(slots, repeated=True)
        return tuple(pool.read(rows_of(slots, self.device)) for pool in self.pools)

    @torch.no_grad()
    def write(self, slots: Tensor, state: ModelState) -> None:
        """See `Decoder.write`."""
        self._check_slots(slots)
        if len(state) != len(self.pools) or any(len(part) != len(slots) for layer in state for part in layer):
            raise ValueError(
                f"a state of {len(state)} layers does not fit {len(self.pools)} layers and {len(slots)} slots, "
                "a row for each slot"
            )
        for pool, layer in zip(self.pools, state, strict=True):
            pool.write(rows_of(slots, self.device), type(layer)(*(part.to(self.device) for part in layer)))

    def fingerprint(self) -> str:
        """See `Decoder.fingerprint`; reads all weights. A version that knows of more settings finds the same."""
        found = hashlib.sha256(dump_changed(self._model.config).encode())
        for name, part in sorted(self._model.state_dict().items()):
            found.update(f"{name} {part.dtype} {tuple(part.shape)} ".encode())
            found.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def state_bytes(self, tokens: int) -> int:
        """See `Decoder.state_bytes`."""
        dtype = self._model.embedding.weight.dtype
        return sum(cast("Block", block).mixer.state_bytes(tokens, dtype) for block in self._model.blocks)

    def _check_slots(self, slots: Tensor, *, least: int = 0, repeated: bool = False) -> list[int]:
        if slots.dtype is not torch.int64 or slots.dim() != 1 or not slots.is_cpu:
            raise ValueError(
                f"slots have shape {tuple(slots.shape)}, type {slots.dtype} and device {slots.device}; "
                "allowed: int64 [B] on the CPU"
            )
        numbers: list[int] = slots.tolist()
        live = [slot for slot in numbers if slot != -1 or least == 0]
        if any(not 0 <= slot < self.slots for slot in live):
            raise ValueError(f"slots are {numbers}; allowed: {least} to {self.slots - 1}")
        if not repeated and len(set(live)) < len(live):
            raise ValueError(f"slots are {numbers}; a slot is one row's, so each must be named once")
        return numbers

    def _check_tokens(self, tokens: Tensor, live: list[int] | None = None) -> None:
        if tokens.dtype is not torch.int64 or tokens.dim() != 1 or tokens.device != self.device:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}, type {tokens.dtype} and device {tokens.device}; "
                f"allowed: int64 [B] on {self.device}"
            )
        if not tokens.is_cpu:
            return  # looking at them would wait for the device, and looking them up checks them there
        numbers: list[int] = tokens.tolist()
        wrong = [
            n
            for n in (numbers if live is None else [numbers[i] for i in live])
            if not 0 <= n < self.vocab_size
        ]
        if wrong:
            raise ValueError(
                f"token {wrong[0]} is not in the vocabulary; allowed: 0 to {self.vocab_size - 1}"
            )

    def _check_step(self, tokens: Tensor, slots: Tensor) -> list[int]:
        """Which rows are not padding."""
        live = [row for row, slot in enumerate(self._check_slots(slots, least=-1)) if slot >= 0]
        if tokens.shape != slots.shape:
            raise ValueError(f"{tokens.numel()} tokens for {len(slots)} slots; give one a row")
        self._check_tokens(tokens, live)
        return live

    def _check_prefill(self, tokens: Tensor, cu_seqlens: Tensor, slots: Tensor) -> list[int]:
        """The lengths of the pieces."""
        self._check_slots(slots)
        self._check_tokens(tokens)
        bounds = cu_seqlens.tolist()
        if (
            len(bounds) != len(slots) + 1
            or bounds[0] != 0
            or bounds[-1] != len(tokens)
            or sorted(bounds) != bounds
        ):
            raise ValueError(
                f"cu_seqlens is {bounds} for {len(slots)} slots and {len(tokens)} tokens; allowed: non-decreasing from 0 to "
                "the number of tokens, one more than slots"
            )
        return [end - start for start, end in itertools.pairwise(bounds)]
