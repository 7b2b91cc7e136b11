"""The three forms are one function; every backend is tested against the law."""

import itertools
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.ops import FORMS, log_decays, retention, retention_step
from retnet.ops.dispatch import _say_once
from tests.helpers.fast import few_fast
from tests.helpers.parity import assert_same, outputs_and_gradients, random_inputs, relative

GAMMAS = torch.tensor([1.0, 0.97, 0.5], dtype=torch.float64).log()
PATHS = [(backend, form) for backend in ("reference", "torch", "numba") for form in FORMS]
FEW_PATHS = few_fast(
    [pytest.param(*path, id="-".join(path)) for path in PATHS],
    "torch-parallel", "torch-recurrent", "numba-chunkwise",
)  # fmt: skip


def naive(q, k, v, gammas, state, scale):
    """The recurrence with plain loops, independent of the library's own reference."""
    B, T, H, _ = q.shape
    out = torch.zeros(*v.shape, dtype=torch.float64)
    S = state.detach().clone()
    for b, h in itertools.product(range(B), range(H)):
        for t in range(T):
            S[b, h] = gammas[h] * S[b, h] + torch.outer(k[b, t, h], v[b, t, h])
            out[b, t, h] = scale * (q[b, t, h] @ S[b, h])
    return out, S


@pytest.mark.parametrize(("backend", "form"), PATHS)
def test_every_path_is_the_recurrence(backend, form):
    q, k, v, state = (x.detach() for x in random_inputs(2, 21, 3, 4, 6))
    want, final = naive(q, k, v, GAMMAS.exp(), state, 0.5)
    out, after = retention(q, k, v, GAMMAS, state, scale=0.5, form=form, chunk_size=8, backend=backend)
    assert relative(out, want) < 1e-12
    assert relative(after, final) < 1e-12


@pytest.mark.parametrize(("backend", "form"), PATHS)
@pytest.mark.parametrize("T", [1, 5, 16, 37])
@pytest.mark.parametrize("with_state", [True, False])
def test_forms_agree_in_outputs_states_and_gradients(backend, form, T, with_state):
    inputs = list(random_inputs(2, T, 3, 8, 5))
    if not with_state:
        inputs[3] = None
    want = outputs_and_gradients(inputs, GAMMAS, form="recurrent", backend="reference")
    got = outputs_and_gradients(inputs, GAMMAS, form=form, chunk_size=16, backend=backend)
    assert_same(got, want, 1e-10)


@pytest.mark.parametrize(("backend", "form"), PATHS)
def test_packed_documents_equal_separate_ones(backend, form):
    lengths = [0, 1, 7, 16, 0, 1, 16, 20, 0]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    q, k, v, state = random_inputs(1, sum(lengths), 3, 8, 5, rows=len(lengths))
    options = {"form": form, "chunk_size": 8, "backend": backend}
    got = outputs_and_gradients((q, k, v, state), GAMMAS, cu_seqlens=cu_seqlens, **options)
    want = outputs_and_gradients(
        (q, k, v, state), GAMMAS, cu_seqlens=cu_seqlens, form="recurrent", backend="reference"
    )
    assert_same(got, want, 1e-10)
    bounds = cu_seqlens.tolist()
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        out, final = retention(q[:, a:b], k[:, a:b], v[:, a:b], GAMMAS, state[i : i + 1], **options)
        assert relative(got["out"][:, a:b], out) < 1e-12
        assert relative(got["state"][i : i + 1], final) < 1e-12


@pytest.mark.parametrize(("backend", "form"), PATHS)
def test_a_sequence_cut_anywhere_and_carried_equals_the_uncut_one(backend, form):
    T = 19
    q, k, v, state = random_inputs(1, T, 3, 4, 6)
    options = {"form": form, "chunk_size": 4, "backend": backend}
    want = outputs_and_gradients((q, k, v, state), GAMMAS, **options)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(want[n].shape, generator=g, dtype=torch.float64) for n in ("out", "state")]
    for cut in range(1, T):
        first, middle = retention(q[:, :cut], k[:, :cut], v[:, :cut], GAMMAS, state, **options)
        second, final = retention(q[:, cut:], k[:, cut:], v[:, cut:], GAMMAS, middle, **options)
        out = torch.cat([first, second], dim=1)
        grads = torch.autograd.grad((out * weights[0]).sum() + (final * weights[1]).sum(), (q, k, v, state))
        got = dict(zip(["out", "state", "dq", "dk", "dv", "dstate"], (out, final, *grads), strict=True))
        assert_same(got, want, 1e-10)


