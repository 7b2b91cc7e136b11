"""Weights of a model, read into the table of the compiled decoder; nothing else knows a mixer's inside and that table."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from retnet.engine.cpu_decoder.table import (
    BlockWeights,
    EndWeights,
    MixerWeights,
    NotCompiledError,
    WeightTable,
    make_table,
)
from retnet.mixers import MultiScaleRetention, SoftmaxAttention
from retnet.model import Block, LanguageModel
from retnet.nn import FeedForward, Int8Linear, Linear, Norm
from retnet.ops.torch_private import FORWARD_HOOKS


def read_model(model: nn.Module) -> WeightTable:
    """The table of a model as it is now.

    Raises:
        NotCompiledError: its layers have to be called. That is so for other mixers, in training, where a layer has a hook
            or a `forward` of its own, as offloading gives it one, and for derived classes, whose `forward` may be another.
    """
    if type(model) is not LanguageModel:
        raise NotCompiledError(
            f"it is a {type(model).__name__}, whose forward may be another than LanguageModel's"
        )
    if any(map(_called, model.modules())):
        raise NotCompiledError("a layer trains, has a hook, or a forward of its own")
    norm, first, head = model.norm, model.embedding_norm, stored(model.head)
    exact = (
        type(model.embedding) is nn.Embedding
        and type(model.dropout) is nn.Dropout
        and model.embedding.max_norm is None  # else looking up changes it
        and _alike(norm, *([] if first is None else [first]))
    )
    blocks = [_read_block(block) for block in model.blocks]
    known = [block for block in blocks if block is not None]
    if not exact or head is None or len(known) < len(blocks):
        raise NotCompiledError("it has a layer, an option or a kind of weight that is not covered")
    (weight,), (scale,) = head
    ends = EndWeights(
        model.embedding.weight,
        model.embedding_scale or 1.0,
        None if first is None else first.weight,
        None if first is None else first.bias,
        norm.weight,
        norm.bias,
        weight,
        scale,
        norm.eps,
        model.config.residual == "norm",
    )
    return make_table(known, ends)


def stored(*layers: nn.Module | None) -> tuple[list[Any], list[Tensor | None]] | None:
    """Weights of layers, and the scales of those in int8, for kernels that read them instead of calling the layers.

    None where that would be wrong: a layer that was wrapped (LoRA), quantised by others or offloaded has to be called.
    Where there is no layer (None), there is no weight.
    """
    weights, scales = [], []
    for layer in layers:
        weight = scale = None
        if layer is not None:
            if type(layer) is Int8Linear:
                weight, scale = layer.codes, layer.scale
            elif type(layer) is not Linear or type(weight := layer.weight) is not nn.Parameter:
                return None
            if weight.is_meta or "forward" in layer.__dict__:
                return None
        weights.append(weight)
        scales.append(scale)
    return weights, scales


def _read_block(block: nn.Module) -> tuple[MixerWeights, BlockWeights] | None:
    if type(block) is not Block:
        return None
    ffn, first, second = block.ffn, block.mixer_norm, block.ffn_norm
    if type(ffn) is not FeedForward or not _alike(first, second):
        return None
    core, weights = _read_mixer(block.mixer), stored(ffn.fc1, ffn.gate, ffn.fc2)
    if core is None or weights is None:
        return None
    norms = (first.weight, first.bias, second.weight, second.bias)
    return core, BlockWeights(*norms, *weights, first.eps, ffn.act.__name__, block.residuals)


def _read_mixer(mixer: nn.Module) -> MixerWeights | None:
    if type(mixer) is MultiScaleRetention:
        return _read_retention(mixer)
    if type(mixer) is SoftmaxAttention:
        return _read_softmax(mixer)
    return None


def _read_retention(mixer: MultiScaleRetention) -> MixerWeights | None:
    c = mixer.config
    if c.score_norm in ("paper", "torchscale"):
        return None
    read = stored(mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.gate_proj, mixer.out_proj)
    qk_norms = _weights_of(mixer.q_norm, mixer.k_norm)
    if read is None or qk_norms is None:
        return None
    return MixerWeights(
        "retention",
        *read,
        heads=mixer.num_heads,
        kv_heads=mixer.num_heads,
        theta=mixer.theta,
        layout=c.rotary,
        log_decay=mixer.log_decay,
        bridge=c.score_norm == "decay",
        norm=c.head_norm,
        eps=c.head_norm_eps,
        affine=(mixer.head_norm_weight, mixer.head_norm_bias),
        together=mixer.num_heads // mixer.norm_groups,
        sigmoid=c.gate_activation == "sigmoid",
        activated=c.activation == "silu",
        scale=c.scale,
        qk_norms=qk_norms,
        qk_eps=c.qk_norm_eps,
    )


def _read_softmax(mixer: SoftmaxAttention) -> MixerWeights | None:
    read = stored(mixer.q_proj, mixer.k_proj, mixer.v_proj, None, mixer.out_proj)
    qk_norms = _weights_of(mixer.q_norm, mixer.k_norm)
    if read is None or qk_norms is None:
        return None
    return MixerWeights(
        "softmax",
        *read,
        heads=mixer.num_heads,
        kv_heads=mixer.num_heads // mixer.group,
        theta=mixer.rotary.theta,
        layout=mixer.config.rotary,
        qk_norms=qk_norms,
        qk_eps=mixer.config.qk_norm_eps,
        biases=(mixer.q_bias, mixer.k_bias, mixer.v_bias),
    )


def _weights_of(q: Norm | None, k: Norm | None) -> tuple[Tensor | None, Tensor | None] | None:
    """Of the RMS norms of queries and keys; None where they are no such norms."""
    if q is None or k is None:
        return (None, None) if q is k else None
    return (q.weight, k.weight) if _alike(q, k) and q.bias is None else None


def _called(module: nn.Module) -> bool:
    """Whether somebody would miss the call of a module: it trains, has a hook, or a `forward` of its own."""
    return module.training or "forward" in module.__dict__ or any(map(module.__dict__.get, FORWARD_HOOKS))


def _alike(*norms: nn.Module) -> bool:
    return all(type(norm) is Norm for norm in norms) and all(a.eps == b.eps for a, b in pairwise(norms))
