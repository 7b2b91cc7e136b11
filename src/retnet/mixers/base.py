"""What every sequence mixer is: one module, one set of weights, three ways to run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.ops import Core, product
from retnet.settings import Choice, UserError

# A NamedTuple of tensors, batch first. Every mixer names its own; whoever holds one need not know which.
State = tuple[Any, ...]


class MixerConfig(Choice):
    """Base of the mixers' configurations; which one a table describes is said by its key ``name``."""

    name: str

    @classmethod
    def options(cls) -> Mapping[str, type]:
        """Name → configuration of every row of `MIXERS`."""
        from retnet.mixers import MIXERS  # the table lists classes that are built on this one

        return {name: mixer.Config for name, mixer in MIXERS.items()}


class Linear(nn.Linear):
    """A linear layer without bias, whose product with a few rows, which is decoding, runs at the memory's speed."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """[...,in_features] → [...,out_features]."""
        if type(self.weight) is not nn.Parameter:  # quantised or sharded weights bring their own product
            return F.linear(input, self.weight)
        return product(input, self.weight)


class Int8Linear(nn.Module):
    """A `Linear` for inference whose weight is int8, each row (an output's weights) with an fp32 scale of its own.

    A quarter of the bytes; with a few rows, which is decoding, on a CPU, they become fp32 in registers and the product
    takes what reading them takes. Elsewhere the whole weight is made fp32 for every product.

    Raises:
        UserError: the weights are not finite; or on `train()`.
    """

    codes: Tensor  # [out_features,in_features] int8, −127 to 127
    scale: Tensor  # [out_features] fp32

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().float()
        if not weight.isfinite().all():
            raise UserError(
                "weights that are infinite or not a number cannot be int8; take another checkpoint"
            )
        scale = (weight.abs().amax(1) / 127).clamp(
            min=torch.finfo(torch.float32).tiny
        )  # a row may be all zero
        self.register_buffer("codes", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.training = False

    @property
    def weight(self) -> Tensor:
        """The fp32 weight [out_features,in_features] that the codes stand for."""
        return self.codes * self.scale[:, None]

    def forward(self, input: Tensor) -> Tensor:
        """[...,in_features] → [...,out_features]."""
        return product(input, self.codes, self.scale)

    def train(self, mode: bool = True) -> Int8Linear:
        """Refuses: rounded weights cannot take small steps."""
        if mode:
            raise UserError("int8 weights cannot be trained; train the fp32 model and quantise it afterwards")
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """Moves like any module, but `.to(bfloat16)` must not round the scales."""
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale = scale.to(self.codes.device)
        return self


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


class Mixer(nn.Module):
    """Mixes information along time. `forward`, `prefill` and repeated `step` are the same function.

    Packed documents (`cu_seqlens`, B = 1) never see each other; with them, batch rows of a state are documents.
    A mixer is made from the model's width and a configuration of its own `Config` class.
    A state may be updated in place: use the one that is returned, and clone what must stay.
    """

    Config: ClassVar[Any]

    def __init__(self, d_model: int, config: Any) -> None:  # noqa: ANN401
        super().__init__()

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        """Whole sequences, for training: x [B,T,D] → [B,T,D]."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def prefill(self, x: Tensor, state: Any, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:  # noqa: ANN401
        """Many tokens from a state: x [B,T,D] → [B,T,D] and the state after them."""
        raise TypeError(f"{type(self).__name__} does not define prefill")

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:  # noqa: ANN401
        """One token from a state: x [B,D] → [B,D] and the state after it."""
        raise TypeError(f"{type(self).__name__} does not define step")

    def core(self) -> Core | None:
        """The mixer as `retnet.ops.make_plan` reads it, which steps whole blocks at once; None: it is composed."""
        return None

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any:  # noqa: ANN401
        """The state before the first token. `dtype` is that of the computation; what accumulates is at least fp32."""
        raise TypeError(f"{type(self).__name__} does not define init_state")

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        """Bytes of one sequence's state after `length` tokens: a constant, but for mixers whose state grows."""
        return sum(part.nbytes for part in self.init_state(1, device="meta", dtype=dtype))

    def mixing_flops(self, length: int) -> int:
        """Floating-point operations per token of a forward pass over `length` tokens, projections not counted."""
        raise TypeError(f"{type(self).__name__} does not define mixing_flops")