@pytest.mark.parametrize(("backend", "form"), PATHS)
def test_non_contiguous_inputs_and_gradients(backend, form):
    q, k, v, state = random_inputs(2, 11, 3, 8, 4)
    want = outputs_and_gradients((q, k, v, state), GAMMAS, form=form, chunk_size=4, backend=backend)

    def scattered(x):
        spread = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        spread[..., ::2] = x
        return spread.transpose(0, 1).contiguous().transpose(0, 1)[..., ::2]

    strange = [scattered(x.detach()).requires_grad_() for x in (q, k, v, state)]
    assert not any(x.is_contiguous() for x in strange)
    out, final = retention(*strange[:3], GAMMAS, strange[3], form=form, chunk_size=4, backend=backend)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in (out, final)]
    # an expanded, non-contiguous gradient arrives as well
    loss = (out * weights[0]).transpose(1, 2).sum() + (final * weights[1]).sum()
    grads = torch.autograd.grad(loss, strange)
    names = ["out", "state", "dq", "dk", "dv", "dstate"]
    assert_same(dict(zip(names, (out, final, *grads), strict=True)), want, 1e-12)


@pytest.mark.parametrize(("backend", "form"), PATHS)
def test_batch_zero(backend, form):
    inputs = random_inputs(0, 9, 3, 8, 4)
    got = outputs_and_gradients(inputs, GAMMAS, form=form, backend=backend)
    assert [tuple(x.shape) for x in got.values()] == [
        (0, 9, 3, 4),
        (0, 3, 8, 4),
        (0, 9, 3, 8),
        (0, 9, 3, 8),
        (0, 9, 3, 4),
        (0, 3, 8, 4),
    ]


@pytest.mark.parametrize(("backend", "form"), FEW_PATHS)
def test_gradcheck(backend, form):
    q, k, v, state = random_inputs(1, 7, 2, 3, 2)

    def op(*x):
        return retention(*x[:3], GAMMAS[:2], x[3], form=form, chunk_size=3, backend=backend)

    assert torch.autograd.gradcheck(op, (q, k, v, state))


