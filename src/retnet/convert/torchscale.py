"""torchscale's checkpoints (``.pt`` with a key ``model``), with the arguments of its own config or of fairseq.

What it computes, in this library's words: queries and keys turned in interleaved pairs, frequencies with the end point,
rows of D divided by √Σ under an RMS head norm (`score_norm` "decay"), and a clamp of Σ|R| that has no recurrent form.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retnet.convert.folders import as_object
from retnet.convert.torch_files import arguments_of, checkpoint_file, load, state_of
from retnet.convert.weights import Found, Wanted, expected, fit, options, renamed, same
from retnet.errors import told
from retnet.io import sha256
from retnet.mixers import RetentionConfig
from retnet.model import ModelConfig
from retnet.ops import Decay, frequencies, log_decays
from retnet.settings import UserError, build

# Ours → theirs, layers with {} for their number.
NAMES = {
    "embedding.weight": "embed_tokens.weight",
    "embedding_norm.weight": "layernorm_embedding.weight",
    "norm.weight": "layer_norm.weight",
    "head.weight": "output_projection.weight",
    "blocks.{}.mixer_norm.weight": "layers.{}.retention_layer_norm.weight",
    "blocks.{}.mixer.q_proj.weight": "layers.{}.retention.q_proj.weight",
    "blocks.{}.mixer.k_proj.weight": "layers.{}.retention.k_proj.weight",
    "blocks.{}.mixer.v_proj.weight": "layers.{}.retention.v_proj.weight",
    "blocks.{}.mixer.gate_proj.weight": "layers.{}.retention.g_proj.weight",
    "blocks.{}.mixer.out_proj.weight": "layers.{}.retention.out_proj.weight",
    "blocks.{}.ffn_norm.weight": "layers.{}.final_layer_norm.weight",
    "blocks.{}.ffn.fc1.weight": "layers.{}.ffn.fc1.weight",
    "blocks.{}.ffn.gate.weight": "layers.{}.ffn.gate.weight",
    "blocks.{}.ffn.fc2.weight": "layers.{}.ffn.fc2.weight",
}
ANGLE, DECAY = "retnet_rel_pos.angle", "retnet_rel_pos.decay"
_BUFFER = re.compile(r"(^|\.)(retnet_rel_pos\.\w+|version|_float_tensor)$")
_CANNOT = {
    "multiway": "two sets of weights for two modalities",
    "moe_freq": "mixture-of-experts layers",
    "use_xmoe": "mixture-of-experts layers",
    "deepnorm": "norms after the residual, which is scaled",
    "no_output_layer": "there is no head, so there are no logits",
}
# fairseq's architectures name their heads; their other sizes show in the weights.
_HEADS = {"base": 2, "medium": 4, "xl": 8, "3b": 10, "7b": 16, "13b": 20, "65b": 32}


@dataclass(frozen=True)
class Options:
    """What changes the function of torchscale's decoder and of its heirs, sizes excepted."""

    activation_fn: str = "gelu"
    no_scale_embedding: bool = True
    layernorm_embedding: bool = False
    layernorm_eps: float = 1e-6
    decoder_normalize_before: bool = True
    subln: bool | None = None
    deepnorm: bool = False
    dropout: float = 0.0


@dataclass(frozen=True)
class TorchscaleArguments(Options):
    """torchscale's RetNetConfig: what changes the function, then what does not. None: to be seen in the weights."""

    decoder_embed_dim: int | None = None
    decoder_value_embed_dim: int | None = None
    decoder_retention_heads: int | None = None
    decoder_ffn_embed_dim: int | None = None
    decoder_layers: int | None = None
    vocab_size: int = -1
    share_decoder_input_output_embed: bool = False
    multiway: bool = False
    moe_freq: int = 0
    use_xmoe: bool = False
    no_output_layer: bool = False
    chunkwise_recurrent: bool = False
    activation_dropout: float = 0.0
    drop_path_rate: float = 0.0
    recurrent_chunk_size: int = 512
    moe_top1_expert: Any = None
    moe_expert_count: Any = None
    moe_gating_use_fp32: Any = None
    moe_eval_capacity_token_fraction: Any = None
    moe_second_expert_policy: Any = None
    moe_normalize_gate_prob_before_dropping: Any = None
    rel_pos_buckets: Any = None
    max_rel_pos: Any = None
    max_target_positions: Any = None
    checkpoint_activations: Any = None
    fsdp: Any = None
    ddp_rank: Any = None
    xpos_rel_pos: Any = None
    xpos_scale_base: Any = None


