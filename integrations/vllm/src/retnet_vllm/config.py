"""The configuration of a folder, with what vLLM asks of it beside what transformers does."""

from __future__ import annotations

from retnet.mixers import SoftmaxConfig
from retnet.model.hf import RetNetConfig


class ServedConfig(RetNetConfig):
    """`RetNetConfig`, whose heads are those of vLLM's attention: of the first layer of softmax.

    Of a model without such layers vLLM only asks whether the heads can be cut over its ranks.
    """

    @property
    def _softmax(self) -> SoftmaxConfig:
        kinds = self.model_config.mixers_by_layer
        heads = next((kind.num_heads for kind in kinds if hasattr(kind, "num_heads")), 1)
        return next(
            (kind for kind in kinds if isinstance(kind, SoftmaxConfig)), SoftmaxConfig(num_heads=heads)
        )

    @property
    def num_attention_heads(self) -> int:
        """Heads of queries."""
        return self._softmax.num_heads

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self._softmax.kv_heads or self._softmax.num_heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self._softmax.key_dim or self.d_model // self._softmax.num_heads
