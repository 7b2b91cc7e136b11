"""Hugging Face folders of Llama and its relatives (Mistral, Qwen2, Qwen3): Transformers, read as models of softmax layers.

What they compute, in this library's words: RMS block norms, softmax attention with rotary positions in halves, keys and
values shared by groups of heads, SwiGLU; Qwen2 has biases on queries, keys and values, Qwen3 a norm of queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retnet.convert.folders import Folder
from retnet.convert.weights import TOKENS, Found, Wanted, expected, options, renamed, same
from retnet.mixers import SoftmaxConfig
from retnet.model import ModelConfig
from retnet.settings import Checked, Count, UserError

FAMILY = ("llama", "mistral", "qwen2", "qwen3")  # their `model_type`
# Ours → theirs, layers with {} for their number.
NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "blocks.{}.mixer_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.mixer.q_proj.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.{}.mixer.k_proj.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.{}.mixer.v_proj.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.{}.mixer.out_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.mixer.q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "blocks.{}.mixer.k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "blocks.{}.mixer.v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "blocks.{}.mixer.q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.{}.mixer.k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "blocks.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.ffn.fc1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.ffn.gate.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.ffn.fc2.weight": "model.layers.{}.mlp.down_proj.weight",
}
_ANGLES = "rotary_emb.inv_freq"  # a buffer that old checkpoints hold; the configuration says it
_CANNOT = {
    "attention_bias": "biases of attention, that of its output among them",
    "mlp_bias": "biases of the feed-forward networks",
    "quantization_config": "quantised weights",
}


@dataclass(frozen=True)
class LlamaArguments(Checked):
    """Their configurations, as far as they change the function, with Llama's defaults, and Mistral's of its own."""

    model_type: str
    vocab_size: Count = 32000
    hidden_size: Count = 4096
    intermediate_size: Count = 11008
    num_hidden_layers: Count = 32
    num_attention_heads: Count = 32
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = (
        4096  # of Mistral, where nothing is said; the others have `use_sliding_window`
    )
    use_sliding_window: bool | None = None
    quantization_config: dict[str, Any] | None = None

    @property
    def rope(self) -> dict[str, Any]:
        """What is said of rotary positions, in the old words or the new."""
        said = {**(self.rope_scaling or {}), **(self.rope_parameters or {})}
        return {"rope_theta": self.rope_theta, **{key: x for key, x in said.items() if x is not None}}


# Of training, of transformers itself; `layer_types` and `max_window_layers` say where a window is that is refused.
_WITHOUT_EFFECT = {
    *("max_position_embeddings", "initializer_range", "use_cache", "attention_dropout", "pretraining_tp"),
    *("layer_types", "max_window_layers", "architectures", "dtype", "torch_dtype", "transformers_version"),
    *("_name_or_path", "unk_token_id", *TOKENS),
}


def read(path: Path, *, weights: bool = True) -> Found:
    """The model of a folder; weights: whether with them.

    Raises:
        UserError: options that this library does not compute, or weights that do not fit the configuration.
    """
    folder = Folder(path, weights=weights)
    args, notes = folder.arguments(LlamaArguments, _WITHOUT_EFFECT)
    config = model_config(args, path)
    tensors = {name: x for name, x in folder.tensors().items() if not name.endswith(_ANGLES)}
    if config.tie_embeddings:
        same(tensors, "lm_head.weight", "model.embed_tokens.weight", str(path))
    wanted = {renamed(name, NAMES): Wanted(name, shape) for name, shape in expected(config).items()}
    return folder.found("llama", config, tensors, wanted, notes)


def model_config(args: LlamaArguments, where: Path) -> ModelConfig:
    """The model that a configuration describes.

    Raises:
        UserError: options that this library does not compute, all of them; or sizes that cannot be.
    """
    kind, rope = args.model_type, args.rope
    refused = options(vars(args), _CANNOT)
    if args.hidden_act != "silu":
        refused.append(f"hidden_act = {args.hidden_act!r} (feed-forward networks other than SwiGLU)")
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        refused.append(f"rope_type = {scaling!r} (rotary positions that are scaled)")
    if args.sliding_window and (args.use_sliding_window or kind == "mistral"):
        refused.append(
            f"sliding_window = {args.sliding_window} (attention that forgets; for texts no longer than that set it to null)"
        )
    if refused:
        raise UserError(f"{where} cannot be run here, because its configuration has {'; '.join(refused)}")
    mixer = SoftmaxConfig(
        num_heads=args.num_attention_heads,
        kv_heads=_unless(args.num_key_value_heads, args.num_attention_heads),
        key_dim=_unless(args.head_dim, args.hidden_size // args.num_attention_heads),
        bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        qk_norm_eps=args.rms_norm_eps if kind == "qwen3" else SoftmaxConfig.qk_norm_eps,
        rotary_base=rope["rope_theta"] or 10000.0,
    )
    return ModelConfig(
        vocab_size=args.vocab_size,
        d_model=args.hidden_size,
        num_layers=args.num_hidden_layers,
        mixer=mixer,
        norm="rmsnorm",
        norm_eps=args.rms_norm_eps,
        ffn="swiglu",
        ffn_dim=args.intermediate_size,
        tie_embeddings=args.tie_word_embeddings,
        init="normal",
    )


def _unless(value: int | None, usual: int) -> int | None:
    """None for what is the default anyway."""
    return None if value == usual else value
