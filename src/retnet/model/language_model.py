"""`LanguageModel`: embedding, blocks of a mixer of any kind and a feed-forward network, head; plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.mixers import MIXERS
from retnet.mixers.packing import handed
from retnet.model.config import ModelConfig, Residual
from retnet.model.wrapped import ReadsWrapped
from retnet.nn import FeedForward, Linear, Norm, Positions
from retnet.settings import UserError

ModelState = tuple[Any, ...]  # one mixer state a layer
ModelPositions = Sequence[Positions | None]  # what the mixer of each layer is handed


class Block(nn.Module):
    """Y = Mixer(Norm(X)) + X, X' = FFN(Norm(Y)) + Y (paper §3); the configuration may weigh both summands of each.

    Args:
        config: of the model.
        layer: the block's number from 0, which decides its mixer and FFN where layers differ.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        kind = config.mixers_by_layer[layer]
        kinds = config.mixer_kinds_by_layer
        self.mixer_kind = kinds.index(kinds[layer])  # the first layer with such a mixer
        self.residuals = config.residuals_by_layer[layer]  # of the mixer and of the FFN
        self.of_norm = config.residual == "norm"
        self.mixer_norm = Norm(config.d_model, config.norm, config.norm_eps)
        self.mixer = MIXERS[kind.name](config.d_model, kind)
        self.ffn_norm = Norm(config.d_model, config.norm, config.norm_eps)
        ffn, width = config.ffns_by_layer[layer]
        self.ffn = FeedForward(config.d_model, width, ffn)
        self.dropout = nn.Dropout(config.dropout)

    def _add(self, x: Tensor, normed: Tensor, branch: Tensor, residual: Residual) -> Tensor:
        """The residual sum of x, of which the branch read what its norm made."""
        if self.training:  # else a module's call would cost microseconds of every token
            branch = self.dropout(branch)
        if residual == (1, 1) and not self.of_norm:
            return x + branch
        alpha, beta = residual
        return alpha * (normed if self.of_norm else x) + beta * branch

    def _close(self, x: Tensor, normed: Tensor, mixed: Tensor) -> Tensor:
        of_mixer, of_ffn = self.residuals
        y = self._add(x, normed, mixed, of_mixer)
        normed = self.ffn_norm(y)
        return self._add(y, normed, self.ffn(normed), of_ffn)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, positions: Positions | None = None
    ) -> Tensor:
        """Whole sequences: x [B,T,D] → [B,T,D]; `positions` are those of the mixer, made here by default."""
        normed = self.mixer_norm(x)
        return self._close(x, normed, self.mixer(normed, cu_seqlens=cu_seqlens, **handed(positions)))

    def mix(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """The mixer alone, on what it is to read: x [B,T,D] → [B,T,D]."""
        mixed: Tensor = self.mixer(x, cu_seqlens=cu_seqlens)
        return mixed

    def prefill(
        self,
        x: Tensor,
        state: Any,  # noqa: ANN401
        cu_seqlens: Tensor | None = None,
        positions: Positions | None = None,
    ) -> tuple[Tensor, Any]:
        """Many tokens from a state: x [B,T,D] → [B,T,D] and the state after them."""
        normed = self.mixer_norm(x)
        mixed, state = self.mixer.prefill(normed, state, cu_seqlens=cu_seqlens, **handed(positions))
        return self._close(x, normed, mixed), state

    def step(self, x: Tensor, state: Any, positions: Positions | None = None) -> tuple[Tensor, Any]:  # noqa: ANN401
        """One token from a state: x [B,D] → [B,D] and the state after it."""
        normed = self.mixer_norm(x)
        mixed, state = self.mixer.step(normed, state, **handed(positions))
        return self._close(x, normed, mixed), state


class Backbone(nn.Module):
    """What stands below the head: embedding, blocks, norm. Base of `LanguageModel` and of the Hugging Face adapter."""

    block_class: ClassVar[type[Block]] = Block

    def _build(self, config: ModelConfig) -> None:
        """Makes the parts, weights unfilled. No `__init__`, for a base class beside this one may have its own."""
        if config.vocab_size is None:
            raise UserError("vocab_size is not set; give it, or train with a tokenizer, which sets it")
        size = (config.vocab_size, config.d_model)
        self.embedding = nn.Embedding(*size, _weight=torch.empty(size))  # filled by `initialise` below
        self.embedding_scale = math.sqrt(config.d_model) if config.embedding_scale else None
        self.embedding_norm = (
            Norm(config.d_model, config.norm, config.norm_eps) if config.embedding_norm else None
        )
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(self.block_class(config, layer) for layer in range(config.num_layers))
        self.norm = Norm(config.d_model, config.norm, config.norm_eps)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ModelState:
        """The state before the first token: one mixer state a layer, batch first."""
        return tuple(block.mixer.init_state(batch, device=device, dtype=dtype) for block in self._blocks())

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def _positions(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        state: Sequence[Any] | None = None,
    ) -> ModelPositions:
        """What layers with the same kind of mixer share in a pass over x [B,T,D] or [B,D]; see `Mixer.positions`."""
        blocks = self._blocks()
        shared: dict[int, Positions | None] = {}
        for number, block in enumerate(blocks):
            if block.mixer_kind not in shared:
                before = None if state is None else state[number]
                shared[block.mixer_kind] = block.mixer.positions(x, cu_seqlens, before)
        return [shared[block.mixer_kind] for block in blocks]

    def _embed(self, tokens: Tensor) -> Tensor:
        return self._enter(self.embedding(tokens))

    def _enter(self, x: Tensor) -> Tensor:
        """From rows of the embedding to what the first block reads."""
        if self.embedding_scale is not None:
            x = x * self.embedding_scale
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return self.dropout(x)


class LanguageModel(ReadsWrapped, Backbone):
    """Tokens to logits of the next token, in three ways that are one function: `forward`, `prefill`, `step`.

    A padding mask [B,T] keeps masked tokens out of every row's state and positions: the rows are packed into one, run as
    documents, and laid out again. It may pad on the left, on the right, or anywhere; logits of masked tokens are zero.

    Raises:
        UserError: a configuration without vocabulary size, or one whose widths do not fit.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._build(config)
        self.head = Linear(config.d_model, self.embedding.num_embeddings)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        if not self.embedding.weight.is_meta:  # there is nothing to fill, and trying costs seconds of imports
            initialise(self, config, None if config.tie_embeddings else self.head)

    def forward(
        self, tokens: Tensor, *, cu_seqlens: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits of whole sequences.

        Args:
            tokens: int64 [B,T].
            cu_seqlens: int32 [N+1], bounds of documents packed in one row (B = 1).
            mask: bool [B,T], False where a token is padding; not together with `cu_seqlens`.

        Returns:
            [B,T,vocab_size] in the type of the weights.
        """
        if mask is None:
            return self.head(self._features(tokens, cu_seqlens))
        cu_seqlens = packing(mask, cu_seqlens)
        return laid_out(self.head(self._features(tokens[mask][None], cu_seqlens)), mask)

    def features(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """What the head reads: tokens [B,T] → [B,T,D]."""
        return self._features(tokens, cu_seqlens)

    def _features(self, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Apart from `features`, for under FSDP each way to call a model gives its weights back at its end."""
        x = self._embed(tokens)
        positions = self._positions(x, cu_seqlens)
        for block, shared in zip(self.blocks, positions, strict=True):
            x = block(x, cu_seqlens, shared)
        return self.norm(x)

    def mix(self, inputs: Mapping[int, Tensor], cu_seqlens: Tensor | None = None) -> dict[int, Tensor]:
        """What mixers answer to inputs of their own, each by itself: layer → x [B,T,D] to layer → [B,T,D]."""
        blocks = self._blocks()
        return {layer: blocks[layer].mix(x, cu_seqlens) for layer, x in inputs.items()}

    def prefill(
        self, tokens: Tensor, state: Sequence[Any], *, mask: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Many tokens from a state: logits [B,T,vocab_size] and the state after the last unmasked token of each row."""
        if mask is None:
            x, after = self.read(tokens, state)
            return self.head(x), after
        x, after = self.read(tokens[mask][None], state, cu_seqlens=packing(mask))
        return laid_out(self.head(x), mask), after

    def read(
        self, tokens: Tensor, state: Sequence[Any], *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """`prefill` without the head, for who needs logits of few tokens.

        Args:
            tokens: int64 [B,T].
            state: of each batch row, or of each document.
            cu_seqlens: int32 [N+1], bounds of documents packed in one row (B = 1).

        Returns:
            What the head reads, [B,T,D], and the state after the last tokens.
        """
        x = self._embed(tokens)
        positions, after = self._positions(x, cu_seqlens, state), []
        for block, before, shared in zip(self._blocks(), state, positions, strict=True):
            x, layer = block.prefill(x, before, cu_seqlens, shared)
            after.append(layer)
        return self.norm(x), tuple(after)

    def step(self, tokens: Tensor, state: Sequence[Any]) -> tuple[Tensor, ModelState]:
        """One token a row, int64 [B], from a state that may change in place: logits [B,vocab_size] and the state after.

        This is the law of decoding; `retnet.engine` has faster ways to do the same many times.
        """
        x = self._embed(tokens)
        positions, after = self._positions(x, None, state), []
        for block, before, shared in zip(self._blocks(), state, positions, strict=True):
            x, layer = block.step(x, before, shared)
            after.append(layer)
        return self.head(self.norm(x)), tuple(after)


def initialise(model: Backbone, config: ModelConfig, head: nn.Linear | None) -> None:
    """Fresh weights, by the configuration's `init`; see `deviations`. A tied head is None."""
    with torch.no_grad():
        for weight, std in deviations(model, config, head):
            nn.init.normal_(weight, std=std)


def deviations(
    model: Backbone, config: ModelConfig, head: nn.Linear | None
) -> Iterator[tuple[Tensor, float]]:
    """Weights, and standard deviations of fresh weights, in the order in which these are drawn.

    ``"deepnet"``: Xavier-normal with gain 1 for queries and keys and β = (8 · layers)^(−1/4) elsewhere (DeepNet, decoder
    only), embeddings N(0, 1/d_model). ``"normal"``: N(0, 0.02²) everywhere. A tied head is None.
    """
    beta = (8 * config.num_layers) ** -0.25
    for name, module in model.blocks.named_modules():
        if isinstance(module, nn.Linear):
            gain = 1.0 if name.endswith(("q_proj", "k_proj")) else beta
            xavier = gain * math.sqrt(2 / (module.in_features + module.out_features))
            yield module.weight, 0.02 if config.init == "normal" else xavier
    std = 0.02 if config.init == "normal" else config.d_model**-0.5
    yield model.embedding.weight, std
    if head is not None:
        yield head.weight, std


def fresh_weights(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Name → weight of `LanguageModel(config)`, one after the other on the CPU: as drawn there, and never all at once.

    What constructors draw and `initialise` draws anew is drawn twice here too: numbers depend on all before them.
    """
    with torch.device("meta"):
        model = LanguageModel(config)
    head = None if config.tie_embeddings else model.head
    names: dict[Tensor, str] = {weight: name for name, weight in model.named_parameters()}
    drawn = {names[weight]: (weight.shape, std) for weight, std in deviations(model, config, head)}
    for name, norm in (("embedding_norm", model.embedding_norm), ("norm", model.norm)):
        if norm is not None:
            made = Norm(config.d_model, config.norm, config.norm_eps)
            yield from ((f"{name}.{part}", x) for part, x in made.state_dict().items())
    for layer in range(config.num_layers):
        made_here = ((f"blocks.{layer}.{part}", x) for part, x in Block(config, layer).state_dict().items())
        yield from ((name, x) for name, x in made_here if name not in drawn)
    Linear(config.d_model, model.head.out_features)  # draws what the head's constructor does
    for name, (shape, std) in drawn.items():
        yield name, nn.init.normal_(torch.empty(shape), std=std)


def packing(mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Bounds of the rows of a mask [B,T] once their padding is taken out, int32 [B+1]."""
    if cu_seqlens is not None:
        raise ValueError("mask and cu_seqlens are two ways to say the same; give one")
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"mask has shape {tuple(mask.shape)} and type {mask.dtype}; allowed: [B,T] of bool")
    return F.pad(mask.sum(1).cumsum(0), (1, 0)).int()


def laid_out(packed: Tensor, mask: Tensor) -> Tensor:
    """[1, sum(mask), ...] → [B,T,...] with zeros where the mask is False."""
    rows = packed.new_zeros(*mask.shape, packed.shape[-1])
    rows[mask] = packed[0]
    return rows
