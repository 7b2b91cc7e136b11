"""`ModelConfig` as a Hugging Face configuration: the same fields, in JSON, checked as strictly."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import msgspec
from transformers import GenerationConfig, PreTrainedConfig

from retnet.mixers import RetentionConfig
from retnet.model.config import ModelConfig
from retnet.settings import UserError, build, nearest

_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))
# What transformers itself writes into a config.json or passes to any configuration, beside its own fields.
_FOREIGN = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
}


class RetNetConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers has no types
    """The fields of `ModelConfig`, mixers as dictionaries, beside what transformers keeps in a configuration.

    transformers' own names work too: `hidden_size`, `num_hidden_layers`, `tie_word_embeddings`; and, to read,
    `num_attention_heads` and `intermediate_size`. `use_cache` is False for a mixer that no state can carry.

    Raises:
        UserError: an unknown setting (with the nearest known ones), a value of the wrong type or out of its range.
    """

    model_type = "retentive_network"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "tie_word_embeddings": "tie_embeddings",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    # The types are those of `ModelConfig`, which checks them; the defaults as well.
    vocab_size: Any = None
    d_model: Any = ModelConfig.d_model
    num_layers: Any = ModelConfig.num_layers
    mixer: Any = None
    layers: Any = None
    mixers: Any = None
    norm: Any = ModelConfig.norm
    norm_eps: Any = ModelConfig.norm_eps
    ffn: Any = ModelConfig.ffn
    ffn_layers: Any = None
    ffn_dim: Any = ModelConfig.ffn_dim
    ffn_dims: Any = None
    tie_embeddings: Any = ModelConfig.tie_embeddings
    embedding_scale: Any = ModelConfig.embedding_scale
    embedding_norm: Any = ModelConfig.embedding_norm
    residual: Any = ModelConfig.residual
    residual_alpha: Any = ModelConfig.residual_alpha
    residual_beta: Any = ModelConfig.residual_beta
    dropout: Any = ModelConfig.dropout
    init: Any = ModelConfig.init

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        if self.mixer is None:
            self.mixer = msgspec.to_builtins(RetentionConfig())
        known = {*_FIELDS, *self.attribute_map, *PreTrainedConfig.__dataclass_fields__, *_FOREIGN}
        passing = {*known, *GenerationConfig._get_default_generation_params()}
        for key in kwargs:
            if key not in passing and not key.startswith("_"):
                raise UserError(f"unknown setting {key!r}; {nearest(key, sorted(known))}")
        for theirs, ours in self.attribute_map.items():
            if theirs not in kwargs:
                continue
            if getattr(self, ours) not in (kwargs[theirs], getattr(ModelConfig, ours)):
                raise UserError(
                    f"{theirs} is {kwargs[theirs]!r} and {ours} {getattr(self, ours)!r}, but they are one setting"
                )
            setattr(self, ours, kwargs.pop(theirs))
        super().__post_init__(**kwargs)
        whole = self.model_config  # complete, and checked with all the rest
        self.mixer, self.mixers = msgspec.to_builtins(whole.mixer), msgspec.to_builtins(whole.mixers)
        if not whole.has_states:
            self.use_cache = False

    @classmethod
    def from_model_config(cls, config: ModelConfig, **kwargs: Any) -> RetNetConfig:  # noqa: ANN401
        """The configuration of the same model; `kwargs` are transformers' own fields, such as `bos_token_id`."""
        return cls(**msgspec.to_builtins(config), **kwargs)

    @property
    def model_config(self) -> ModelConfig:
        """The model this describes.

        Raises:
            UserError: a field has been set to what no model can be made of.
        """
        return build(ModelConfig, {name: getattr(self, name) for name in _FIELDS})

    @property
    def num_attention_heads(self) -> int | None:
        """Heads of the mixer, or None if it has none."""
        return self.mixer.get("num_heads")

    @property
    def intermediate_size(self) -> int:
        """Width of the feed-forward layers, of the widest where they differ."""
        return max(width for _, width in self.model_config.ffns_by_layer)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing is left to do: every folder is written with the code file that ``trust_remote_code`` needs."""
