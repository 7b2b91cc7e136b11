"""A RetNet out of a Transformer, before it has learned anything: the student's configuration and transferred weights.

As in SUPRA (Mercat et al. 2024, arXiv 2405.06640): queries, keys, values and outputs keep their weights, softmax's
normalisation becomes a head norm, and every head gets a decay.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from retnet.convert import Found
from retnet.mixers import GatedRetentionConfig, MixerConfig, RetentionConfig, SoftmaxConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.model.checkpoint import weights
from retnet.settings import UserError

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
        num_heads=c.num_heads, value_dim=key_dim, rotary=c.rotary, rotary_base=c.rotary_base
    )


def transfer(teacher: Found, config: ModelConfig, sizes: dict[int, Tensor], seed: int) -> Found:
    """The student before training: the teacher's weights wherever there is a place for them, fresh ones elsewhere.

    Keys and values that a group of heads shared are repeated for each; biases of queries, keys and values have no place, and
    the norm of queries and keys leaves its weights in the projections.

    Args:
        teacher: the model.
        config: of `student_config`.
        sizes: layer → root mean square of what each of the teacher's heads hands to the output projection, [H]: columns of
            that are multiplied with it, since a normalised head has 1.
        seed: of fresh weights.
    """
    torch.manual_seed(seed)
    student = {name: x.to(teacher.dtype) for name, x in weights(LanguageModel(config)).items()}
    before = "blocks.{}.mixer.".format
    mixers = tuple(before(layer) for layer in sizes)
    student |= {name: x for name, x in teacher.tensors.items() if not name.startswith(mixers)}
    for layer, size in sizes.items():
        theirs = {
            name.removeprefix(before(layer)): x
            for name, x in teacher.tensors.items()
            if name.startswith(before(layer))
        }
        for name, x in _mixer_weights(theirs, teacher.config, size).items():
            student[before(layer) + name] = x.to(teacher.dtype).contiguous()
    return replace(teacher, config=config, tensors=student)


def _mixer_weights(theirs: dict[str, Tensor], teacher: ModelConfig, size: Tensor) -> dict[str, Tensor]:
    """Weights of one student's mixer, as far as its teacher's say them."""
    c = teacher.mixer
    assert isinstance(c, SoftmaxConfig)
    group = c.num_heads // (c.kv_heads or c.num_heads)
    key_dim = c.key_dim or teacher.d_model // c.num_heads
    q, k, v = (
        theirs[f"{name}_proj.weight"].float().unflatten(0, (-1, key_dim)) for name in "qkv"
    )  # [H,K,D], [G,K,D]
    if c.qk_norm:
        q = q * theirs["q_norm.weight"].float()[:, None]
        k = k * theirs["k_norm.weight"].float()[:, None]
    k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
    out, each = theirs["out_proj.weight"].float(), size.repeat_interleave(key_dim)  # [D,H·K], [H·K]
    found = {f"{name}_proj.weight": x.flatten(0, 1) for name, x in zip("qkv", (q, k, v), strict=True)}
    return {**found, "out_proj.weight": out * each}
