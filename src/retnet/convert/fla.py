"""Folders of flash-linear-attention (FLA), read and written.

What its RetNet computes, in this library's words: pairs turned in two halves with the usual rotary frequencies, the
paper's γ, an RMS head norm whose weight all heads share, RMS block norms, SwiGLU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retnet.convert.folders import Folder, folder_files
from retnet.convert.weights import TOKENS, Found, Wanted, expected, lightning_choices, options, renamed, same
from retnet.mixers import RetentionConfig
from retnet.model import ModelConfig
from retnet.model.checkpoint_layout import Files
from retnet.ops import frequencies, log_decays
from retnet.settings import UserError

# Ours → theirs, layers with {} for their number.
NAMES = {
    "embedding.weight": "model.embeddings.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "blocks.{}.mixer_norm.weight": "model.layers.{}.attn_norm.weight",
    "blocks.{}.mixer.q_proj.weight": "model.layers.{}.attn.q_proj.weight",
    "blocks.{}.mixer.k_proj.weight": "model.layers.{}.attn.k_proj.weight",
    "blocks.{}.mixer.v_proj.weight": "model.layers.{}.attn.v_proj.weight",
    "blocks.{}.mixer.gate_proj.weight": "model.layers.{}.attn.g_proj.weight",
    "blocks.{}.mixer.out_proj.weight": "model.layers.{}.attn.o_proj.weight",
    "blocks.{}.mixer.head_norm_weight": "model.layers.{}.attn.g_norm_swish_gate.weight",
    "blocks.{}.ffn_norm.weight": "model.layers.{}.mlp_norm.weight",
    "blocks.{}.ffn.fc1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.ffn.gate.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.ffn.fc2.weight": "model.layers.{}.mlp.down_proj.weight",
}
_FUSED, _SEPARATE = ".attn.g_norm_swish_gate.weight", ".attn.g_norm.weight"
_CANNOT = {
    "use_short_conv": "convolutions before retention",
    "attn": "layers of attention between those of retention",
    "feature_map": "a function of queries and keys",
    "attnres_block_size": "attention over the layers' residuals",
}


@dataclass(frozen=True)
class FlaArguments:
    """FLA's RetNetConfig, as far as it changes the function or the names of the weights."""

    hidden_size: int = 2048
    expand_k: float = 1.0
    expand_v: float = 2.0
    hidden_ratio: int | float | None = 2
    intermediate_size: int | None = None
    num_hidden_layers: int = 24
    num_heads: int = 8
    num_kv_heads: int | None = None
    hidden_act: str = "swish"
    use_output_gate: bool = True
    elementwise_affine: bool | None = True
    norm_eps: float = 1e-6
    fuse_norm: bool = True
    tie_word_embeddings: bool = False
    vocab_size: int = 32000
    norm_first: bool = True
    use_short_conv: bool = False
    attn: Any = None
    feature_map: str | None = None
    attnres_block_size: int | None = None


# Of training, of kernels, of transformers itself: the function is the same.
_WITHOUT_EFFECT = {
    *("attn_mode", "conv_size", "max_position_embeddings", "use_cache", "pad_token_id", "bos_token_id"),
    *("eos_token_id", "initializer_range", "fuse_swiglu", "fuse_cross_entropy", "use_l2warp"),
    *("fuse_linear_cross_entropy", "architectures", "auto_map", "dtype", "torch_dtype", "model_type"),
    *("transformers_version", "_name_or_path"),
}


def read(path: Path, *, weights: bool = True) -> Found:
    """The model of a folder; weights: whether with them.

    Raises:
        UserError: options that this library does not compute, or weights that do not fit the configuration.
    """
    folder = Folder(path, weights=weights)
    args, notes = folder.arguments(FlaArguments, _WITHOUT_EFFECT)
    config = model_config(args, str(path))
    tensors = folder.tensors()
    if config.tie_embeddings:
        same(tensors, "lm_head.weight", "model.embeddings.weight", str(path))
    if not any(name.endswith(_FUSED) for name in tensors):  # its kernels, fused or not, name the head norm
        tensors = {name.replace(_SEPARATE, _FUSED): x for name, x in tensors.items()}
    return folder.found("fla", config, tensors, _wanted(config, args), notes)


