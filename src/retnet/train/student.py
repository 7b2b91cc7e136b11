"""A RetNet out of a Transformer, before it has learned anything: the student's configuration and transferred weights.

As in SUPRA (Mercat et al. 2024, arXiv 2405.06640): queries, keys, values and outputs keep their weights, softmax's
normalisation becomes a head norm, and every head gets a decay. What has no counterpart in the teacher is fitted to it on one
batch: gate and decay of gated retention to constants, and the size of each head to that of the teacher's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from retnet.convert import Found
from retnet.data import Batch
from retnet.mixers import MIXERS, GatedRetentionConfig, MixerConfig, RetentionConfig, SoftmaxConfig
from retnet.model import Block, ModelConfig
from retnet.ops import log_decays
from retnet.settings import UserError
from retnet.train.distillation import other_mixers, watched

SWISH_OF_ONE = 1.2784645427610738  # swish of it is 1
RIDGE = 1e-4  # of the mean square of what a mixer reads
StudentMixer = Literal["retention", "gated_retention"]


def student_config(teacher: ModelConfig, mixer: StudentMixer, keep_every: int | None) -> ModelConfig:
    """The model that a teacher's weights go to: its own, with retention in place of softmax.

    Args:
        teacher: all of whose layers are softmax of one kind.
        mixer: of the student.
        keep_every: layers of which the last stays softmax; None: none stays.

    Raises:
        UserError: a teacher that is something else, or one in which no layer would change.
    """
    if set(teacher.mixers_by_layer) != {teacher.mixer} or not isinstance(teacher.mixer, SoftmaxConfig):
        kinds = ", ".join(sorted({kind.name for kind in teacher.mixers_by_layer}))
        raise UserError(f"the teacher's layers must be softmax of one kind, and they are: {kinds}")
    kind = _student_mixer(teacher, mixer)
    if keep_every is None:
        return replace(teacher, mixer=kind, layers=None, mixers=None)
    if not 1 < keep_every <= teacher.num_layers:
        raise UserError(
            f"every:{keep_every} layers cannot stay softmax among {teacher.num_layers}; allowed: every:2 to "
            f"every:{teacher.num_layers}"
        )
    layers = (mixer,) * (keep_every - 1) + ("softmax",)
    return replace(teacher, mixer=kind, layers=layers, mixers={"softmax": teacher.mixer})


def _student_mixer(teacher: ModelConfig, mixer: StudentMixer) -> MixerConfig:
    c = teacher.mixer
    assert isinstance(c, SoftmaxConfig)
    key_dim = c.key_dim or teacher.d_model // c.num_heads
    if mixer == "retention":
        return RetentionConfig(
            num_heads=c.num_heads,
            key_dim=key_dim,
            value_dim=key_dim,
            decay="experiments",
            gate=False,
            head_norm="rms",
            rotary=c.rotary,
            rotary_dim=c.rotary_dim,
            rotary_spacing="geometric",
            rotary_base=c.rotary_base,
        )
    if key_dim * c.num_heads != teacher.d_model:
        raise UserError(
            f"gated_retention has keys as wide as the model, {teacher.d_model}, and the teacher's are "
            f"{c.num_heads} × {key_dim}; take --mixer retention"
        )
    if c.rotary_dim is not None:
        raise UserError("gated_retention rotates whole heads, and the teacher a part; take --mixer retention")
    return GatedRetentionConfig(
        num_heads=c.num_heads,
        value_dim=key_dim,
        rotary=c.rotary,
        rotary_base=c.rotary_base,
        head_norm="rms",
    )


def transfer(teacher: Found, config: ModelConfig, batch: Batch, device: torch.device) -> Found:
    """The student before training: the teacher's weights wherever there is a place for them, the others fitted to it.

    Keys and values that a group of heads shared are repeated for each; biases of queries, keys and values have no place, and
    the norm of queries and keys leaves its weights in the projections.

    Args:
        teacher: the model.
        config: of `student_config`.
        batch: of text, which the student is fitted on.
        device: that computes.
    """
    model, tensors = teacher.to(torch.float32).model().to(device), dict(teacher.tensors)
    layers, bounds = other_mixers(config, teacher.config), batch.cu_seqlens.to(device)
    heads = cast("SoftmaxConfig", teacher.config.mixer).num_heads
    with torch.no_grad():
        seen = watched(model, layers, batch.tokens.reshape(1, -1).to(device), bounds)
        for layer in layers:
            (x, _), kind, place = seen.pop(layer), config.mixers_by_layer[layer], f"blocks.{layer}.mixer."
            mine = [name for name in tensors if name.startswith(place)]
            theirs = {name.removeprefix(place): tensors.pop(name).float() for name in mine}
            found = _mixer_weights(theirs, teacher.config)
            if isinstance(kind, GatedRetentionConfig):
                found |= _constants(x, kind)
            student = MIXERS[kind.name](config.d_model, kind)
            student.load_state_dict(found)
            own, wanted = (
                _heads(mixer, x, bounds, heads)
                for mixer in (student.to(device), cast("Block", model.blocks[layer]).mixer)
            )
            # the teacher's size, for the nearest one silences heads of which little is kept; [H]
            size = (wanted.square().sum((0, 2)) / own.square().sum((0, 2)).clamp(min=1e-12)).sqrt()
            size = torch.where((own * wanted).sum((0, 2)) < 0, -size, size)
            found["out_proj.weight"] = found["out_proj.weight"] * size.cpu().repeat_interleave(own.shape[2])
            tensors |= {place + name: y.to(teacher.dtype).contiguous() for name, y in found.items()}
    return replace(teacher, config=config, tensors=tensors)


def _mixer_weights(theirs: dict[str, Tensor], teacher: ModelConfig) -> dict[str, Tensor]:
    """Weights of one student's mixer, as far as its teacher's say them."""
    c = teacher.mixer
    assert isinstance(c, SoftmaxConfig)
    group = c.num_heads // (c.kv_heads or c.num_heads)
    key_dim = c.key_dim or teacher.d_model // c.num_heads
    q, k, v = (
        theirs[f"{name}_proj.weight"].unflatten(0, (-1, key_dim)) for name in "qkv"
    )  # [H,K,D], [G,K,D]
    if c.qk_norm:
        q = q * theirs["q_norm.weight"][:, None]
        k = k * theirs["k_norm.weight"][:, None]
    k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
    found = {f"{name}_proj.weight": x.flatten(0, 1) for name, x in zip("qkv", (q, k, v), strict=True)}
    return {**found, "out_proj.weight": theirs["out_proj.weight"]}


def _constants(x: Tensor, kind: GatedRetentionConfig) -> dict[str, Tensor]:
    """Weights of gate and decay that give nearly the same for every x [1,T,D]: a gate of 1, and γ as `log_decays` has them.

    There are no biases, so 1 is the combination of the x's numbers that is nearest to it (ridge regression).
    """
    rows, heads = x[0].double(), kind.num_heads
    square = rows.mT @ rows / len(rows)
    ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=rows.dtype, device=rows.device)
    one = torch.linalg.solve(square + ridge, rows.mean(0)).float().cpu()  # [D]
    gamma = log_decays("experiments", heads, torch.float64).mul(kind.temperature).exp()
    gates = heads * (kind.value_dim or 2 * len(one) // heads)
    return {
        "gate_proj.weight": SWISH_OF_ONE * one.expand(gates, -1),
        "decay_proj.weight": gamma.logit().float()[:, None] * one,
    }


def _heads(mixer: nn.Module, x: Tensor, bounds: Tensor, heads: int) -> Tensor:
    """What a mixer's heads hand to its output projection, which it loses: x [1,T,D], documents by bounds → [T,H,K]."""
    mixer.out_proj = nn.Identity()
    found: Tensor = mixer(x, cu_seqlens=bounds)[0].unflatten(-1, (heads, -1))
    return found
