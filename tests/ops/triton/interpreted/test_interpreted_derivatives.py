"""Derivatives of derivatives, forwards, batched: the kernels' operators against the law in fp64."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from retnet.ops import apply_rotary, frequencies, head_norm, log_decays, positions, retention
from tests.helpers.derivatives import assert_right_or_refused
from tests.helpers.parity import random_inputs, relative
from tests.ops.triton.interpreted.test_interpreted_layer import layer

LOG_DECAY = log_decays("paper", 2)


@pytest.fixture(autouse=True)
def _unpoisoned(_poisoned):
    """torch.func does more with memory than we do."""
    torch.use_deterministic_algorithms(False)


def penalty(inputs, backend, **options):
    """A gradient penalty of every input, and its gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, final = retention(*leaves[:3], LOG_DECAY.to(leaves[3].dtype), leaves[3], backend=backend, **options)
    loss = out.pow(2).sum() + final.pow(2).sum()
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), leaves)


@pytest.mark.parametrize("keep_states", [True, False])
@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 9, 9, 20])], ids=["rows", "packed"])
def test_gradient_penalty(cu_seqlens, keep_states, seed):
    rows = None if cu_seqlens is None else 3
    inputs = random_inputs(1, 20, 2, 16, 20, dtype=torch.float32, rows=rows, seed=seed)
    options = {"cu_seqlens": cu_seqlens, "chunk_size": 16, "keep_states": keep_states}
    want = penalty([x.double() for x in inputs], "reference", **options)
    for got, exact in zip(penalty(inputs, "triton", **options), want, strict=True):
        assert relative(got, exact) < 1e-5


def test_retention_forwards_and_batched(seed):
    q, k, v, state = (x.detach() for x in random_inputs(3, 9, 2, 16, 20, dtype=torch.float32, seed=seed))

    def run(backend, dtype):
        def function(q, k, v, state):
            shared = (LOG_DECAY.to(dtype), state[None])
            return retention(q[None], k[None], v[None], *shared, backend=backend)[0]

        inputs = [x.to(dtype) for x in (q, k, v, state)]
        many = vmap(function)(*inputs)
        _, along = jvp(vmap(function), tuple(inputs), tuple(x.cos() for x in inputs))
        each = vmap(grad(lambda *x: function(*x).pow(2).sum(), argnums=(0, 1, 2, 3)))(*inputs)
        return many, along, *each

    for got, want in zip(run("triton", torch.float32), run("reference", torch.float64), strict=True):
        assert relative(got, want) < 1e-5


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("norm", ["group", "rms", "none"])
def test_head_norm(norm, full, seed):
    g = torch.Generator().manual_seed(seed)
    o, gate, weight = (torch.randn(shape, generator=g) for shape in ((2, 5, 2, 20), (2, 5, 40), (40,)))
    sums = 1 + torch.rand(1, 5, 2, generator=g) if full else None

    def run(backend, dtype):
        def function(o, gate, weight):
            gated = {"gate": gate, "weight": weight} if full else {}
            s = None if sums is None else sums.to(dtype)
            return head_norm(o, norm=norm, sums=s, eps=0.1, backend=backend, **gated)

        inputs = [x.to(dtype).requires_grad_() for x in (o, gate, weight)[: 3 if full else 1]]
        rest = [x.to(dtype) for x in (o, gate, weight)[len(inputs) :]]
        first = torch.autograd.grad(function(*inputs, *rest).pow(3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.pow(2).sum() for x in first), inputs)
        inputs = [x.detach() for x in inputs]
        _, along = jvp(lambda *x: function(*x, *rest), tuple(inputs), tuple(x.cos() for x in inputs))
        many = vmap(lambda o, gate: function(o, gate, weight.to(dtype)))(
            o.to(dtype)[:, None], gate.to(dtype)[:, None]
        )
        return *first, *second, along, many[:, 0] if sums is None else many

    for got, want in zip(run("triton", torch.float32), run("torch", torch.float64), strict=True):
        assert relative(got, want) < 1e-5


def test_rotation(seed):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, 5, 2, 16, generator=g) for _ in range(2))

    def run(backend, dtype):
        def function(q, k):
            return apply_rotary(q[None], k[None], positions(5), frequencies(16), backend=backend)

        inputs = (q.to(dtype), k.to(dtype))
        many = vmap(function)(*inputs)
        _, along = jvp(vmap(function), inputs, (inputs[0].cos(), inputs[1].sin()))
        each = vmap(grad(lambda q, k: function(q, k)[0].pow(2).sum() + function(q, k)[1].sum(), (0, 1)))(
            *inputs
        )
        return *many, *along, *each

    for got, want in zip(run("triton", torch.float32), run("torch", torch.float64), strict=True):
        assert relative(got, want) < 1e-5


def test_gradients_of_each_sample_of_a_layer(seed):
    """And their penalty, through every kernel of a layer."""
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(seed))

    def run(backend, dtype):
        mixer = layer(backend, dtype, score_norm="decay", head_norm_affine=True)
        weights = {name: w.detach() for name, w in mixer.named_parameters()}

        def loss(weights, x):
            return functional_call(mixer, weights, (x[None],)).pow(2).sum()

        each = vmap(grad(loss), (None, 0))(weights, x.to(dtype))
        penalty = grad(lambda w: sum(g.pow(2).sum() for g in grad(loss)(w, x[0].to(dtype)).values()))(weights)
        return [*each.values(), *penalty.values()]

    for got, want in zip(run("triton", torch.float32), run("reference", torch.float64), strict=True):
        assert relative(got, want) < 3e-5


def retained(backend):
    def run(q, k, v, state):
        decay = LOG_DECAY.to(q.dtype)
        return torch.cat([x.flatten() for x in retention(q, k, v, decay, state, backend=backend)])

    return run


def normed(backend):
    return lambda o, gate: head_norm(o, gate, eps=0.1, backend=backend)


def turned(backend):
    return lambda q, k: torch.cat(apply_rotary(q, k, positions(5), frequencies(16), backend=backend))


@pytest.mark.parametrize("way", ["is_grads_batched", "vmap of autograd.grad"])
@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (retained, [(1, 5, 2, 16), (1, 5, 2, 16), (1, 5, 2, 16), (1, 2, 16, 16)]),
        (normed, [(1, 5, 2, 16), (1, 5, 32)]),
        (turned, [(1, 5, 2, 16), (1, 5, 2, 16)]),
    ],
)
def test_many_gradients_at_once(op, shapes, way, seed):
    g = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=g) for shape in shapes]
    assert_right_or_refused(way, op("triton"), inputs, op("torch"), tolerance=1e-4)
