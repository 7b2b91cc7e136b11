"""Checkpoints of other libraries: the real ones in tests/golden, and others made like them."""

import json
import math
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parents[1] / "golden"

TORCHSCALE = {
    "vocab_size": 53,
    "decoder_embed_dim": 24,
    "decoder_value_embed_dim": 36,
    "decoder_retention_heads": 3,
    "decoder_ffn_embed_dim": 20,
    "decoder_layers": 2,
}
SYNCDOTH = {**TORCHSCALE, "model_type": "retnet"}
FLA = {
    "model_type": "retnet",
    "hidden_size": 24,
    "num_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 20,
    "vocab_size": 53,
}


def golden(name):
    """Tokens and logits of a golden checkpoint."""
    expected = load_file(GOLDEN / name / "expected.safetensors")
    return expected["input_ids"], expected["logits"]


def random_matrices(seed, dtype):
    """(matrix(rows, columns, gain), norm(width)), drawn one after another."""
    g = torch.Generator().manual_seed(seed)

    def matrix(rows, columns, gain=1.0):
        return (torch.randn(rows, columns, generator=g, dtype=torch.float64) * gain * columns**-0.5).to(dtype)

    def norm(width):
        return (1 + 0.3 * torch.randn(width, generator=g, dtype=torch.float64)).to(dtype)

    return matrix, norm


def torchscale_weights(args, *, scale=1.0, dtype=torch.float32, seed=0):
    """Weights by torchscale's names, without its buffers; `scale` multiplies queries and keys."""
    matrix, norm = random_matrices(seed, dtype)
    d, v, f = args["decoder_embed_dim"], args["decoder_value_embed_dim"], args["decoder_ffn_embed_dim"]
    weights = {"embed_tokens.weight": matrix(args["vocab_size"], d, d**0.5), "layer_norm.weight": norm(d)}
    if args.get("layernorm_embedding"):
        weights["layernorm_embedding.weight"] = norm(d)
    for i in range(args["decoder_layers"]):
        weights |= {
            f"layers.{i}.retention.q_proj.weight": matrix(d, d, scale),
            f"layers.{i}.retention.k_proj.weight": matrix(d, d, scale),
            f"layers.{i}.retention.v_proj.weight": matrix(v, d),
            f"layers.{i}.retention.g_proj.weight": matrix(v, d),
            f"layers.{i}.retention.out_proj.weight": matrix(d, v),
            f"layers.{i}.retention_layer_norm.weight": norm(d),
            f"layers.{i}.ffn.fc1.weight": matrix(f, d),
            f"layers.{i}.ffn.gate.weight": matrix(f, d),
            f"layers.{i}.ffn.fc2.weight": matrix(d, f),
            f"layers.{i}.final_layer_norm.weight": norm(d),
        }
    tied = args.get("share_decoder_input_output_embed")
    head = weights["embed_tokens.weight"] if tied else matrix(args["vocab_size"], d)
    return {**weights, "output_projection.weight": head}


def torchscale_buffers(args):
    """What torchscale, and syncdoth/RetNet, register beside their weights."""
    heads = args["decoder_retention_heads"]
    angle = 1.0 / (10000 ** torch.linspace(0, 1, args["decoder_embed_dim"] // heads // 2))
    decay = torch.log(1 - 2 ** (-5 - torch.arange(heads, dtype=torch.float)))
    if args.get("use_lm_decay"):
        decay = torch.log(1 - torch.linspace(math.log(1 / 32), math.log(1 / 512), heads).exp())
    return {
        "retnet_rel_pos.angle": angle.unsqueeze(-1).repeat(1, 2).flatten(),
        "retnet_rel_pos.decay": decay,
    }


def save_torchscale(folder, state, args=None, **content):
    """Writes ``checkpoint.pt``, and ``config.json`` if there are arguments to stand beside it: the checkpoint's path."""
    folder.mkdir(parents=True)
    torch.save({"model": state, **content}, folder / "checkpoint.pt")
    if args is not None:
        (folder / "config.json").write_text(json.dumps(args))
    return folder / "checkpoint.pt"


def syncdoth_weights(config, **options):
    """Weights by the names of syncdoth/RetNet, buffers among them; the options are those of `torchscale_weights`."""
    tied = config.get("tie_word_embeddings")
    args = {**config, "share_decoder_input_output_embed": tied}
    weights = {**torchscale_weights(args, **options), **torchscale_buffers(config)}
    head = weights.pop("output_projection.weight")
    return {f"model.{name}": x for name, x in weights.items()} | ({} if tied else {"lm_head.weight": head})


def save_folder(folder, weights, config):
    """Writes a folder in the layout of transformers: its path."""
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fla_weights(config, *, dtype=torch.float32, seed=0):
    """Weights by the names of flash-linear-attention."""
    matrix, norm = random_matrices(seed, dtype)
    d, heads = config["hidden_size"], config["num_heads"]
    keys = round(d * config.get("expand_k", 1.0))
    values = round(d * config.get("expand_v", 2.0))
    share = heads // (config.get("num_kv_heads") or heads)
    f = config.get("intermediate_size") or 256 * -(-int(d * (config.get("hidden_ratio") or 4) * 2 / 3) // 256)
    gate = config.get("use_output_gate", True)
    head_norm = "g_norm_swish_gate" if gate and config.get("fuse_norm", True) else "g_norm"
    weights = {
        "model.embeddings.weight": matrix(config["vocab_size"], d, d**0.5),
        "model.norm.weight": norm(d),
    }
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        weights |= {
            at + "attn.q_proj.weight": matrix(keys, d),
            at + "attn.k_proj.weight": matrix(keys // share, d),
            at + "attn.v_proj.weight": matrix(values // share, d),
            at + "attn.o_proj.weight": matrix(d, values),
            at + "attn_norm.weight": norm(d),
            at + "mlp_norm.weight": norm(d),
            at + "mlp.gate_proj.weight": matrix(f, d),
            at + "mlp.up_proj.weight": matrix(f, d),
            at + "mlp.down_proj.weight": matrix(d, f),
        }
        if gate:
            weights[at + "attn.g_proj.weight"] = matrix(values, d)
        if config.get("elementwise_affine", True):
            weights[f"{at}attn.{head_norm}.weight"] = norm(values // heads)
    if not config.get("tie_word_embeddings"):
        weights["lm_head.weight"] = matrix(config["vocab_size"], d)
    return weights


class Payload:
    """Runs a command as soon as it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)
