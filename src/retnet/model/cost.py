"""Cost model: parameters by part, operations per token, bytes of state; beside a Transformer's KV cache."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import nn

from retnet.model.config import ModelConfig
from retnet.model.language_model import Block, LanguageModel


class Cost(NamedTuple):
    """Sizes of a model. Operations count a multiply-add as two."""

    parameters: dict[str, int]  # by part; they sum to all parameters
    flops_per_token: int  # of a forward pass at `length`; a training step costs three times as much
    length: int
    state_bytes: int  # of one sequence after `length` tokens

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())


def cost(config: ModelConfig, length: int = 2048) -> Cost:
    """Counts a model without allocating it (meta device).

    Args:
        config: the model; see `with_bytes`.
        length: tokens in a sequence, which the mixing may depend on.
    """
    config = with_bytes(config)
    with torch.device("meta"):
        model = LanguageModel(config)
    blocks = [cast(Block, block) for block in model.blocks]
    norms = [m for b in blocks for m in (b.mixer_norm, b.ffn_norm)] + [model.norm, model.embedding_norm]
    parameters = {
        "embedding": _count(model.embedding),
        "mixers": sum(_count(b.mixer) for b in blocks),
        "feed-forward": sum(_count(b.ffn) for b in blocks),
        "norms": sum(_count(m) for m in norms if m is not None),
        "head": 0 if config.tie_embeddings else _count(model.head),
    }
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    flops = 2 * products + sum(b.mixer.mixing_flops(length) for b in blocks)
    return Cost(parameters, flops, length, sum(b.mixer.state_bytes(length) for b in blocks))


def with_bytes(config: ModelConfig) -> ModelConfig:
    """The model with the vocabulary of bytes and BOS, 257, where it leaves that to a tokenizer."""
    return replace(config, vocab_size=257) if config.vocab_size is None else config


def kv_cache_bytes(config: ModelConfig, length: int) -> int:
    """Keys and values a Transformer of the same width and depth keeps for `length` tokens, in bf16."""
    return 2 * config.num_layers * config.d_model * length * 2


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
