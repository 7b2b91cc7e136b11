"""Distillation: objectives that learn from a teacher model in place of the text's next tokens.

The protocol of RADLADS (Goldstein et al. 2025, arXiv 2505.03005): first every mixer learns to answer as the teacher's does,
each by itself on what the teacher's own reads; then the whole model learns the teacher's distribution of the next token.
"""

from __future__ import annotations

import tomllib
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from retnet.convert import Found, folder_of, read
from retnet.convert.native import TOKENIZER
from retnet.data import IGNORED, Tokenizer
from retnet.model import Block, LanguageModel, ModelConfig
from retnet.model.runs import find_checkpoint
from retnet.settings import UserError, build, dump
from retnet.train.distributed import broadcast_weights, shard, take_parts
from retnet.train.initial_weights import note_source
from retnet.train.objective import Objective

if TYPE_CHECKING:
    from retnet.train.config import RunConfig
    from retnet.train.distributed import Ranks
    from retnet.train.run_dir import RunDirectory

TEACHER = "teacher.json"  # in a run directory: which one it learns from, and its hashes
PIECE = 512  # tokens whose divergences are computed at once
Seen = tuple[Tensor, Tensor]  # what a mixer read and what it answered, [1,T,D]


def objective(
    config: RunConfig,
    run: RunDirectory,
    model: LanguageModel,
    tokenizer: Tokenizer,
    device: torch.device,
    ranks: Ranks,
) -> Objective:
    """What a run minimises: cross entropy of the text, or the distance from a teacher that its `distill` names.

    `teacher.json` in the run directory says which teacher that was. Several processes hold a part of its weights each, as
    they do of the model's.

    Raises:
        UserError: the teacher cannot be read, does not fit the model, or has changed since the run was begun.
    """
    distill = config.distill
    if distill is None:
        return Objective(model, config.train.z_loss, ranks.tp)
    found = ranks.lead(partial(_read_teacher, distill.teacher, run, model, tokenizer))
    kind = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    teacher = shared(found, kind, device, ranks).requires_grad_(False)
    return {"mixers": MixerAlignment, "logits": LogitDistillation}[distill.match](model, teacher)


def _read_teacher(source: str, run: RunDirectory, model: LanguageModel, tokenizer: Tokenizer) -> Found:
    """The teacher, once it is clear that it is one."""
    found = read(source)
    note_source(run, TEACHER, source, found)
    if found.config.vocab_size != model.config.vocab_size:
        raise UserError(
            f"distill.teacher {source} has {found.config.vocab_size} tokens and the model "
            f"{model.config.vocab_size}; they must have the same tokenizer"
        )
    theirs = tokenizer_of(source, found) if TOKENIZER in found.tokenizer else None
    if theirs is not None and theirs.vocabulary != tokenizer.vocabulary:
        raise UserError(
            f"distill.teacher {source} has as many tokens as the model, but other ones; set data.tokenizer to the "
            "teacher's tokenizer.json"
        )
    return found


def shared(found: Found | None, dtype: torch.dtype, device: torch.device, ranks: Ranks) -> LanguageModel:
    """A model that the first process has read, on the device; of several, each gets its part of the weights."""
    if ranks.alone:
        assert found is not None
        return found.to(dtype).model().to(device)
    text = ranks.tell(dump(found.config) if found else "")
    model = shard(build(ModelConfig, tomllib.loads(text)), device, ranks, dtype)
    with torch.no_grad():
        take_parts(model, broadcast_weights(found.tensors if found else None, model, ranks), ranks)
    return model


def tokenizer_of(source: str, teacher: Found) -> Tokenizer | None:
    """The tokenizer of a teacher that was read from `source`; None where it has none.

    Raises:
        UserError: it has one in another form, or one that names no document start.
    """
    if not teacher.tokenizer:
        return None
    folder = folder_of(source)
    return Tokenizer.load(find_checkpoint(folder)[0] / TOKENIZER if teacher.kind == "run" else folder)


