"""Gated retention: the op where every token has a decay of its own, in every backend, against the law and plain loops."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from torch.library import opcheck

from retnet.ops import FORMS, retention, retention_step, retention_steps
from tests.helpers.parity import (
    assert_confined,
    assert_same,
    outputs_and_gradients,
    random_inputs,
    relative,
    token_decays,
)

BACKENDS = ("reference", "torch", "numba")
PATHS = [(backend, form) for backend in BACKENDS for form in FORMS]
EMPTY_AMONG = [0, 1, 7, 16, 0, 1, 16, 20, 0]


def bounds(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def naive(q, k, v, log_decay, state):
    """The recurrence with plain loops, independent of the library's own reference."""
    B, T, H, K = q.shape
    out, S, gamma = torch.zeros(*v.shape, dtype=torch.float64), state.clone(), log_decay.exp()
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        S[b, h] = gamma[b, t, h] * S[b, h] + torch.outer(k[b, t, h], v[b, t, h])
        out[b, t, h] = K**-0.5 * (q[b, t, h] @ S[b, h])
    return out, S


@pytest.mark.parametrize(("backend", "form"), PATHS)
def test_every_path_is_the_recurrence(backend, form):
    inputs = [x.detach() for x in random_inputs(2, 21, 3, 4, 6)]
    decays = token_decays(2, 21, 3).detach()
    want = naive(*inputs[:3], decays, inputs[3])
    got = retention(*inputs[:3], decays, inputs[3], form=form, chunk_size=8, backend=backend)
    assert all(relative(a, b) < 1e-12 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("backend", "form"), PATHS)
@pytest.mark.parametrize("T", [1, 37])
@pytest.mark.parametrize("with_state", [True, False])
def test_forms_agree_in_outputs_states_and_gradients(backend, form, T, with_state):
    inputs = list(random_inputs(2, T, 3, 8, 5))
    inputs[3] = inputs[3] if with_state else None
    decays = token_decays(2, T, 3)
    want = outputs_and_gradients(inputs, decays, form="recurrent", backend="reference")
    got = outputs_and_gradients(inputs, decays, form=form, chunk_size=16, backend=backend)
    assert_same(got, want, 1e-10)


@pytest.mark.parametrize(("backend", "form"), PATHS)
def test_packed_documents_equal_separate_ones(backend, form):
    T = sum(EMPTY_AMONG)
    inputs, decays = random_inputs(1, T, 3, 8, 5, rows=len(EMPTY_AMONG)), token_decays(1, T, 3)
    options = {"form": form, "chunk_size": 8, "backend": backend}
    got = outputs_and_gradients(inputs, decays, cu_seqlens=bounds(EMPTY_AMONG), **options)
    law = {"form": "recurrent", "backend": "reference"}
    assert_same(got, outputs_and_gradients(inputs, decays, cu_seqlens=bounds(EMPTY_AMONG), **law), 1e-10)
    q, k, v, state = inputs
    for i, (a, b) in enumerate(itertools.pairwise(bounds(EMPTY_AMONG).tolist())):
        out, _ = retention(q[:, a:b], k[:, a:b], v[:, a:b], decays[:, a:b], state[i : i + 1], **options)
        assert relative(got["out"][:, a:b], out) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_cut_and_carried_equals_the_uncut_one(backend):
    (q, k, v, state), decays = random_inputs(1, 40, 3, 4, 6), token_decays(1, 40, 3)
    leaves = (q, k, v, state, decays)

    def run(*cuts):
        outs, carried = [], state
        for a, b in itertools.pairwise((0, *cuts, 40)):
            tokens = (x[:, a:b] for x in (q, k, v, decays))
            out, carried = retention(*tokens, carried, chunk_size=8, backend=backend)
            outs.append(out)
        out = torch.cat(outs, dim=1)
        return out, carried, *torch.autograd.grad(out.sin().sum() + carried.sin().sum(), leaves)

    assert all(relative(a, b) < 1e-10 for a, b in zip(run(1, 17, 32), run(), strict=True))