def read(path: Path, config: Path | None = None) -> Found:
    """The model of a checkpoint file, or of a folder with one such file.

    Args:
        path: the checkpoint.
        config: a JSON with its arguments; None takes those in the checkpoint, else a ``config.json`` beside it.

    Raises:
        UserError: the file cannot be read or holds more than data, arguments are missing or ask for what this library
            does not compute, or the tensors do not fit them.
    """
    file = checkpoint_file(path)
    content = load(file)
    tensors = state_of(content, file)
    hashes = {file.name: sha256(file)}
    args = arguments_of(content)
    beside = file.parent / "config.json"
    if config is None and args is None and beside.is_file():
        config = beside
    if config is not None:
        with told(f"read the arguments {config}"):
            data = config.read_bytes()
        args = as_object(data, config)
        hashes[config.name] = sha256(config)
    if args is None:
        raise UserError(
            f"{file} holds no arguments (no 'args' or 'cfg'), and there is no config.json beside it; "
            "give them with --config, a JSON with torchscale's names, such as decoder_retention_heads"
        )
    buffers = {name: tensors.pop(name) for name in list(tensors) if _BUFFER.search(name)}
    given, notes = _arguments(args, file)
    model = model_config(given, tensors, buffers, file)
    if model.tie_embeddings:
        same(tensors, "output_projection.weight", "embed_tokens.weight", str(file))
    wanted = {renamed(name, NAMES): Wanted(name, shape) for name, shape in expected(model).items()}
    if given.chunkwise_recurrent:
        notes.append(
            "its arguments choose torchscale's chunkwise form, which differs from its parallel form by up to 1e-2; "
            "the parallel form is what was converted"
        )
    return Found("torchscale", model, fit(tensors, wanted, str(file)), hashes, notes=tuple(notes))


def _arguments(args: Mapping[str, Any], file: Path) -> tuple[TorchscaleArguments, list[str]]:
    """The arguments that matter, and a note on those of a plain config that are not known here.

    Raises:
        UserError: a value of the wrong type.
    """
    inner = args.get("model")  # the section of the model, as fairseq keeps it
    inner = vars(inner) if isinstance(inner, argparse.Namespace) else inner
    args = inner if isinstance(inner, Mapping) else args
    arch = str(args.get("arch") or args.get("_name") or "")
    given: dict[str, Any] = {}
    if arch.startswith("retnet"):  # fairseq, whose defaults are others
        given = {"activation_fn": "swish", "no_scale_embedding": False}
        if (heads := _HEADS.get(arch.removeprefix("retnet_"))) is not None:
            given["decoder_retention_heads"] = heads
    known = {field.name for field in fields(TorchscaleArguments)}
    given |= {key: value for key, value in args.items() if key in known and value is not None}
    unknown = [] if arch else sorted(str(key) for key in args.keys() - known)
    notes = [f"not known here, so without effect: {', '.join(unknown)}"] if unknown else []
    try:
        return build(TorchscaleArguments, given), notes
    except UserError as error:
        raise UserError(f"the arguments of {file}: {error}") from None


