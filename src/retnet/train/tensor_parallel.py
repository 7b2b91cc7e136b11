"""Tensor parallelism of a language model, applied from outside: smaller modules of the same kinds on every rank.

Each rank has some heads of each mixer, a part of each FFN's width and a stretch of the vocabulary. Weights that are cut so
are told from others by `cuts`; `global_tensors` puts what ranks hold of them, and of what is shaped like them (gradients,
moments, averages), together as DTensors of the whole on the mesh of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.errors import UserError
from retnet.mixers import MIXERS
from retnet.model import Block, LanguageModel, ModelConfig
from retnet.nn import Norm, narrow_parameter
from retnet.ops.tensor_parallel import TensorParallel, part_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Cut(NamedTuple):
    """Where a parameter is cut over the ranks of tensor parallelism: into chunks, as `torch.chunk` makes them."""

    axis: int
    size: int  # of the whole, along it


def check_heads(model: ModelConfig, tp: int, setting: str = "parallel.tp") -> None:
    """Says what cannot be cut over so many ranks, by the name that the number has where it was set.

    Raises:
        UserError: a mixer whose heads do not stand by themselves; heads, of keys too, or widths that are no multiple of
            `tp`; a vocabulary that leaves a rank without any of it.
    """
    if tp == 1:
        return
    able = [name for name, kind in MIXERS.items() if kind.head_axes]
    for mixer in model.mixers_by_layer:
        if mixer.name not in able:
            raise UserError(
                f"{setting} is {tp}, but the mixer {mixer.name!r} has no heads that stand by themselves; set it to 1 (in "
                f"training parallel.shard cuts any weights), or take mixers that can be cut by heads: {', '.join(able)}"
            )
        groups = getattr(mixer, "head_norm_groups", None)
        if groups is not None and groups % tp:
            raise UserError(
                f"{setting} is {tp}, and the mixer {mixer.name!r} normalises its heads in {groups} groups, which is no "
                "multiple of it; set it to 1 or a divisor of head_norm_groups"
            )
    for what, numbers in (
        ("heads", _heads(model, "num_heads")),
        ("heads of keys", _heads(model, "kv_heads")),
    ):
        common = math.gcd(*numbers)
        for number, name in numbers.items():
            if number % tp:
                fits = " or ".join(str(n) for n in range(1, common + 1) if common % n == 0)
                raise UserError(
                    f"{setting} is {tp}, and the mixer {name!r} has {number} {what}, which is no multiple of it; "
                    f"set it to {fits}"
                )
    for _, width in model.ffns_by_layer:
        if width % tp:
            raise UserError(
                f"{setting} is {tp}, and an FFN is {width} wide, which is no multiple of it; set another number, or "
                f"model.ffn_dim to {math.ceil(width / tp) * tp}"
            )
    if model.vocab_size is not None and (tp - 1) * -(-model.vocab_size // tp) >= model.vocab_size:
        raise UserError(
            f"{setting} is {tp}, and a vocabulary of {model.vocab_size} leaves the last rank without any; lower it"
        )


def _heads(model: ModelConfig, field: str) -> dict[int, str]:
    """What the mixers' configurations say of a number of heads, where they do, with a mixer that says it."""
    found = ((getattr(mixer, field, None), mixer.name) for mixer in model.mixers_by_layer)
    return {number: name for number, name in found if number}


def cuts(model: LanguageModel) -> dict[str, Cut]:
    """Of the parameters that `cut` cuts: their names, and where. The same for a whole model and for a part of one."""
    config, vocabulary = model.config, model.config.vocab_size
    assert vocabulary is not None
    found = {"embedding.weight": Cut(0, vocabulary), "head.weight": Cut(0, vocabulary)}
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        mixer = block.mixer
        all_heads = config.mixers_by_layer[number].num_heads  # type: ignore[attr-defined]  # what has `head_axes` has heads
        widths = {f"ffn.{name}": axis for name, axis in block.ffn.width_axes.items()}
        heads = {f"mixer.{name}": axis for name, axis in mixer.head_axes.items()}
        own = dict(block.named_parameters())
        for name, axis in {**widths, **heads}.items():
            if name in own:
                size = config.ffns_by_layer[number][1]
                if name in heads:
                    size = own[name].shape[axis] * all_heads // mixer.num_heads
                found[f"blocks.{number}.{name}"] = Cut(axis, size)
    return found