@pytest.mark.parametrize(
    "cu_seqlens",
    [
        pytest.param(None, id="rows", marks=pytest.mark.slow),
        pytest.param(torch.tensor([0, 3, 3, 5]), id="packed"),
    ],
)
def test_all_orders_and_directions(cu_seqlens):
    """Of the decays too, in chunks of which the last is not whole."""
    inputs = random_inputs(1, 5, 1, 2, 1, rows=None if cu_seqlens is None else 3)
    decays = -torch.rand(1, 5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.1

    def run(q, k, v, state, log_decay):
        return retention(q, k, v, log_decay, state, cu_seqlens, chunk_size=2, backend="numba")

    leaves = (*inputs, decays.requires_grad_())
    assert gradcheck(run, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(run, leaves, check_fwd_over_rev=True)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_third_derivatives_transforms_and_vmap(backend):
    """Where nothing is a leaf, and where many calls are one."""
    (q, k, v, state), decays = random_inputs(2, 6, 2, 3, 2), token_decays(2, 6, 2).detach() / 100
    inputs = tuple(x.detach() for x in (q, k, v, state, decays))

    def of(backend):
        def loss(q, k, v, state, log_decay):
            found = retention(q, k, v, log_decay, state, chunk_size=4, backend=backend)
            return sum(x.pow(2).sum() for x in found)

        def penalty(*x):
            return sum(g.pow(2).sum() for g in grad(loss, (0, 1, 2, 3, 4))(*x))

        third = grad(lambda *x: grad(penalty, 4)(*x).pow(2).sum(), (0, 1, 2, 3, 4))(*inputs)
        many = tuple(torch.stack([x, x / 2, x.flip(0)], dim=1) for x in inputs)
        each = vmap(grad(loss, (0, 4)), 1)(*many)
        shared = vmap(loss, (None, None, None, None, 1))(*inputs[:4], many[4])
        along = jvp(loss, inputs, tuple(x.cos() for x in inputs))
        return *third, *each, shared, *along

    for got, want in zip(of(backend), of("reference"), strict=True):
        assert relative(got, want) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types(dtype):
    """The gradient of the decays too, which is a sum of differences over all later tokens."""
    inputs, decays = (
        random_inputs(2, 130, 3, 16, 24, dtype=dtype),
        token_decays(2, 130, 3, dtype=torch.float32),
    )
    exact = [x.detach().double() for x in inputs]
    law = decays.detach().double().requires_grad_()
    want = outputs_and_gradients(exact, law, form="recurrent", backend="reference")
    unit = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}[dtype]
    for backend in BACKENDS:
        got = outputs_and_gradients(inputs, decays, chunk_size=32, backend=backend)
        assert got["state"].dtype == got["dlog_decay"].dtype == torch.float32
        assert_same(got, want, unit)
        assert relative(got["state"], want["state"]) < 2e-6


def test_tangents_of_decays_in_narrow_types():
    """They are differences of what grows with the length: of rounded numbers nothing but rounding would be left."""
    q, k, v, _ = (x.detach() for x in random_inputs(1, 300, 2, 16, 16, dtype=torch.bfloat16))
    decays = token_decays(1, 300, 2, dtype=torch.float32).detach()

    def along(backend, dtype, decays):
        def run(log_decay):
            return retention(*(x.to(dtype) for x in (q, k, v)), log_decay, chunk_size=32, backend=backend)[0]

        return jvp(run, (decays,), (torch.ones_like(decays),))[1]

    want = along("reference", torch.float64, decays.double())
    for backend in ("torch", "numba"):
        assert relative(along(backend, torch.bfloat16, decays), want) < 6e-3


@pytest.mark.parametrize(("backend", "form"), PATHS)
def test_however_much_is_forgotten(backend, form):
    """−∞ forgets all and leaves the rest of the chunk as it is; NaN stays NaN, from its token on."""
    q, k, v, state = random_inputs(1, 40, 2, 4, 4, dtype=torch.float32)
    decays = torch.full((1, 40, 2), -1e-3)
    decays[:, 5], decays[:, 9], decays[:, 20] = -torch.inf, -1e30, -1e4
    decays.requires_grad_()
    out, final = retention(q, k, v, decays, state, form=form, chunk_size=16, backend=backend)
    law = retention(*(x[:, 20:] for x in (q, k, v)), torch.full((2,), -1e-3), backend="reference")
    assert relative(out[:, 20:], law[0]) < 1e-5
    assert relative(final, law[1]) < 1e-5
    grads = torch.autograd.grad(out.sum() + final.sum(), (q, k, v, state, decays))
    assert all(x.isfinite().all() for x in grads)
    broken = decays.detach().clone()
    broken[:, 30] = torch.nan
    out, _ = retention(q, k, v, broken, state, form=form, chunk_size=16, backend=backend)
    assert out[:, 30:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_number_stays_in_its_document(backend):
    assert_confined(backend, torch.float64, 1e-10)


def test_a_constant_decay_is_one_of_every_token():
    inputs = random_inputs(2, 150, 3, 4, 5)
    heads = torch.tensor([-1e-3, -0.5, 0.0], dtype=torch.float64, requires_grad=True)
    want = outputs_and_gradients(inputs, heads, backend="numba")
    for backend in BACKENDS:
        got = outputs_and_gradients(
            inputs, heads.detach().expand(2, 150, 3).requires_grad_(), backend=backend
        )
        got["dlog_decay"] = got["dlog_decay"].sum((0, 1))
        assert_same(got, want, 1e-10)


def test_uninitialised_memory_is_never_read(monkeypatch):
    plain = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        x = plain(self, *size, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    T = sum(EMPTY_AMONG)
    inputs, decays = random_inputs(1, T, 3, 8, 5, rows=len(EMPTY_AMONG)), token_decays(1, T, 3)
    for backend in ("torch", "numba"):
        got = outputs_and_gradients(
            inputs, decays, chunk_size=8, backend=backend, cu_seqlens=bounds(EMPTY_AMONG)
        )
        assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("slots", [None, torch.tensor([4, -1, 0])], ids=["rows", "slots"])
def test_steps(backend, slots):
    q, k, v, _ = (x.detach().float() for x in random_inputs(3, 5, 2, 8, 6))
    decays, pool = token_decays(3, 5, 2, dtype=torch.float32).detach(), torch.randn(5, 2, 8, 6)
    rows = torch.arange(3) if slots is None else slots
    real, before = rows >= 0, pool.double()
    want, final = naive(*(x[real].double() for x in (q, k, v, decays)), before[rows[real]])
    other = pool.clone()
    together = retention_steps(q, k, v, decays, other, slots, backend=backend)
    for t in range(5):
        out = retention_step(q[:, t], k[:, t], v[:, t], decays[:, t], pool, slots, backend=backend)
        assert relative(out[real], want[:, t]) < 1e-6
        assert not out[~real].any()
        assert torch.equal(together[:, t], out)
    before[rows[real]] = final
    assert relative(pool, before) < 1e-6
    assert torch.equal(pool, other)


@pytest.mark.slow
def test_opcheck():
    backend = "torch"
    cu_seqlens = torch.tensor([0, 9, 9, 20])
    q, k, v, s = random_inputs(1, 20, 3, 8, 12, dtype=torch.float32, rows=3)
    args = (q, k, v, token_decays(1, 20, 3, dtype=torch.float32), s, cu_seqlens, 0.25, 8)
    opcheck(getattr(torch.ops.retnet, f"retention_chunkwise_{backend}"), (*args, False))
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    out, final, _ = getattr(torch.ops.retnet, f"retention_chunkwise_{backend}")(*plain, False)
    backward = getattr(torch.ops.retnet, f"retention_chunkwise_{backend}_backward")
    opcheck(backward, (*args, torch.ones_like(out), torch.ones_like(final), None, True))
    step = getattr(torch.ops.retnet, f"retention_step_{backend}")
    opcheck(step, (*(x[0] for x in plain[:4]), torch.randn(20, 3, 8, 12), None, 0.25))


def test_ranks_refuse_it():
    from retnet.ops.context_parallel import Stretch, context_parallel_retention

    q, k, v, _ = (x.detach() for x in random_inputs(1, 4, 2, 3, 2))
    stretch = Stretch(None, 0, (0, 4, 8), (0, 0), None)
    with pytest.raises(ValueError, match=r"log_decay has shape \(1, 4, 2\); allowed across ranks: \[H\]"):
        context_parallel_retention(q, k, v, token_decays(1, 4, 2), stretch)
