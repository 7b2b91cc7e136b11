"""`ModelConfig`: a language model's configuration as a frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from retnet.mixers import MixerConfig, RetentionConfig
from retnet.settings import At, Checked, Count


@dataclass(frozen=True)
class ModelConfig(Checked):
    """A language model: embedding, `num_layers` blocks of mixer and FFN, norm, head (paper §3). No layer has a bias."""

    vocab_size: Count | None = None  # None: that of the tokenizer it is trained with
    d_model: Count = 256
    num_layers: Annotated[int, At(least=1, most=10_000)] = 6
    mixer: MixerConfig = field(default_factory=RetentionConfig)
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: Annotated[float, At(least=0, most=1)] = 1e-5
    ffn: Literal["gelu", "geglu", "swiglu"] = "gelu"
    ffn_dim: Count | None = None  # 2 · d_model
    tie_embeddings: bool = True
    embedding_scale: bool = False  # embeddings × √d_model
    embedding_norm: bool = False
    dropout: Annotated[float, At(least=0, below=1)] = 0.0
    init: Literal["deepnet", "normal"] = "deepnet"