def model_config(
    args: TorchscaleArguments, tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor], file: Path
) -> ModelConfig:
    """What arguments and weights describe; a size that no argument gives is taken from the weights.

    Raises:
        UserError: options that this library does not compute, all of them; or sizes that cannot be.
    """
    if refused := cannot_compute(args):
        raise UserError(f"{file} cannot be run here, because its arguments have {'; '.join(refused)}")

    def size(given: int | None, tensor: str, dim: int = 0) -> int:
        if given is None and (tensor not in tensors or tensors[tensor].dim() != 2):
            raise UserError(
                f"{file} has no matrix {tensor}, so it is no RetNet of torchscale, or its arguments are not complete"
            )
        return tensors[tensor].shape[dim] if given is None else given

    def buffer(name: str) -> Tensor | None:
        return next((x for key, x in buffers.items() if key.endswith(name)), None)

    decay, layers = buffer(DECAY), {i[1] for name in tensors if (i := re.match(r"layers\.(\d+)\.", name))}
    width = size(args.decoder_embed_dim, "embed_tokens.weight", 1)
    values = size(args.decoder_value_embed_dim, "layers.0.retention.v_proj.weight")
    given = args.decoder_retention_heads or (None if decay is None else decay.numel())
    heads = check_heads(given, width, values, file)
    model = dialect(
        args,
        vocab_size=size(None if args.vocab_size < 0 else args.vocab_size, "embed_tokens.weight"),
        width=width,
        values=values,
        ffn_dim=size(args.decoder_ffn_embed_dim, "layers.0.ffn.fc1.weight"),
        layers=len(layers) if args.decoder_layers is None else args.decoder_layers,
        heads=heads,
        decay=_decay(decay, heads, file),
        tied=args.share_decoder_input_output_embed,
    )
    check_angles(buffer(ANGLE), width // heads, file)
    return model


def cannot_compute(args: Options) -> list[str]:
    """Options that this library does not compute, with what they would change."""
    refused = options(vars(args), _CANNOT)
    if args.activation_fn not in ("gelu", "swish"):
        refused.append(f"activation_fn = {args.activation_fn!r} (only gelu and swish are)")
    if not args.decoder_normalize_before and not args.subln:  # subln makes torchscale forget it
        refused.append("decoder_normalize_before = False (norms after the residual)")
    return refused


def check_heads(heads: int | None, width: int, values: int, where: Path) -> int:
    """The heads themselves.

    Raises:
        UserError: they are not known, or do not divide the widths of keys and values.
    """
    if heads is None or heads < 1 or width % heads or values % heads:
        raise UserError(
            f"{where}: decoder_retention_heads is {heads}; it must be given, and divide the widths of keys, {width}, "
            f"and of values, {values}"
        )
    return heads


def dialect(
    args: Options,
    *,
    vocab_size: int,
    width: int,
    values: int,
    ffn_dim: int,
    layers: int,
    heads: int,
    decay: Decay,
    tied: bool,
) -> ModelConfig:
    """The model that torchscale's code makes of these options and sizes; `width` and `values` are those of all heads."""
    mixer = RetentionConfig(
        num_heads=heads,
        value_dim=values // heads,
        decay=decay,
        head_norm="rms",
        head_norm_eps=args.layernorm_eps,
        score_norm="decay",
    )
    mixer.widths(width)
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=width,
        num_layers=layers,
        mixer=mixer,
        norm="rmsnorm",
        norm_eps=args.layernorm_eps,
        ffn="swiglu" if args.activation_fn == "swish" else "geglu",
        ffn_dim=ffn_dim,
        tie_embeddings=tied,
        embedding_scale=not args.no_scale_embedding,
        embedding_norm=args.layernorm_embedding,
        dropout=args.dropout,
    )


def _decay(buffer: Tensor | None, heads: int, file: Path) -> Decay:
    """The paper's γ, which torchscale hard-codes, unless the checkpoint was made with others.

    torchscale stores ln γ in the type of its weights, and in fp32 rounds γ to 1 from the 20th head on, so the buffer is
    only trusted where it differs by more than that.
    """
    if buffer is None:
        return "paper"
    if buffer.shape != (heads,):
        raise UserError(
            f"{file}: decoder_retention_heads is {heads}, but the checkpoint's decay is of {buffer.numel()} heads"
        )
    stored, paper = buffer.double(), log_decays("paper", heads).double()
    if torch.allclose(stored, paper, rtol=1e-2, atol=1e-7):
        return "paper"
    if not bool(((stored <= 0) & stored.isfinite()).all()):
        raise UserError(f"{file}: {DECAY} holds {stored.tolist()}, which are no logarithms of decays")
    return tuple(stored.exp().tolist())


def check_angles(stored: Tensor | None, key_dim: int, file: Path) -> None:
    """Refuses a checkpoint of changed code, whose rotation is another."""
    if stored is None:
        return
    angles = frequencies(key_dim).repeat_interleave(2)
    if stored.shape != angles.shape or not torch.allclose(stored.double(), angles, rtol=1e-2, atol=1e-7):
        raise UserError(
            f"{file}: {ANGLE} is not what torchscale computes for heads of width {key_dim}; "
            "decoder_retention_heads is wrong, or the model was trained with changed code"
        )
