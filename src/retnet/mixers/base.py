"""`Mixer`, the protocol of sequence mixers: one module, one set of weights, three ways to run it."""

# ruff: noqa: ANN401 (the state of a mixer is a type of its own)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from retnet.nn import Positions, narrow_parameter
from retnet.settings import Choice, UserError

# A NamedTuple of tensors, batch first. Every mixer names its own; whoever holds one need not know which.
State = tuple[Any, ...]


# `Mixer.head_axes` of the usual projections
PROJECTION_AXES: Mapping[str, int] = {
    "q_proj.weight": 0,
    "k_proj.weight": 0,
    "v_proj.weight": 0,
    "out_proj.weight": 1,
}


class MixerConfig(Choice):
    """Base of the mixers' configurations; which one a table describes is said by its key ``name``."""

    name: str

    def of_layer(self, layer: int, num_layers: int) -> Self:
        """What it says of one layer of a model, where that depends on the depth: by default of all the same.

        Args:
            layer: from 0.
            num_layers: of the model.

        Raises:
            UserError: it cannot be for a model of so many layers.
        """
        return self


def head_width(d_model: int, num_heads: int) -> int:
    """Width of one head.

    Raises:
        UserError: the model's width does not divide by the heads.
    """
    if d_model % num_heads:
        raise UserError(f"d_model {d_model} is not a multiple of num_heads {num_heads}; change one")
    return d_model // num_heads


def state_place(
    weight: Tensor, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device | str, torch.dtype]:
    """Device and type of a constant state, as `Mixer.init_state` has them: by default the weights', but at least fp32."""
    return device or weight.device, torch.promote_types(dtype or weight.dtype, torch.float32)


class TrainingForm(NamedTuple):
    """One of the ways in which a mixer computes whole sequences, where studies tell them apart."""

    name: str = ""  # in tables
    settings: Mapping[str, Any] = {}  # of the mixer's configuration
    memory: str | None = None  # growth with the length N of what training keeps, if not as said of the mixer


class Mixer(nn.Module):
    """Mixes information along time. `forward`, `prefill` and repeated `step` are the same function.

    Packed documents (`cu_seqlens`, B = 1) never see each other; with them, batch rows of a state are documents.
    Where a kind of mixer has `positions`, all three take them as a keyword of that name; without it each makes its own.
    A mixer is made from the model's width and a configuration of its own `Config` class.
    A state may be updated in place: use the one that is returned, and clone what must stay.

    Attributes:
        caches: names of the tensors of a state that have a place for each token, [B,S,...]; then its `length` [B] says how
            many are filled, and what stands behind them is never read. Empty where a state has a constant size. A decoder
            gives a list instead, one [S,...] a row with room for what comes, in which `prefill` and `step` write.
        paper_row: its row in the paper's table of architectures (`retnet.paper.COMPLEXITY`), if it is there.
        theory: how the cost of a decoded token, and what training keeps, grow with the length N, if it is not there.
        along_time: how training goes along time, in tables.
        training_forms: ways to compute whole sequences that studies compare.
        cuttable: whether a sequence may be cut over processes (context parallelism): a mixer of this kind then has a
            `context` (`retnet.ops.context_parallel.ContextParallel`), which those who cut it set, or None.
        head_axes: of its weights, the axis along which heads lie one after the other; empty where heads do not stand by
            themselves. A mixer that has any has `num_heads` in its configuration, and all that it is made of in them, but
            for `shared_norms`. Groups of heads may share some of it (`kv_heads` in the configuration); they stay together.
        shared_norms: names of its norms, if it has them, whose weights all heads use.
        exactly_causal: False where rounding knows no order (convolution by FFT), so that later tokens leave traces of ε.
    """

    Config: ClassVar[Any]
    caches: ClassVar[tuple[str, ...]] = ()
    paper_row: ClassVar[str | None] = None
    theory: ClassVar[tuple[str, str]] = ("1", "N")
    along_time: ClassVar[str] = "token by token"
    training_forms: ClassVar[tuple[TrainingForm, ...]] = (TrainingForm(),)
    cuttable: ClassVar[bool] = False
    head_axes: ClassVar[Mapping[str, int]] = {}
    shared_norms: ClassVar[tuple[str, ...]] = ()
    exactly_causal: ClassVar[bool] = True
    num_heads: int

    def __init__(self, d_model: int, config: Any) -> None:
        super().__init__()

    def keep_heads(self, begin: int, end: int) -> None:
        """Leaves it the heads from `begin` to `end` alone: its output is then their summand of the whole's.

        Raises:
            TypeError: heads of this kind of mixer do not stand by themselves.
        """
        if not self.head_axes:
            raise TypeError(f"{type(self).__name__} has no heads that stand by themselves")
        for name, axis in self.head_axes.items():
            narrow_parameter(self, name, axis, begin, end, self.num_heads)
        self.num_heads = end - begin

    def positions(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        state: Any = None,
    ) -> Positions | None:
        """What layers of one kind would make alike of the places of tokens, cos and sin first of all: None by default.

        A model asks the first mixer of a kind once a forward pass and hands the answer to all of them.

        Args:
            x: what the layer reads, [B,T,D], or [B,D] for `step`; its shape, type and device count.
            cu_seqlens: as in `forward` and `prefill`.
            state: of the layer, for `prefill` and `step`.
        """
        return None

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Whole sequences, for training: x [B,T,D] → [B,T,D]."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def prefill(self, x: Tensor, state: Any, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        """Many tokens from a state: x [B,T,D] → [B,T,D] and the state after them."""
        raise TypeError(f"{type(self).__name__} does not define prefill")

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token from a state: x [B,D] → [B,D] and the state after it."""
        raise TypeError(f"{type(self).__name__} does not define step")

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The state before the first token. `dtype` is that of the computation; what accumulates is at least fp32."""
        raise TypeError(f"{type(self).__name__} does not define init_state")

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        """Bytes of one sequence's state after `length` tokens: a constant, but for mixers whose state grows."""
        return sum(part.nbytes for part in self.init_state(1, device="meta", dtype=dtype))

    def mixing_flops(self, length: int) -> int:
        """Floating-point operations per token of a forward pass over `length` tokens, projections not counted."""
        raise TypeError(f"{type(self).__name__} does not define mixing_flops")
