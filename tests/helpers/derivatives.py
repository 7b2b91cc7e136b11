"""Every way of asking torch for a derivative, beside the same numbers from plain loops of `torch.autograd.grad`.

A function takes tensors and gives one. `WAYS` holds, by name, how torch is asked and what the answer must be: both take
the function and its inputs, and give tensors.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import jacfwd, jacrev, jvp, vmap

from tests.helpers.parity import relative

COPIES = 3  # of everything that is batched


def loss(y: Tensor) -> Tensor:
    return y.pow(3).sum() + y.sum()


def penalty(grads) -> Tensor:
    return sum(g.pow(2).sum() for g in grads)


def leaves(inputs) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in inputs]


def many(x: Tensor) -> Tensor:
    return torch.stack([x * (1 - 0.3 * i) for i in range(COPIES)])


def along(inputs) -> tuple[Tensor, ...]:
    return tuple(x.cos() for x in inputs)


def gradient(f, inputs):
    given = leaves(inputs)
    return torch.autograd.grad(loss(f(*given)), given)


def second(f, inputs):
    given = leaves(inputs)
    grads = torch.autograd.grad(loss(f(*given)), given, create_graph=True)
    return torch.autograd.grad(penalty(grads), given)


def tangent(f, inputs):
    """By the trick of two backward passes."""
    given = leaves(inputs)
    y = f(*given)
    v = torch.zeros_like(y, requires_grad=True)
    grads = torch.autograd.grad(y, given, v, create_graph=True)
    return torch.autograd.grad(grads, v, along(inputs))


def dual(f, inputs):
    with forward_ad.dual_level():
        y = f(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, along(inputs), strict=True)))
        return [forward_ad.unpack_dual(y).tangent]


def each(f, inputs):
    """A function of inputs, once for each copy."""
    copies = [many(x) for x in inputs]
    rows = [f([x[i] for x in copies]) for i in range(COPIES)]
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def func_grad(f, inputs):
    return torch.func.grad(lambda *x: loss(f(*x)), argnums=tuple(range(len(inputs))))(*inputs)


def func_second(f, inputs):
    return torch.func.grad(lambda *x: penalty(func_grad(f, x)), argnums=tuple(range(len(inputs))))(*inputs)


def rows_of_jacobian(f, inputs):
    """Of the sums of four parts of the output, in the last input."""
    *rest, last = leaves(inputs)
    y = parts(f(*rest, last))
    return [torch.stack([torch.autograd.grad(y[i], last, retain_graph=True)[0] for i in range(len(y))])]


def parts(y: Tensor) -> Tensor:
    return torch.stack([part.sum() for part in y.flatten().tensor_split(4)])


def in_last(f, inputs):
    return lambda last: parts(f(*inputs[:-1], last))


def cotangents(y: Tensor) -> Tensor:
    place = torch.arange(y.numel(), dtype=y.dtype).view(y.shape)
    return torch.stack([place.sin(), place.cos(), torch.ones_like(y)])


def bent(y: Tensor) -> Tensor:
    """So that a linear function has second derivatives."""
    return y + y.pow(3)


def batched(f, inputs, create_graph=False):
    given = leaves(inputs)
    y = bent(f(*given))
    grads = torch.autograd.grad(y, given, cotangents(y), is_grads_batched=True, create_graph=create_graph)
    return torch.autograd.grad(penalty(grads), given) if create_graph else grads


def vmapped_backward(f, inputs):
    given = leaves(inputs)
    y = bent(f(*given))
    return vmap(lambda v: torch.autograd.grad(y, given, v, retain_graph=True))(cotangents(y))


def one_by_one(f, inputs, create_graph=False):
    given = leaves(inputs)
    y = bent(f(*given))
    rows = [
        torch.autograd.grad(y, given, v, retain_graph=True, create_graph=create_graph) for v in cotangents(y)
    ]
    grads = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    return torch.autograd.grad(penalty(grads), given) if create_graph else grads


WAYS = {
    "autograd.grad": (gradient, gradient),
    "create_graph": (second, second),
    "is_grads_batched": (batched, one_by_one),
    "is_grads_batched, create_graph": (
        lambda f, x: batched(f, x, create_graph=True),
        lambda f, x: one_by_one(f, x, create_graph=True),
    ),
    "vmap of autograd.grad": (vmapped_backward, one_by_one),
    "dual numbers": (dual, tangent),
    "func.grad": (func_grad, gradient),
    "func.grad twice": (func_second, second),
    "jvp": (lambda f, x: jvp(f, x, along(x))[1:], tangent),
    "vmap": (lambda f, x: [vmap(f)(*map(many, x))], lambda f, x: each(lambda x: [f(*x)], x)),
    "gradients of each sample": (
        lambda f, x: vmap(lambda *x: func_grad(f, x))(*map(many, x)),
        lambda f, x: each(lambda x: gradient(f, x), x),
    ),
    "jacrev": (lambda f, x: [jacrev(in_last(f, x))(x[-1])], rows_of_jacobian),
    "jacfwd": (lambda f, x: [jacfwd(in_last(f, x))(x[-1])], rows_of_jacobian),
}


def assert_right_or_refused(way, f, inputs, law, *, tolerance: float, refusal: str | None = None) -> None:
    """What torch finds for f is what plain loops find for the law in fp64; or f refuses in words of ours.

    Args:
        way: a key of `WAYS`.
        f: the function that is asked.
        inputs: of f; those of the law are the same in fp64.
        law: the same function in a form that is known to be right.
        tolerance: relative, of all numbers together.
        refusal: what f is to say where it refuses.
    """
    asked, by_hand = WAYS[way]
    inputs = tuple(x.detach() for x in inputs)
    with pytest.raises((NotImplementedError, ValueError), match=refusal) if refusal else nullcontext():
        got = asked(f, inputs)
    if refusal:
        return
    want = by_hand(law, tuple(x.double() for x in inputs))
    assert len(got) == len(want)
    flat = [torch.cat([x.detach().double().flatten() for x in side]) for side in (got, want)]
    assert [x.shape for x in got] == [x.shape for x in want]
    assert flat[1].norm() > 1e-3
    assert relative(*flat) < tolerance, relative(*flat)
