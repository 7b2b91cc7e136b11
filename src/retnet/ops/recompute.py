"""Selective activation recomputation: products whose input is cheap to make again keep what it is made of instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retnet.ops.linear import gemm, input_gradient, product, weight_gradient
from retnet.ops.torch_private import is_batched, plain

BLOCK_ROWS = (
    2048  # a thread, at once on a CPU: what is made again is then never whole; fewer make products slower
)

Function = Callable[..., Tensor]
Precision = Callable[
    [], AbstractContextManager[object]
]  # the autocast around the forward pass, to be entered again


class Remade(NamedTuple):
    """A tensor that is made again in the backward pass, of what is kept for it: function(*inputs), without randomness."""

    function: Function
    inputs: tuple[Tensor | None, ...]


def product_of(
    function: Function,
    weight: Tensor,
    *rows: Tensor | Remade | None,
    shared: tuple[Tensor | None, ...] = (),
    lead: int,
) -> Tensor:
    """x Wᵀ for x = function(*rows, *shared), which keeps these for its backward pass, where x is made again.

    Selective activation recomputation (Korthikanti et al. 2022): worth it where x is as large as the rows and cheap beside
    the product, as behind activations, norms and gates. The gradients are those of ``product(function(…), weight)``, of any
    order. On a CPU, function and product take turns on blocks of rows.

    Args:
        function: works on each row by itself; without randomness, and without weights that are not among its arguments.
        weight: [N,K].
        rows: [...,·], which have the leading dimensions of the result; None where an argument but the first is left out.
            What is `Remade` is not kept either.
        shared: arguments that all rows share, such as the weights of a norm.
        lead: number of leading dimensions.

    Returns:
        [...,N].
    """
    if not (torch.is_grad_enabled() and plain()):  # a compiler decides for itself
        made = [x.function(*x.inputs) if isinstance(x, Remade) else x for x in rows]
        return product(function(*made, *shared), weight)
    makers: list[tuple[Function | None, int]] = []
    inputs: list[Tensor | None] = []
    for x in rows:
        if isinstance(x, Remade):
            makers.append((x.function, len(x.inputs)))
            inputs += x.inputs
        else:
            makers.append((None, 1))
            inputs.append(x)
    return _ProductOf.apply(_Plan(function, makers, lead), weight, *inputs, *shared)  # type: ignore[no-untyped-call]  # torch has no types here


class _Plan(NamedTuple):
    """How a `product_of` is computed, beside its tensors."""

    function: Function
    makers: list[tuple[Function | None, int]]  # of each row argument: what makes it, and of how many inputs
    lead: int

    def arguments(self, inputs: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The rows, made where they have to be, and what they share."""
        rows, at = [], 0
        for make, count in self.makers:
            rows.append(inputs[at] if make is None else make(*inputs[at : at + count]))
            at += count
        return rows, list(inputs[at:])

    def blocks(self, rows: Sequence[Tensor | None]) -> list[tuple[Tensor | None, ...]]:
        """Of rows, on a CPU; all rows elsewhere."""
        first = rows[0]
        assert first is not None
        count, size = math.prod(first.shape[: self.lead]), BLOCK_ROWS * torch.get_num_threads()
        if not first.is_cpu or count < 2 * size:
            return [tuple(rows)]
        flat = [None if x is None else x.flatten(0, self.lead - 1) for x in rows]
        return [
            tuple(None if x is None else x[start : start + size] for x in flat)
            for start in range(0, count, size)
        ]

    def input_gradients(
        self, leaves: Sequence[Tensor | None], rows: Sequence[Tensor | None], d_rows: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """From the gradients of the rows to those of what they are made of."""
        gradients: list[Tensor | None] = []
        for (make, count), row, d_row in zip(self.makers, rows, d_rows, strict=True):
            if make is None:
                gradients.append(d_row)
                continue
            sources = leaves[len(gradients) : len(gradients) + count]
            wanted = [x for x in sources if x is not None and x.requires_grad]
            if row is None or d_row is None:
                gradients += [None] * count
                continue
            found = iter(torch.autograd.grad(row, wanted, d_row, allow_unused=True))
            gradients += [next(found) if x is not None and x.requires_grad else None for x in sources]
        return gradients


class _ProductOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, weight: Tensor, *inputs: Tensor | None) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(weight, *inputs)
        device, ctx.plan = "cpu" if weight.is_meta else weight.device.type, plan
        surrounding = (torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.precision = partial(torch.autocast, device, *surrounding, cache_enabled=False)
        rows, shared = plan.arguments(inputs)
        parts = []
        for block in plan.blocks(rows):
            parts.append(gemm(plan.function(*block, *shared), weight))
        return parts[0] if len(parts) == 1 else _joined(parts, rows, plan.lead)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        weight, *inputs = ctx.saved_tensors
        transformed = torch.is_grad_enabled() or is_batched(grad)
        gradients = _transformable_gradients if transformed else _gradients
        return None, *gradients(ctx.plan, ctx.precision, grad, weight, inputs, ctx.needs_input_grad[1])


def _gradients(
    plan: _Plan, precision: Precision, grad: Tensor, weight: Tensor, inputs: list[Tensor | None], learn: bool
) -> list[Tensor | None]:
    """Of the weight, if wanted, and of the inputs."""
    leaves = [_leaf(x, x) for x in inputs]
    with torch.enable_grad(), precision():
        rows, shared = plan.arguments(leaves)
    dw = (
        weight.new_zeros(weight.shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        if learn
        else None
    )
    turned, d_rows, d_shared = weight.to(grad.dtype).t(), _Sums(rows, plan.lead), _Sums(shared, 0)
    for block, (d_out,) in zip(plan.blocks(rows), plan.blocks([grad]), strict=True):
        assert d_out is not None
        cut = [_leaf(x, like) for x, like in zip(block, rows, strict=True)]
        with torch.enable_grad(), precision():
            x = plan.function(*cut, *shared)
        if dw is not None:
            _add_weight_gradient(dw, d_out, x.detach())
        wanted = [y for y in (*cut, *shared) if y is not None and y.requires_grad]
        if wanted and x.requires_grad:
            dx = gemm(d_out, turned).to(x.dtype)
            found = iter(torch.autograd.grad(x, wanted, dx, materialize_grads=True))
            del x, dx
            d_rows.put(found)
            d_shared.add(found)
    return [
        None if dw is None else dw.to(weight.dtype),
        *plan.input_gradients(leaves, rows, d_rows.totals),
        *d_shared.totals,
    ]


class _Sums:
    """Gradients of arguments, put together from those of blocks."""

    def __init__(self, arguments: list[Tensor | None], lead: int) -> None:
        self.totals: list[Tensor | None] = [None] * len(arguments)
        self._wanted = [i for i, x in enumerate(arguments) if x is not None and x.requires_grad]
        self._arguments, self._lead, self._start = arguments, lead, 0

    def put(self, found: Iterator[Tensor]) -> None:
        """The next rows of each."""
        count = 0
        for i in self._wanted:
            piece, whole = next(found), self._arguments[i]
            assert whole is not None
            if piece.shape == whole.shape:
                self.totals[i] = piece
                continue
            if (total := self.totals[i]) is None:
                self.totals[i] = total = torch.empty_like(whole, memory_format=torch.contiguous_format)
            count = len(piece)
            total.flatten(0, self._lead - 1)[self._start : self._start + count] = piece
        self._start += count

    def add(self, found: Iterator[Tensor]) -> None:
        """What one block adds to each."""
        for i in self._wanted:
            total, piece = self.totals[i], next(found)
            self.totals[i] = piece if total is None else total + piece


def _transformable_gradients(
    plan: _Plan, precision: Precision, grad: Tensor, weight: Tensor, inputs: list[Tensor | None], learn: bool
) -> list[Tensor | None]:
    """The same, where they will be differentiated themselves, or where grad is many (see `is_batched`)."""
    with torch.enable_grad(), precision():
        # inputs may depend on each other, views do not
        views = [None if x is None else x.view_as(x) for x in inputs]
        rows, shared = plan.arguments(views)
        x = plan.function(*rows, *shared)
    dw = weight_gradient(grad, x).to(weight.dtype) if learn else None
    wanted = [y for y in views if y is not None and y.requires_grad]
    found: Iterator[Tensor | None] = iter(())
    if wanted and x.requires_grad:
        dx, again = input_gradient(grad, weight).to(x.dtype), torch.is_grad_enabled()
        found = iter(torch.autograd.grad(x, wanted, dx, create_graph=again, allow_unused=True))
    return [dw, *(next(found, None) if y is not None and y.requires_grad else None for y in views)]


def _leaf(x: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if x is None or like is None else x.detach().requires_grad_(like.requires_grad)


def _joined(parts: Sequence[Tensor], rows: Sequence[Tensor | None], lead: int) -> Tensor:
    assert rows[0] is not None
    return torch.cat(tuple(parts)).view(*rows[0].shape[:lead], -1)


def _add_weight_gradient(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """total += gradᵀ x, in the type of the product but for the sum."""
    grad, x = grad.flatten(0, -2).t(), x.to(grad.dtype).flatten(0, -2)
    if total.dtype is grad.dtype:
        total.addmm_(grad, x)
    else:
        total += grad @ x
