"""Hugging Face folders of syncdoth/RetNet, the format of the RetNets on the hub, read and written.

What it computes is torchscale's function, its clamp in the parallel form alone; the paper's other decays are an option.
Its ``model_type`` is "retnet", as flash-linear-attention's is: the keys of its configuration tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retnet.convert import torchscale
from retnet.convert.folders import Folder, folder_files
from retnet.convert.torch_files import without_prefix
from retnet.convert.torchscale import ANGLE, DECAY
from retnet.convert.weights import TOKENS, Found, Wanted, expected, lightning_choices, renamed, same
from retnet.mixers import RetentionConfig
from retnet.model import ModelConfig
from retnet.model.checkpoint_layout import Files
from retnet.ops import Decay, frequencies, log_decays
from retnet.settings import UserError

# Ours → theirs, without the prefix "model." that all but the head have.
NAMES = torchscale.NAMES | {"head.weight": "lm_head.weight"}
PREFIX = "model."
DECAYS: dict[bool, Decay] = {False: "paper", True: "experiments"}  # by `use_lm_decay`
ACTIVATIONS = {"swiglu": "swish", "geglu": "gelu"}


@dataclass(frozen=True)
class SyncdothArguments(torchscale.Options):
    """Its RetNetConfig, as far as it changes the function, with its defaults."""

    subln: bool | None = True
    vocab_size: int = 50257
    decoder_embed_dim: int = 768
    decoder_value_embed_dim: int = 1280
    decoder_ffn_embed_dim: int = 1280
    decoder_layers: int = 12
    decoder_retention_heads: int = 3
    use_lm_decay: bool = False
    use_glu: bool = True
    tie_word_embeddings: bool = False


# Of training, of the form it computes, of transformers itself, or of what `use_glu` = false alone has.
_WITHOUT_EFFECT = {
    *("activation_dropout", "drop_path_rate", "initializer_range", "z_loss_coeff", "recurrent_chunk_size"),
    *(
        "forward_impl",
        "use_ffn_rms_norm",
        "disable_fused_ops",
        "is_decoder",
        "use_cache",
        "output_retentions",
    ),
    *("architectures", "auto_map", "dtype", "torch_dtype", "model_type", "transformers_version"),
    *("_name_or_path", "unk_token_id", *TOKENS),
}


def read(path: Path, *, weights: bool = True) -> Found:
    """The model of a folder; weights: whether with them.

    Raises:
        UserError: options that this library does not compute, or weights or buffers that do not fit the configuration.
    """
    folder = Folder(path, weights=weights)
    args, notes = folder.arguments(SyncdothArguments, _WITHOUT_EFFECT)
    config = model_config(args, path)
    tensors = without_prefix(folder.tensors(pickles=True), PREFIX, path)
    _check_buffers(tensors, config, path)
    if config.tie_embeddings:
        same(tensors, "lm_head.weight", "embed_tokens.weight", str(path))
    wanted = {renamed(name, NAMES): Wanted(name, shape) for name, shape in expected(config).items()}
    tensors = {name: x for name, x in tensors.items() if name not in (ANGLE, DECAY)}
    return folder.found("syncdoth", config, tensors, wanted, notes)


def model_config(args: SyncdothArguments, where: Path) -> ModelConfig:
    """The model that a configuration describes.

    Raises:
        UserError: options that this library does not compute, all of them; or sizes that cannot be.
    """
    refused = torchscale.cannot_compute(args)
    if not args.use_glu:
        refused.append(
            "use_glu = False (feed-forward networks without a gate, with biases and a norm inside)"
        )
    if refused:
        raise UserError(f"{where} cannot be run here, because its configuration has {'; '.join(refused)}")
    width, values = args.decoder_embed_dim, args.decoder_value_embed_dim
    return torchscale.dialect(
        args,
        vocab_size=args.vocab_size,
        width=width,
        values=values,
        ffn_dim=args.decoder_ffn_embed_dim,
        layers=args.decoder_layers,
        heads=torchscale.check_heads(args.decoder_retention_heads, width, values, where),
        decay=DECAYS[args.use_lm_decay],
        tied=args.tie_word_embeddings,
    )


def _check_buffers(tensors: Mapping[str, Tensor], config: ModelConfig, where: Path) -> None:
    """Refuses a folder whose stored angles or decays are not those of its configuration.

    They are stored in the type of the weights, so only what is coarser than rounding counts.
    """
    mixer = _retention(config)
    torchscale.check_angles(tensors.get(ANGLE), mixer.widths(config.d_model)[0], where)
    stored, heads = tensors.get(DECAY), mixer.num_heads
    if stored is None:
        return
    fits = [
        use_lm_decay
        for use_lm_decay, name in DECAYS.items()
        if stored.shape == (heads,)
        and torch.allclose(stored.double(), log_decays(name, heads).double(), rtol=1e-2, atol=1e-7)
    ]
    given = mixer.decay == DECAYS[True]
    if given not in fits:
        advice = f"{not given} would fit" if fits else "the model was trained with changed code"
        raise UserError(
            f"{where}: {DECAY} holds {stored.tolist()}, which is not what use_lm_decay = {given} gives {heads} heads; "
            f"{advice}, so correct config.json, or remove the buffer where it is wrong"
        )


def files(found: Found) -> Files:
    """``config.json`` and the weights, in shards where they are large.

    Raises:
        UserError: the format has no configuration for this model; all reasons are listed.
    """
    if reasons := cannot_express(found.config):
        raise UserError(f"syncdoth's format cannot express this model: {'; '.join(reasons)}")
    return folder_files(_config(found), _theirs(found.config, found.tensors))


def cannot_express(config: ModelConfig) -> list[str]:
    """Everything about a model for which the format has no configuration; nothing where it has one."""
    mixer = config.mixer
    if not isinstance(mixer, RetentionConfig):
        return [f"its mixer is {mixer.name!r}, not retention"]
    if not config.is_uniform:
        return ["its layers differ (model.layers, ffn_layers, ffn_dims)"]
    heads, (key_dim, _) = mixer.num_heads, mixer.widths(config.d_model)
    turns = mixer.rotary != "none" and torch.equal(
        frequencies(key_dim, mixer.rotary_spacing, mixer.rotary_base), frequencies(key_dim)
    )
    reasons = {
        f"mixer.decay = {mixer.decay!r} (it has 'paper' and 'experiments' alone)": _use_lm_decay(mixer)
        is None,
        f"mixer.rotary = {mixer.rotary!r}, rotary_spacing = {mixer.rotary_spacing!r}, rotary_base = "
        f"{mixer.rotary_base:g} (it has the frequencies 10000^−linspace(0, 1, K/2) alone)": not turns,
        f"mixer.key_dim = {key_dim} for {heads} heads (its keys are as wide as the model, {config.d_model})": (
            heads * key_dim != config.d_model
        ),
        "mixer.gate = False (it always has one)": not mixer.gate,
        f"mixer.head_norm = {mixer.head_norm!r} (it has 'rms' alone)": mixer.head_norm != "rms",
        "mixer.head_norm_affine (its head norm has no weights)": mixer.head_norm_affine,
        f"mixer.score_norm = {mixer.score_norm or 'none'!r} (it has 'decay', and 'torchscale' in its parallel form)": (
            mixer.score_norm not in ("decay", "torchscale")
        ),
        f"mixer.head_norm_eps = {mixer.head_norm_eps:g} and norm_eps = {config.norm_eps:g} (one ε for all norms)": (
            mixer.head_norm_eps != config.norm_eps
        ),
        f"norm = {config.norm!r} (it has 'rmsnorm' alone)": config.norm != "rmsnorm",
        f"ffn = {config.ffn!r} (it has 'swiglu' and 'geglu')": config.ffn not in ACTIVATIONS,
    }
    return lightning_choices(config) + [reason for reason, holds in reasons.items() if holds]


def _use_lm_decay(mixer: RetentionConfig) -> bool | None:
    """The option that means this γ; None where there is none."""
    own = log_decays(mixer.decay, mixer.num_heads)
    fits = [key for key, name in DECAYS.items() if torch.equal(own, log_decays(name, mixer.num_heads))]
    return fits[0] if fits else None


def _config(found: Found) -> dict[str, Any]:
    config, mixer = found.config, _retention(found.config)
    return {
        "architectures": ["RetNetForCausalLM"],
        "model_type": "retnet",
        "vocab_size": config.vocab_size,
        "decoder_embed_dim": config.d_model,
        "decoder_value_embed_dim": mixer.num_heads * mixer.widths(config.d_model)[1],
        "decoder_ffn_embed_dim": config.ffn_dim or 2 * config.d_model,
        "decoder_layers": config.num_layers,
        "decoder_retention_heads": mixer.num_heads,
        "activation_fn": ACTIVATIONS[config.ffn],
        "no_scale_embedding": not config.embedding_scale,
        "layernorm_embedding": config.embedding_norm,
        "layernorm_eps": config.norm_eps,
        "use_lm_decay": _use_lm_decay(mixer),
        "use_glu": True,
        "deepnorm": False,
        "subln": True,
        "decoder_normalize_before": True,
        "dropout": config.dropout,
        "forward_impl": "parallel",
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": str(found.dtype).removeprefix("torch."),
        **{key: found.tokens.get(key) for key in TOKENS},
    }


def _theirs(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights by their names, pairs interleaved, and the buffers that their code keeps among them."""
    mixer = _retention(config)
    theirs = {
        PREFIX + ANGLE: frequencies(mixer.widths(config.d_model)[0]).repeat_interleave(2).float(),
        PREFIX + DECAY: log_decays(mixer.decay, mixer.num_heads),
    }
    for name, x in tensors.items():
        if mixer.rotary == "halves" and name.endswith((".q_proj.weight", ".k_proj.weight")):
            x = interleaved(x, mixer.num_heads)
        theirs[renamed(name, NAMES) if name == "head.weight" else PREFIX + renamed(name, NAMES)] = x
    return theirs


def _retention(config: ModelConfig) -> RetentionConfig:
    assert isinstance(config.mixer, RetentionConfig)  # as it is read, and as `cannot_express` saw to it
    return config.mixer


def interleaved(x: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys [H · K, D]: pairs (i, i + K/2) of each head become (2i, 2i + 1)."""
    return torch.unflatten(x, 0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