def model_config(args: FlaArguments, where: str) -> ModelConfig:
    """The model that a configuration describes.

    Raises:
        UserError: options that this library does not compute, all of them; or sizes that cannot be.
    """
    refused = options(vars(args), _CANNOT)
    if args.hidden_act not in ("swish", "silu"):
        refused.append(f"hidden_act = {args.hidden_act!r} (only swish is)")
    if not args.norm_first:
        refused.append("norm_first = False (norms inside the layers)")
    if refused:
        raise UserError(f"{where} cannot be run here, because its configuration has {'; '.join(refused)}")
    heads, kv_heads = args.num_heads, args.num_kv_heads or args.num_heads
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise UserError(f"{where}: num_kv_heads {kv_heads} does not divide num_heads {heads}")
    keys, values = (
        _whole(args.hidden_size * ratio, heads, where) for ratio in (args.expand_k, args.expand_v)
    )
    return ModelConfig(
        vocab_size=args.vocab_size,
        d_model=args.hidden_size,
        num_layers=args.num_hidden_layers,
        mixer=RetentionConfig(
            num_heads=heads,
            key_dim=keys // heads,
            value_dim=values // heads,
            gate=args.use_output_gate,
            head_norm="rms",
            head_norm_affine=bool(args.elementwise_affine),
            head_norm_eps=args.norm_eps,
            rotary="halves",
            rotary_spacing="geometric",
        ),
        norm="rmsnorm",
        norm_eps=args.norm_eps,
        ffn="swiglu",
        ffn_dim=args.intermediate_size or _ffn_dim(args),
        tie_embeddings=args.tie_word_embeddings,
        init="normal",
    )


def _whole(width: float, heads: int, where: str) -> int:
    """The width of all heads, which FLA keeps as a ratio."""
    if not math.isclose(width, round(width)) or round(width) % heads or width < heads:
        raise UserError(
            f"{where}: expand_k or expand_v gives {width} for {heads} heads, which they do not divide"
        )
    return round(width)


def _ffn_dim(args: FlaArguments) -> int:
    """⅔ · hidden_ratio · hidden_size, rounded up to a multiple of 256."""
    ratio = 4 if args.hidden_ratio is None else args.hidden_ratio
    return 256 * math.ceil(int(args.hidden_size * ratio * 2 / 3) / 256)


