"""What a reader finds in a foreign checkpoint and a writer takes: a configuration and weights by this library's names."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retnet.host import DTYPES
from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.model.checkpoint import weights
from retnet.settings import UserError

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_WEIGHTS = {*DTYPES.values(), torch.float64}


@dataclass(frozen=True)
class Found:
    """A model as it was found.

    Attributes:
        kind: where it comes from: "torchscale", "fla", "syncdoth", "hf" or "run".
        config: the model.
        tensors: its weights, by the names of `retnet.model.checkpoint.weights`; all of one floating type.
        hashes: file name → SHA-256 of every file that was read.
        tokenizer: file name → content of the tokenizer's files, as they are; empty where there is none.
        tokens: what is known of `TOKENS`, the ids that begin, end and fill texts.
        notes: what the user should know, one sentence each.
    """

    kind: str
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    hashes: Mapping[str, str]
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)
    tokens: Mapping[str, int | list[int] | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(iter(self.tensors.values())).dtype

    def to(self, dtype: torch.dtype) -> Found:
        """The same with weights of another type.

        Raises:
            UserError: weights that overflow in it; all are named.
        """
        tensors = {name: x.to(dtype) for name, x in self.tensors.items()}
        lost = [name for name, x in tensors.items() if not x.isfinite().all()]
        if lost:
            raise UserError(
                f"{len(lost)} tensors have values too large for {str(dtype).removeprefix('torch.')}: "
                f"{', '.join(lost)}; take bfloat16 or float32"
            )
        return replace(self, tensors=tensors)

    def model(self) -> LanguageModel:
        """The model itself, in evaluation mode, on the CPU; it shares its weights with this."""
        return build(self.config, self.tensors)


class Wanted(NamedTuple):
    """A tensor that a checkpoint must have.

    Attributes:
        name: its name here.
        shape: its shape there.
        change: what makes ours of theirs; None where they are the same.
    """

    name: str
    shape: tuple[int, ...]
    change: Callable[[Tensor], Tensor] | None = None


def expected(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every weight of a model."""
    with torch.device("meta"):
        return {name: tuple(x.shape) for name, x in weights(LanguageModel(config)).items()}


def build(config: ModelConfig, tensors: Mapping[str, Tensor]) -> LanguageModel:
    """A model that has these tensors, not copies of them, for its weights."""
    with torch.device("meta"):
        model = LanguageModel(config)
    model = model.to_empty(device="cpu")  # memory that is never touched, and the constants, which are
    head = {"head.weight": tensors["embedding.weight"]} if config.tie_embeddings else {}
    model.load_state_dict({**tensors, **head}, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.requires_grad_(True).eval()


def renamed(name: str, table: Mapping[str, str]) -> str:
    """A weight's name in another's checkpoint: `table` has {} for the number of a layer."""
    number = re.search(r"\.(\d+)\.", name)
    if number is None:
        return table[name]
    return table[name.replace(number[0], ".{}.")].format(number[1])


def fit(tensors: Mapping[str, Tensor], wanted: Mapping[str, Wanted], where: str) -> dict[str, Tensor]:
    """Ours from theirs, complete, finite and of one floating type (the widest among them).

    Args:
        tensors: their name → tensor.
        wanted: their name → what it is here.
        where: the checkpoint, for messages.

    Raises:
        UserError: tensors that are missing, unknown, misshapen, not floating-point, or not finite; all are listed.
    """
    wrong = [f"{name} is missing" for name in wanted if name not in tensors]
    for name, x in tensors.items():
        if name not in wanted:
            wrong.append(f"{name} {tuple(x.shape)} is not part of the model")
        elif tuple(x.shape) != wanted[name].shape:
            wrong.append(f"{name} has shape {tuple(x.shape)} instead of {wanted[name].shape}")
        elif x.dtype not in _WEIGHTS or x.layout is not torch.strided or x.is_meta:
            what = "no numbers" if x.is_meta else f"{x.dtype} ({x.layout})"
            wrong.append(f"{name} holds {what} instead of plain floating-point numbers of 16, 32 or 64 bits")
        elif not x.isfinite().all():
            wrong.append(f"{name} has {int((~x.isfinite()).sum())} values that are NaN or infinite")
    if wrong:
        raise UserError(f"{where} does not fit its configuration: " + listed(wrong))
    dtype = functools.reduce(torch.promote_types, (tensors[name].dtype for name in wanted))
    ours: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, want in wanted.items():
        x = tensors[name].detach()
        x = x if want.change is None else want.change(x)
        memory = x.untyped_storage().data_ptr()
        if memory in used:  # two names of one tensor; files want two
            x = x.clone()
        used.add(memory)
        ours[want.name] = x.to(dtype).contiguous()
    return ours


def same(tensors: dict[str, Tensor], extra: str, name: str, where: str) -> None:
    """Drops a tied weight that a checkpoint holds twice.

    Raises:
        UserError: the two are not the same.
    """
    one, other = tensors.get(extra), tensors.get(name)
    if one is not None and other is not None and not _equal(one, other):
        raise UserError(
            f"{where}: its configuration ties {extra} to {name}, but they are two different tensors; "
            "correct the configuration, or remove the one that is not used"
        )
    tensors.pop(extra, None)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Also where both are NaN, which is another mistake, and told by another."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def listed(problems: Iterable[str]) -> str:
    """One after another, in an order people expect: layer 2 before layer 10."""
    return "; ".join(
        sorted(problems, key=lambda text: [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", text)])
    )


def options(found: Mapping[str, Any], cannot: Mapping[str, str]) -> list[str]:
    """Reasons for refusing a configuration: every option of `cannot` that is set, with what it would change."""
    return [f"{name} = {found[name]!r} ({what})" for name, what in cannot.items() if found.get(name)]


def lightning_choices(config: ModelConfig) -> list[str]:
    """What a retention model has of the choices that formats of RetNets have no words for, each as it is written."""
    mixer, plain = config.mixer, RetentionConfig()
    names = (
        "decay_by_layer",
        "scale",
        "activation",
        "qk_norm",
        "gate_activation",
        "head_norm_groups",
        "rotary_dim",
    )
    found = [
        (f"mixer.{name}", getattr(mixer, name))
        for name in names
        if getattr(mixer, name) != getattr(plain, name)
    ]
    for name in ("residual", "residual_alpha", "residual_beta"):
        if (value := getattr(config, name)) != getattr(ModelConfig, name):
            found.append((name, value))
    return [f"{name} = {value!r} (it has none)" for name, value in found]
