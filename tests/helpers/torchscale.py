"""torchscale's RetNet in its parallel form, written from its equations: the judge of what a conversion must reproduce.

syncdoth/RetNet computes the same, and has the paper's other decays as the option `use_lm_decay`.

Everything is computed in one type, so in fp64 it is exact where torchscale itself narrows to fp32.
"""

import math

import torch
import torch.nn.functional as F

DEFAULTS = {
    "activation_fn": "gelu",
    "no_scale_embedding": True,
    "layernorm_embedding": False,
    "share_decoder_input_output_embed": False,
    "layernorm_eps": 1e-6,
    "use_lm_decay": False,
}


def logits(weights, args, tokens, *, clamp=True, dtype=torch.float64):
    """Tokens [B,T] to logits [B,T,vocab], with `weights` as torchscale names them, without ``decoder.``."""
    args = {**DEFAULTS, **args}
    w = {name: x.to(dtype) for name, x in weights.items()}
    eps, heads = args["layernorm_eps"], args["decoder_retention_heads"]
    gamma = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))
    if args["use_lm_decay"]:
        gamma = 1 - torch.linspace(math.log(1 / 32), math.log(1 / 512), heads, dtype=torch.float64).exp()
    act = {"gelu": F.gelu, "swish": F.silu}[args["activation_fn"]]

    def norm(x, weight=None):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x if weight is None else x * w[weight]

    x = w["embed_tokens.weight"][tokens]
    if not args["no_scale_embedding"]:
        x = x * math.sqrt(x.shape[-1])
    if args["layernorm_embedding"]:
        x = norm(x, "layernorm_embedding.weight")
    for i in range(args["decoder_layers"]):
        at = f"layers.{i}."
        h = norm(x, at + "retention_layer_norm.weight")
        q, k, v, g = (h @ w[f"{at}retention.{name}_proj.weight"].T for name in "qkvg")
        o = norm(_retain(q, k, v, gamma, clamp)).flatten(-2)
        x = x + (F.silu(g) * o) @ w[at + "retention.out_proj.weight"].T
        h = norm(x, at + "final_layer_norm.weight")
        h = act(h @ w[at + "ffn.fc1.weight"].T) * (h @ w[at + "ffn.gate.weight"].T)
        x = x + h @ w[at + "ffn.fc2.weight"].T
    tied = args["share_decoder_input_output_embed"]
    return norm(x, "layer_norm.weight") @ w["embed_tokens.weight" if tied else "output_projection.weight"].T


def _retain(q, k, v, gamma, clamp):
    """q, k [B,T,D], v [B,T,H·V] → [B,T,H,V]: turned by position, decayed, rows of D by √sum, scores by clamp(Σ|R|)."""
    q, k, v = (x.unflatten(-1, (len(gamma), -1)).transpose(1, 2) for x in (q, k, v))  # [B,H,T,·]
    T, K = q.shape[-2:]
    angle = torch.arange(T)[:, None] * 10000.0 ** -torch.linspace(0, 1, K // 2, dtype=torch.float64)
    cos, sin = angle.cos().to(v.dtype), angle.sin().to(v.dtype)

    def turn(x):
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    distance = torch.arange(T)[:, None] - torch.arange(T)
    decay = (gamma[:, None, None] ** distance.clamp(min=0)).tril()
    decay = (decay / decay.sum(-1, keepdim=True).sqrt()).to(v.dtype)
    scores = turn(q) @ turn(k).transpose(-1, -2) * K**-0.5 * decay
    if clamp:
        scores = scores / scores.abs().sum(-1, keepdim=True).clamp(1, 5e4)
    return (scores @ v).transpose(1, 2)