class Distillation(Objective):
    """Base of objectives with a teacher; outside training they are the cross entropy of the text.

    Args:
        model: the student.
        teacher: on the same device; no part of this module, so that nobody trains or saves it.
    """

    def __init__(self, model: LanguageModel, teacher: LanguageModel) -> None:
        super().__init__(model)
        self._hidden = (teacher,)  # a module in a tuple is not registered

    @property
    def teacher(self) -> LanguageModel:
        """The model that is learned from."""
        return self._hidden[0]

    def forward(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Tokens and targets int64 [B,T], documents bounded by `cu_seqlens` in the rows laid end to end; a scalar, fp32."""
        if not self.training:
            return super().forward(tokens, targets, cu_seqlens)
        return self._distance(tokens.reshape(1, -1), targets.flatten() != IGNORED, cu_seqlens)

    def _distance(self, tokens: Tensor, counts: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Summed over the tokens [1,T] that count, bool [T]."""
        raise TypeError(f"{type(self).__name__} does not define _distance")


class MixerAlignment(Distillation):
    """Squared distance of mixers' outputs from the teacher's, each on what the teacher's mixer reads, in one pass over it.

    Each layer's is divided by the mean square of the teacher's output there, so that all weigh the same and 1 is what zeros
    would have; their mean is summed over tokens. Layers whose mixer is of the teacher's kind are left out.

    Raises:
        UserError: the models have different widths or numbers of layers, or no layer is left.
    """

    def __init__(self, model: LanguageModel, teacher: LanguageModel) -> None:
        super().__init__(model, teacher)
        mine, theirs = model.config, teacher.config
        if (mine.d_model, mine.num_layers) != (theirs.d_model, theirs.num_layers):
            raise UserError(
                f"distill.match = 'mixers' needs a teacher of {mine.num_layers} layers of width {mine.d_model}, and this "
                f"one has {theirs.num_layers} of {theirs.d_model}; take match = 'logits'"
            )
        self.layers = other_mixers(mine, theirs)
        if not self.layers:
            raise UserError("distill.match = 'mixers' has nothing to learn: all mixers are the teacher's own")

    def _distance(self, tokens: Tensor, counts: Tensor, cu_seqlens: Tensor) -> Tensor:
        with torch.no_grad():
            seen = watched(self.teacher, self.layers, tokens, cu_seqlens)
        total = torch.zeros((), device=tokens.device)
        mixed = self.model.mix({layer: x for layer, (x, _) in seen.items()}, cu_seqlens)
        for layer, (_, answer) in seen.items():
            error = (mixed[layer] - answer)[0].float().square().mean(-1)
            scale = answer[0].float().square().mean(-1)[counts].mean()
            total = total + (error * counts).sum() / (scale * len(seen))
        return total


class LogitDistillation(Distillation):
    """KL divergence of the model's next token from the teacher's, Σ p log(p / q) in nats."""

    def _distance(self, tokens: Tensor, counts: Tensor, cu_seqlens: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(tokens, cu_seqlens=cu_seqlens)[0].float().log_softmax(-1)
        found = self.model(tokens, cu_seqlens=cu_seqlens)[0].float().log_softmax(-1)
        pieces = zip(
            found.split(PIECE), wanted.split(PIECE), strict=True
        )  # what passes in between is as large as both
        nats = torch.cat([F.kl_div(q, p, log_target=True, reduction="none").sum(-1) for q, p in pieces])
        return (nats * counts).sum()


def other_mixers(student: ModelConfig, teacher: ModelConfig) -> list[int]:
    """The layers in which a student has another mixer than its teacher of as many layers."""
    kinds = zip(student.mixers_by_layer, teacher.mixers_by_layer, strict=True)
    return [layer for layer, (own, other) in enumerate(kinds) if own != other]


def watched(
    model: LanguageModel, layers: list[int], tokens: Tensor, cu_seqlens: Tensor | None
) -> dict[int, Seen]:
    """What the mixers of some blocks read and answer in a pass over tokens [1,T], by layer.

    Args:
        model: that reads the tokens.
        layers: of which blocks.
        tokens: int64 [1,T].
        cu_seqlens: bounds of documents.
    """
    seen: dict[int, Seen] = {}

    def note(layer: int) -> RemovableHandle:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[layer] = (inputs[0], output)

        return cast("Block", model.blocks[layer]).mixer.register_forward_hook(hook)

    hooks = [note(layer) for layer in layers]
    try:
        model.features(tokens, cu_seqlens)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
