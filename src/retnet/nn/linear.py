"""Linear layers without bias: fp32 (or any floating type), and weight-only int8 for inference."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retnet.ops import Remade, product, product_of
from retnet.ops.torch_private import HOOKS
from retnet.settings import UserError


class Linear(nn.Linear):
    """A linear layer without bias, whose product with a few rows, which is decoding, runs at the memory's speed."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Draws the weight, but not on the meta device, which keeps no numbers: two fifths of making a model there."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """[...,in_features] → [...,out_features]."""
        if type(self.weight) is not nn.Parameter:  # quantised or sharded weights bring their own product
            return F.linear(input, self.weight)
        return product(input, self.weight)


def linear_of(
    layer: nn.Module,
    function: Callable[..., Tensor],
    *rows: Tensor | Remade | None,
    shared: tuple[Tensor | None, ...] = (),
    lead: int,
) -> Tensor:
    """layer(function(*rows, *shared)), where a plain `Linear` keeps these for the backward pass; see `product_of`.

    Any other layer, and one that has hooks or a `forward` of its own, is called.
    """
    if (
        torch.is_grad_enabled()
        and type(layer) is Linear
        and type(layer.weight) is nn.Parameter
        and not any(map(layer.__dict__.get, HOOKS))
        and "forward" not in layer.__dict__
    ):
        return product_of(function, layer.weight, *rows, shared=shared, lead=lead)
    made = [x.function(*x.inputs) if isinstance(x, Remade) else x for x in rows]
    y: Tensor = layer(function(*made, *shared))
    return y


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
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
        self.scale = scale.to(self.codes.device)
        return self