def _wanted(config: ModelConfig, args: FlaArguments) -> dict[str, Wanted]:
    """Their tensors. Heads share a norm's weight there, and groups of heads share keys and values."""
    heads = args.num_heads
    groups = heads // (args.num_kv_heads or heads)
    wanted = {}
    for name, shape in expected(config).items():
        want = Wanted(name, shape)
        if name.endswith(".head_norm_weight"):
            want = Wanted(name, (shape[0] // heads,), lambda x: x.repeat(heads))
        elif groups > 1 and name.endswith((".k_proj.weight", ".v_proj.weight")):
            share = partial(_shared, heads=heads // groups, groups=groups)
            want = Wanted(name, (shape[0] // groups, shape[1]), share)
        wanted[renamed(name, NAMES)] = want
    return wanted


def _shared(x: Tensor, heads: int, groups: int) -> Tensor:
    """The rows of every head [heads · W, D], once for each head of its group: [heads · groups · W, D]."""
    return torch.unflatten(x, 0, (heads, -1)).repeat_interleave(groups, dim=0).flatten(0, 1)


def files(found: Found) -> Files:
    """``config.json`` and the weights, in shards where they are large.

    Raises:
        UserError: FLA has no configuration for this model; all reasons are listed.
    """
    if reasons := cannot_express(found.config, found.tensors):
        raise UserError(f"flash-linear-attention cannot express this model: {'; '.join(reasons)}")
    return folder_files(_config(found), _theirs(found.config, found.tensors))


def cannot_express(config: ModelConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """Everything about a model for which FLA has no configuration; nothing where it has one."""
    mixer = config.mixer
    if not isinstance(mixer, RetentionConfig):
        return [f"its mixer is {mixer.name!r}, not retention"]
    if not config.is_uniform:
        return ["its layers differ (model.layers, ffn_layers, ffn_dims)"]
    heads, (key_dim, _) = mixer.num_heads, mixer.widths(config.d_model)
    turns = mixer.rotary != "none" and torch.equal(
        frequencies(key_dim, mixer.rotary_spacing, mixer.rotary_base), frequencies(key_dim, "geometric")
    )
    norms = [x.view(heads, -1) for name, x in tensors.items() if name.endswith(".head_norm_weight")]
    reasons = {
        f"mixer.decay = {mixer.decay!r} (it has 1 − 2^(−5−h) alone)": not torch.equal(
            log_decays(mixer.decay, heads), log_decays("paper", heads)
        ),
        f"mixer.rotary = {mixer.rotary!r}, rotary_spacing = {mixer.rotary_spacing!r}, rotary_base = "
        f"{mixer.rotary_base:g} (it has the frequencies 10000^(−2i/K) alone)": not turns,
        f"keys of {key_dim} per head (it has 256 at most)": key_dim > 256,
        f"mixer.head_norm = {mixer.head_norm!r} (it has 'rms' alone)": mixer.head_norm != "rms",
        "a head norm with a weight for each head (one weight for all)": any(
            not (x == x[:1]).all() for x in norms
        ),
        f"mixer.score_norm = {mixer.score_norm!r} (it has none)": mixer.score_norm not in (None, "none"),
        f"mixer.head_norm_eps = {mixer.head_norm_eps:g} and norm_eps = {config.norm_eps:g} (one ε for all norms)": (
            mixer.head_norm_eps != config.norm_eps
        ),
        f"norm = {config.norm!r} (it has 'rmsnorm' alone)": config.norm != "rmsnorm",
        f"ffn = {config.ffn!r} (it has 'swiglu' alone)": config.ffn != "swiglu",
        "embedding_scale (it has none)": config.embedding_scale,
        "embedding_norm (it has none)": config.embedding_norm,
    }
    return lightning_choices(config) + [reason for reason, holds in reasons.items() if holds]


def _config(found: Found) -> dict[str, Any]:
    config, mixer = found.config, found.config.mixer
    assert isinstance(mixer, RetentionConfig)  # `cannot_express` saw to it
    key_dim, value_dim = mixer.widths(config.d_model)
    return {
        "architectures": ["RetNetForCausalLM"],
        "model_type": "retnet",
        "attn_mode": "chunk",
        "hidden_size": config.d_model,
        "expand_k": mixer.num_heads * key_dim / config.d_model,
        "expand_v": mixer.num_heads * value_dim / config.d_model,
        "hidden_ratio": None,
        "intermediate_size": config.ffn_dim or 2 * config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_heads": mixer.num_heads,
        "num_kv_heads": None,
        "hidden_act": "swish",
        "use_output_gate": mixer.gate,
        "elementwise_affine": mixer.head_norm_affine,
        "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
        "dtype": str(found.dtype).removeprefix("torch."),
        **{key: found.tokens.get(key) for key in TOKENS},
    }


def _theirs(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights by their names: one head's norm for all, pairs laid out in halves."""
    mixer = config.mixer
    assert isinstance(mixer, RetentionConfig)
    theirs = {}
    for name, x in tensors.items():
        if name.endswith(".head_norm_weight"):
            x = x.view(mixer.num_heads, -1)[0].clone()
        if mixer.rotary == "interleaved" and name.endswith((".q_proj.weight", ".k_proj.weight")):
            x = halves(x, mixer.num_heads)
        key = renamed(name, NAMES)
        theirs[key if mixer.gate else key.replace(_FUSED, _SEPARATE)] = x
    return theirs


def halves(x: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys [H · K, D]: pairs (2i, 2i + 1) of each head become (i, i + K/2)."""
    return torch.unflatten(x, 0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