def cut(model: LanguageModel, rank: int, ranks: int) -> None:
    """Leaves a whole model, on any device, the part of a rank: heads, widths of FFNs, a stretch of the vocabulary.

    Raises:
        UserError: as `check_heads`.
    """
    check_heads(model.config, ranks)
    for block in model.blocks:
        assert isinstance(block, Block)
        cut_block(block, rank, ranks)
    vocabulary = model.embedding.num_embeddings
    begin, end = part_of(vocabulary, rank, ranks)
    tied = model.head.weight is model.embedding.weight
    model.embedding = EmbeddingPart(model.embedding, begin, end)
    narrow_parameter(model, "head.weight", 0, begin, end, vocabulary)
    if tied:
        model.head.weight = model.embedding.weight


def cut_block(block: Block, rank: int, ranks: int) -> None:
    """Leaves a block its part of heads and width."""
    block.mixer.keep_heads(*part_of(block.mixer.num_heads, rank, ranks))
    block.ffn.keep_width(*part_of(block.ffn.fc1.out_features, rank, ranks))


def connect(model: LanguageModel, tp: TensorParallel) -> None:
    """Makes the parts of all ranks that `cut` made compute the whole model: what enters them, and the sum of what leaves."""
    for block in model.blocks:
        assert isinstance(block, Block)
        for part in (block.mixer, block.ffn):
            part.register_forward_pre_hook(lambda _, x: (tp.replicated(x[0]), *x[1:]))
            part.register_forward_hook(lambda _, __, y: tp.summed(y))
        for name in block.mixer.shared_norms:
            if (norm := getattr(block.mixer, name)) is not None:
                setattr(block.mixer, name, SharedNorm(norm, tp))
    model.embedding.register_forward_hook(lambda _, __, y: tp.summed(y))
    model.head.register_forward_pre_hook(lambda _, x: (tp.replicated(x[0]),))


class SharedNorm(Norm):
    """A norm that every rank applies to heads of its own: gradients of its weights are summed over ranks."""

    def __init__(self, norm: Norm, tp: TensorParallel) -> None:
        nn.Module.__init__(self)
        self.eps, self.weight, self.bias, self._tp = norm.eps, norm.weight, norm.bias, tp

    def forward(self, x: Tensor) -> Tensor:
        """x [...,K] → [...,K]."""
        bias = None if self.bias is None else self._tp.replicated(self.bias)
        return self.normalised(x, self._tp.replicated(self.weight), bias)


class EmbeddingPart(nn.Embedding):
    """The rows `begin` to `end` of an embedding: zeros for tokens outside, so that the parts of all sum to the whole."""

    def __init__(self, whole: nn.Embedding, begin: int, end: int) -> None:
        rows = whole.weight.detach()[begin:end].clone()
        super().__init__(rows.shape[0], rows.shape[1], _weight=rows)
        self.begin = begin

    def forward(self, input: Tensor) -> Tensor:
        """int64 [...] → [...,D]."""
        own = input - self.begin
        outside = (own < 0) | (own >= self.num_embeddings)
        return F.embedding(own.masked_fill(outside, 0), self.weight).masked_fill(outside[..., None], 0)


def global_tensors(
    parts: Mapping[str, Tensor], model: LanguageModel, mesh: DeviceMesh | None
) -> dict[str, Tensor]:
    """What this rank holds of each tensor, as DTensors of the whole that share its memory.

    They lie on the mesh of all ranks as they are there: cut over its "tp" axis first, each chunk over its "shard" axis then.

    Args:
        parts: by name of a parameter, or ``name/kind`` for what is shaped as it is; numbers (0 dimensions) stay as they are.
        model: whose parameters they are.
        mesh: of all ranks; None, or one without "tp", leaves all as they are, for FSDP's DTensors know the whole then.
    """
    if mesh is None or "tp" not in (mesh.mesh_dim_names or ()):
        return dict(parts)
    where = cuts(model)
    return {
        name: x if x.dim() == 0 else _global_tensor(x, where.get(name.partition("/")[0]), mesh)
        for name, x in parts.items()
    }


def _global_tensor(part: Tensor, cut: Cut | None, mesh: DeviceMesh) -> Tensor:
    from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

    shape, local, placements = list(part.shape), part.detach(), dict[str, Placement]()
    if isinstance(part, DTensor) and isinstance(local, DTensor):  # FSDP's
        local = local.to_local()
        placements = dict(zip(part.device_mesh.mesh_dim_names or (), part.placements, strict=True))
    if cut is not None:
        placements["tp"], shape[cut.axis] = Shard(cut.axis), cut.size
    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(
        local,
        mesh,
        [placements.get(axis, Replicate()) for axis in mesh.mesh_dim_names or ()],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