@pytest.mark.parametrize(("backend", "form"), FEW_PATHS)
def test_a_decay_of_heads_is_differentiated(backend, form):
    q, k, v, state = random_inputs(2, 6, 2, 3, 2)
    log_decay = torch.tensor([0.0, -0.4], dtype=torch.float64, requires_grad=True)
    got, want = (
        outputs_and_gradients((q, k, v, state), log_decay, form=form, chunk_size=4, backend=name)
        for name in (backend, "reference")
    )
    assert_same(got, want, 1e-10)
    near = torch.tensor([-0.1, -0.4], dtype=torch.float64, requires_grad=True)  # of 1 there is but one side
    op = lambda d: retention(q, k, v, d, state, form=form, chunk_size=4, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(op, (near,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_keep_wide_states(dtype):
    inputs = random_inputs(2, 70, 3, 16, 24, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = outputs_and_gradients(exact, GAMMAS, form="recurrent", backend="reference")
    unit = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}[dtype]
    for backend, form in PATHS:
        got = outputs_and_gradients(inputs, GAMMAS.float(), form=form, chunk_size=32, backend=backend)
        assert got["state"].dtype == torch.float32
        assert got["out"].dtype == dtype
        assert_same(got, want, unit)
        assert relative(got["state"], want["state"]) < 2e-6


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    heads=st.integers(1, 3),
    key_dim=st.integers(1, 9),
    value_dim=st.integers(1, 9),
    chunk_size=st.integers(1, 50),
    gamma=st.floats(0.05, 1.0),
    packed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_property_explicit_backward_equals_reference(
    lengths, heads, key_dim, value_dim, chunk_size, gamma, packed, seed
):
    log_decay = log_decays(gamma, heads).double()
    if packed:
        options = {"cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)])}
        inputs = random_inputs(1, sum(lengths), heads, key_dim, value_dim, rows=len(lengths), seed=seed)
    else:
        options = {}
        inputs = random_inputs(len(lengths), max(lengths), heads, key_dim, value_dim, seed=seed)
    want = outputs_and_gradients(inputs, log_decay, form="recurrent", backend="reference", **options)
    for backend in ("torch", "numba"):
        got = outputs_and_gradients(inputs, log_decay, chunk_size=chunk_size, backend=backend, **options)
        assert_same(got, want, 1e-10)


def test_uninitialised_memory_is_never_read(monkeypatch):
    """Fresh buffers full of NaN: whatever is read before it was written shows."""
    plain = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        x = plain(self, *size, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    lengths = [0, 5, 1, 9, 5]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    inputs = random_inputs(1, 20, 3, 8, 5, rows=5)
    for options in ({"cu_seqlens": cu_seqlens}, {}):
        rows = (*inputs[:3], inputs[3] if options else inputs[3][:1])
        for backend in ("torch", "numba"):
            got = outputs_and_gradients(rows, GAMMAS, chunk_size=8, backend=backend, **options)
            assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_memory_of_the_backward_does_not_grow_with_the_number_of_chunks(backend):
    """States of all chunks are never kept: what autograd saves is the inputs alone."""
    q, k, v, state = random_inputs(1, 512, 1, 8, 8, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        retention(q, k, v, GAMMAS[:1], state, chunk_size=4, backend=backend)
    assert sum(saved) == q.numel() + k.numel() + v.numel() + state.numel() + 1


class TestStep:
    def test_equals_the_recurrence_and_updates_in_place(self):
        q, k, v, state = (x.detach() for x in random_inputs(2, 9, 3, 4, 6))
        want, final = retention(q, k, v, GAMMAS, state, form="recurrent", backend="reference")
        running = state.clone()
        where = running.data_ptr()
        for t in range(9):
            out = retention_step(q[:, t], k[:, t], v[:, t], GAMMAS, running)
            assert relative(out, want[:, t]) < 1e-12
        assert relative(running, final) < 1e-12
        assert running.data_ptr() == where

    @pytest.mark.parametrize("index", [torch.int32, torch.int64])
    def test_slots_touch_their_rows_alone(self, index):
        q, k, v, _ = (x.detach()[:, 0] for x in random_inputs(4, 1, 3, 4, 6))
        pool = torch.randn(6, 3, 4, 6, dtype=torch.float64)
        before = pool.clone()
        slots = torch.tensor([4, -1, 0, 5], dtype=index)
        out = retention_step(q, k, v, GAMMAS, pool, slots)
        for row, slot in enumerate(slots.tolist()):
            if slot < 0:
                assert not out[row].any()
                continue
            alone = before[slot : slot + 1].clone()
            one = slice(row, row + 1)
            assert relative(out[one], retention_step(q[one], k[one], v[one], GAMMAS, alone)) < 1e-12
            assert relative(pool[slot], alone[0]) < 1e-12
        assert all(torch.equal(pool[i], before[i]) for i in (1, 2, 3))

    @pytest.mark.parametrize("backend", ["auto", "torch"])
    def test_reference_and_others_agree_with_slots(self, backend):
        q, k, v, _ = (x.detach()[:, 0] for x in random_inputs(3, 1, 3, 4, 6))
        pool = torch.randn(5, 3, 4, 6, dtype=torch.float64)
        other = pool.clone()
        slots = torch.tensor([3, -1, 1])
        got = retention_step(q, k, v, GAMMAS, pool, slots, backend=backend)
        want = retention_step(q, k, v, GAMMAS, other, slots, 0.5, "reference")
        assert relative(got, want) < 1e-12
        assert relative(pool, other) < 1e-12

    def test_batch_zero(self):
        empty = torch.zeros(0, 3, 4)
        assert retention_step(empty, empty, empty, GAMMAS, torch.zeros(2, 3, 4, 4)).shape == (0, 3, 4)


class TestMistakes:
    """Each ValueError names the argument, what it was and what is allowed."""

    def good(self):
        q, k, v, state = (x.detach().float() for x in random_inputs(2, 5, 3, 4, 6))
        return {"q": q, "k": k, "v": v, "log_decay": GAMMAS.float(), "state": state}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"q": torch.zeros(2, 5, 12)}, r"q has shape \(2, 5, 12\)"),
            (
                {"k": torch.zeros(2, 5, 3, 5)},
                r"k has shape \(2, 5, 3, 5\); allowed: that of q, \(2, 5, 3, 4\)",
            ),
            ({"v": torch.zeros(2, 4, 3, 6)}, r"v has shape \(2, 4, 3, 6\)"),
            (
                {"v": torch.zeros(2, 5, 3, 6, dtype=torch.float64)},
                "v has type torch.float64; allowed: that of q",
            ),
            ({"k": torch.zeros(2, 5, 3, 4, dtype=torch.bfloat16)}, "k has type torch.bfloat16"),
            (
                {"q": torch.zeros(2, 5, 3, 4, dtype=torch.int64)},
                "q has type torch.int64; allowed: torch.float64",
            ),
            ({"k": torch.zeros(2, 5, 3, 4, device="meta")}, "k is on meta; allowed: the device of q, cpu"),
            ({"log_decay": torch.zeros(4)}, r"log_decay has shape \(4,\)"),
            ({"log_decay": torch.zeros(3, dtype=torch.bfloat16)}, "half types round γ to 1"),
            (
                {"log_decay": torch.tensor([0.0, 0.1, 0.0])},
                r"log_decay of head 1 is 0.1.*γ = 1.1.*allowed: γ in \(0, 1\]",
            ),
            ({"log_decay": torch.tensor([0.0, 0.0, 1e4])}, "log_decay of head 2 is 10000.0, γ = inf"),
            ({"log_decay": torch.tensor([-torch.inf, 0.0, 0.0])}, "log_decay of head 0 is -inf, γ = 0.0"),
            ({"log_decay": torch.tensor([torch.nan, 0.0, 0.0])}, "log_decay of head 0 is nan"),
            ({"state": torch.zeros(1, 3, 4, 6)}, r"state has shape \(1, 3, 4, 6\); allowed: \(2, 3, 4, 6\)"),
            ({"state": torch.zeros(2, 3, 4, 6, dtype=torch.float64)}, "state has type torch.float64"),
            ({"cu_seqlens": torch.tensor([0, 5])}, "q has batch 2; allowed: B = 1"),
            ({"form": "chunked"}, "form is 'chunked'; allowed: 'parallel', 'recurrent', 'chunkwise'"),
            (
                {"backend": "cuda"},
                "backend is 'cuda'; allowed: 'reference', 'torch', 'numba', 'triton', 'auto'",
            ),
            ({"backend": "cpu"}, "backend 'cpu' is now 'torch' .* or 'numba'"),
            ({"backend": "triton"}, "backend 'triton'"),
            ({"chunk_size": 0}, "chunk_size is 0"),
            ({"log_decay": torch.zeros(2, 4, 3)}, r"or \[B,T,H\] = \[2, 5, 3\], one a token and head"),
            (
                {"log_decay": torch.zeros(2, 5, 3).index_fill(1, torch.tensor(4), 0.5)},
                r"log_decay of head 0 at \[0, 4\] is 0.5",
            ),
        ],
    )
    def test_retention(self, change, message):
        with pytest.raises(ValueError, match=message):
            retention(**(self.good() | change))

    @pytest.mark.parametrize("bounds", [[0, 3], [1, 5], [0, 4, 2, 5], [0, 6, 5]])
    def test_document_bounds(self, bounds):
        good = self.good()
        row = {name: good[name][:1] for name in ("q", "k", "v")}
        with pytest.raises(ValueError, match="allowed: non-decreasing from 0 to T = 5"):
            retention(**row, log_decay=good["log_decay"], cu_seqlens=torch.tensor(bounds))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"q": torch.zeros(2, 1, 3, 4)}, r"q has shape \(2, 1, 3, 4\); allowed: \[B,H,K\]"),
            ({"state": torch.zeros(1, 3, 4, 6)}, "state has 1 rows for a batch of 2"),
            ({"state": torch.zeros(2, 3, 6, 4)}, "state has shape"),
            ({"state": torch.zeros(2, 3, 6, 4).mT}, "state is not contiguous"),
            ({"state": torch.zeros(2, 3, 4, 6, dtype=torch.bfloat16)}, "state has type torch.bfloat16"),
            ({"slots": torch.tensor([0, 2])}, r"slots holds \[0, 2\]; allowed: −1 \(padding\) to 1"),
            ({"slots": torch.tensor([0.0, 1.0])}, "slots has shape"),
            ({"slots": torch.tensor([0])}, "slots has shape"),
        ],
    )
    def test_step(self, change, message):
        good = self.good()
        step = {name: good[name][:, 0] for name in ("q", "k", "v")}
        with pytest.raises(ValueError, match=message):
            retention_step(**(step | {"log_decay": good["log_decay"], "state": good["state"]} | change))


def test_auto_says_its_choice_once(caplog):
    _say_once.cache_clear()
    q, k, v, state = (x.detach() for x in random_inputs(1, 3, 3, 4, 6))
    with caplog.at_level(logging.INFO, logger="retnet.ops"):
        for _ in range(3):
            retention(q, k, v, GAMMAS, state)
    assert [r.getMessage() for r in caplog.records] == [
        "retention: backend 'auto' is 'numba' (triton: tensors on cpu)"
    ]
