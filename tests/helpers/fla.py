"""flash-linear-attention's RetNet, written from its equations: the judge of what reading its folders must reproduce."""

import torch
import torch.nn.functional as F

DEFAULTS = {
    "expand_k": 1.0,
    "expand_v": 2.0,
    "num_kv_heads": None,
    "use_output_gate": True,
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def logits(weights, config, tokens, *, dtype=torch.float64):
    """Tokens [B,T] to logits [B,T,vocab], with `weights` and `config` as FLA names them."""
    config = {**DEFAULTS, **config}
    w = {name: x.to(dtype) for name, x in weights.items()}
    heads, eps = config["num_heads"], config["norm_eps"]

    def norm(x, weight):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x * w[weight] if weight in w else x

    x = w["model.embeddings.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        h = norm(x, at + "attn_norm.weight")
        q, k, v = (h @ w[f"{at}attn.{name}_proj.weight"].T for name in "qkv")
        o = _retain(q, k, v, heads, config["num_kv_heads"] or heads)
        if config["use_output_gate"]:
            gate = (h @ w[at + "attn.g_proj.weight"].T).unflatten(-1, (heads, -1))
            o = norm(o, at + "attn.g_norm_swish_gate.weight") * gate * torch.sigmoid(gate)
        else:
            o = norm(o, at + "attn.g_norm.weight")
        x = x + o.flatten(-2) @ w[at + "attn.o_proj.weight"].T
        h = norm(x, at + "mlp_norm.weight")
        h = F.silu(h @ w[at + "mlp.gate_proj.weight"].T) * (h @ w[at + "mlp.up_proj.weight"].T)
        x = x + h @ w[at + "mlp.down_proj.weight"].T
    head = "model.embeddings.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "model.norm.weight") @ w[head].T


def _retain(q, k, v, heads, kv_heads):
    """[B,T,H,V]: one token after the other, S = γ S + kᵀ v, o = q S / √K; head h uses keys and values h // group."""
    q, k, v = (x.unflatten(-1, (n, -1)) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    K = q.shape[-1]
    group = torch.arange(heads) // (heads // kv_heads)
    angle = torch.arange(q.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
    cos, sin = (x.to(v.dtype)[:, None] for x in (angle.cos(), angle.sin()))

    def turn(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    q, k, v = turn(q), turn(k)[:, :, group], v[:, :, group]
    gamma = (1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))).to(v.dtype)[:, None, None]
    state, outputs = v.new_zeros(len(q), heads, K, v.shape[-1]), []
    for t in range(q.shape[1]):
        state = gamma * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * K**-0.5)
    return torch.stack(outputs, dim=1)
