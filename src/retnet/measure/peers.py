"""Peers to measure against: a Hugging Face Llama of equal size, SDPA attention, retention as others write it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.measure.sizes import equal_width
from retnet.ops.reference import decay_mask
from retnet.settings import UserError

HEAD_WIDTH = 64  # of the Llama
ATTENTION_WIDTH = 128  # of a head of attention alone: the width that FlashAttention is fastest at


def need(*modules: str) -> tuple[ModuleType, ...]:
    """Imports what only measurements use.

    Raises:
        UserError: one of them is not installed.
    """
    # transformers imports torchao where it is installed; what it and torch log of not fitting each other is not of here
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return tuple(import_module(name) for name in modules)
    except ImportError as error:
        name = error.name or modules[0]
        raise UserError(f"retnet bench needs {name}, which is missing; pip install 'retnet[bench]'") from None


def llama(vocab_size: int, d_model: int, num_layers: int, parameters: int) -> nn.Module:
    """A Hugging Face `LlamaForCausalLM` with fresh weights: SDPA attention, heads of 64, tied embeddings.

    Args:
        vocab_size: rows of the embedding.
        d_model: width.
        num_layers: depth.
        parameters: of the model to be compared with; the feed-forward width is chosen to come closest.

    Raises:
        UserError: transformers is missing, the width is no multiple of 64, or no feed-forward width comes within 2 %.
    """
    (transformers,) = need("transformers")
    if d_model % HEAD_WIDTH:
        raise UserError(
            f"d_model is {d_model}, but the Llama beside it has heads of {HEAD_WIDTH}; take a multiple of {HEAD_WIDTH}"
        )
    rest = vocab_size * d_model + num_layers * (4 * d_model**2 + 2 * d_model) + d_model
    per_width = 3 * d_model * num_layers
    name = f"Llama of d_model {d_model} and {num_layers} layers"
    width = equal_width(parameters, lambda width: rest + width * per_width, name)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=d_model,
        intermediate_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=d_model // HEAD_WIDTH,
        max_position_embeddings=2**20,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def llama_flops_per_token(model: nn.Module, length: int) -> int:
    """Of a forward pass over `length` tokens, a multiply-add as two; causal attention as half of the full square."""
    config: Any = model.config
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return int(2 * products + config.num_hidden_layers * 2 * config.hidden_size * length)


def random_cache(model: nn.Module, batch: int, length: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of `length` tokens for every layer, [B, heads, T, 64] as its weights are; no time depends on them."""
    config: Any = model.config
    weight = next(model.parameters())
    shape = (batch, config.num_key_value_heads, length, HEAD_WIDTH)

    def numbers() -> Tensor:
        return torch.randn(shape, dtype=weight.dtype, device=weight.device)

    return [(numbers(), numbers()) for _ in range(config.num_hidden_layers)]


def dynamic_cache(layers: list[tuple[Tensor, Tensor]]) -> Any:  # noqa: ANN401
    """A `DynamicCache`, what `generate` uses by default, that starts with a copy of these keys and values."""
    (transformers,) = need("transformers")
    return transformers.DynamicCache(layers)


def chunk_loop(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, chunk: int) -> Tensor:
    """Chunkwise retention (paper §2), differentiated by autograd.

    Splits once and concatenates once, so its backward is linear in the number of chunks.

    Args:
        q: [B,T,H,K].
        k: [B,T,H,K].
        v: [B,T,H,V].
        log_decay: ln γ, [H].
        scale: of the query-key products.
        chunk: C; T must be a multiple of it.

    Returns:
        [B,T,H,V].
    """
    j = torch.arange(chunk, device=q.device)
    log_decay = log_decay.to(q.dtype)[:, None]
    mask = decay_mask(log_decay[:, 0], chunk) * scale  # [H,C,C]
    xi = torch.exp(log_decay * (j + 1))[..., None] * scale  # [H,C,1]
    zeta = torch.exp(log_decay * (chunk - 1 - j))[..., None]
    carry = torch.exp(log_decay * chunk)[..., None]
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for qc, kc, vc in zip(*(torch.split(x.transpose(1, 2), chunk, dim=2) for x in (q, k, v)), strict=True):
        outputs.append((qc @ kc.mT * mask) @ vc + (qc * xi) @ state)
        state = carry * state + (kc * zeta).mT @ vc
    return torch.cat(outputs, dim=2).transpose(1, 2)


def indexed_states(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, chunk: int) -> Tensor:
    """Chunkwise retention as it is usually written: all chunks at once, and a loop that carries the state over them.

    Indexing one chunk of a tensor of all chunks makes autograd write a gradient of all chunks each time, so its backward
    is quadratic in their number. Shapes as in `chunk_loop`.
    """
    j = torch.arange(chunk, device=q.device)
    log_decay = log_decay.to(q.dtype)[:, None]
    xi = torch.exp(log_decay * (j + 1))[:, None, :, None] * scale  # [H,1,C,1]
    zeta = torch.exp(log_decay * (chunk - 1 - j))[:, None, :, None]
    carry = torch.exp(log_decay * chunk)[..., None]
    q, k, v = (x.transpose(1, 2).unflatten(2, (-1, chunk)) for x in (q, k, v))  # [B,H,N,C,·]
    written = (k * zeta).mT @ v  # [B,H,N,K,V]
    state, states = torch.zeros_like(written[:, :, 0]), []
    for n in range(q.shape[2]):
        states.append(state)
        state = carry * state + written[:, :, n]
    mask = (decay_mask(log_decay[:, 0], chunk) * scale)[:, None]  # [H,1,C,C]
    out = (q @ k.mT * mask) @ v + (q * xi) @ torch.stack(states, dim=2)
    return out.flatten(2, 3).transpose(1, 2)


def parallel_form(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    """(Q Kᵀ ⊙ D) V of all tokens at once, differentiated by autograd; shapes as in `chunk_loop`."""
    mask = decay_mask(log_decay.to(q.dtype), q.shape[1]) * scale  # [H,T,T]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT * mask) @ v).transpose(1, 2)


def attention_heads(width: int) -> tuple[int, int]:
    """(heads, width of one) of attention that is `width` numbers wide: heads of 128, or of what divides the width."""
    one = math.gcd(width, ATTENTION_WIDTH)
    return width // one, one


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention by torch's scaled_dot_product_attention (FlashAttention where it can); all [B,T,heads,width]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def flash_linear_attention() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Its two chunkwise kernels of retention, by name; empty where it is not installed. It runs on GPUs alone.

    Shapes as in `chunk_loop`. Decay and scale are not arguments: γ is the paper's, the scale K^(−1/2).
    """
    if find_spec("fla") is None:
        return {}
    (module,) = need("fla.ops.retention")
    return {
        "flash-linear-attention, chunk": lambda q, k, v: module.chunk_retention(q, k, v)[0],
        "flash-linear-attention, fused": lambda q, k, v: module.fused_chunk_retention(q, k, v)[0],
    }
