"""What a language model is made of, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from retnet.mixers import MixerConfig, RetentionConfig
from retnet.settings import UserError


@dataclass(frozen=True)
class ModelConfig:
    """A language model: embedding, `num_layers` blocks of mixer and FFN, norm, head (paper §3). No layer has a bias."""

    vocab_size: int | None = None  # None: that of the tokenizer it is trained with
    d_model: int = 256
    num_layers: int = 6
    mixer: MixerConfig = field(default_factory=RetentionConfig)
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    ffn: Literal["gelu", "geglu", "swiglu"] = "gelu"
    ffn_dim: int | None = None  # 2 · d_model
    tie_embeddings: bool = True
    embedding_scale: bool = False  # embeddings × √d_model
    embedding_norm: bool = False
    dropout: float = 0.0
    init: Literal["deepnet", "normal"] = "deepnet"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "num_layers", "ffn_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; allowed: 0 up to, not including, 1")
        if self.norm_eps < 0:
            raise UserError(f"norm_eps is {self.norm_eps}; it must not be negative")
