"""Derivatives of every kind: of derivatives, forwards, batched, per sample. Each is right, or refused by name."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from retnet.ops import head_norm, product, retention, retention_step, retention_steps, rotate, rotation
from tests.helpers.fast import few_fast
from tests.helpers.parity import random_inputs, relative

GAMMAS = torch.tensor([1.0, 0.9], dtype=torch.float64).log()
BACKENDS = ["reference", "torch", "numba"]
PACKED = torch.tensor([0, 3, 3, 7])
ROWS_AND_PACKED = [pytest.param(None, id="rows"), pytest.param(torch.tensor([0, 3, 3, 5]), id="packed")]


def op(backend, cu_seqlens=None, chunk_size=3):
    def run(q, k, v, state=None):
        return retention(
            q, k, v, GAMMAS, state, cu_seqlens, backend=backend, chunk_size=chunk_size, form="chunkwise"
        )

    return run


@pytest.mark.parametrize("backend", few_fast(BACKENDS, "numba"))
@pytest.mark.parametrize("cu_seqlens", few_fast(ROWS_AND_PACKED, "packed"))
def test_all_orders_and_directions(backend, cu_seqlens):
    """Three chunks, the last one not whole; the time grows with the square of the numbers in the inputs."""
    inputs = random_inputs(1, 5, 2, 2, 1, rows=None if cu_seqlens is None else 3)
    run = op(backend, cu_seqlens, chunk_size=2)
    checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(run, inputs, **checks)
    assert gradgradcheck(run, inputs, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("backend", few_fast(BACKENDS, "numba"))
@pytest.mark.parametrize("frozen", few_fast(range(4), 3))
def test_with_one_input_frozen_or_absent(backend, frozen):
    inputs = list(random_inputs(2, 4, 2, 2, 3))
    inputs[frozen] = None if frozen == 3 else inputs[frozen].detach()
    wanted = [x for x in inputs if x is not None]
    assert gradgradcheck(lambda *x: op(backend)(*x, *[None] * (4 - len(x))), wanted)


@pytest.mark.parametrize("backend", few_fast(BACKENDS, "numba"))
@pytest.mark.parametrize("which", [0, 1])
def test_where_only_one_output_is_used(backend, which):
    inputs = random_inputs(1, 5, 2, 2, 3)
    assert gradgradcheck(lambda *x: op(backend)(*x)[which], inputs)


@pytest.mark.parametrize("backend", ["torch", "numba", "auto"])
def test_third_derivatives(backend):
    q, k, v, _ = random_inputs(1, 6, 2, 3, 2)

    def third(backend):
        found = op(backend)(q, k, v)[0].pow(2).sum()
        for x in (k, q, k):
            (g,) = torch.autograd.grad(found, x, create_graph=True)
            found = g.pow(2).sum()
        return torch.autograd.grad(found, (q, k, v))

    for got, want in zip(third(backend), third("reference"), strict=True):
        assert want.norm() > 1
        assert relative(got, want) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_of_functions(backend):
    q, k, v, state = (x.detach() for x in random_inputs(2, 5, 2, 3, 2))
    run = op(backend)

    def loss(q, k, v, state):
        out, final = run(q, k, v, state)
        return out.pow(2).sum() + final.pow(2).sum()

    law = op("reference")
    tangents = tuple(torch.randn_like(x) for x in (q, k, v, state))
    for got, want in zip(*(jvp(f, (q, k, v, state), tangents) for f in (run, law)), strict=True):
        assert all(relative(a, b) < 1e-12 for a, b in zip(got, want, strict=True))
    jacobians = [jacrev(lambda k: run(q, k, v, state)[0])(k), jacfwd(lambda k: run(q, k, v, state)[0])(k)]
    want = jacrev(lambda k: law(q, k, v, state)[0])(k)
    assert all(relative(x, want) < 1e-12 for x in jacobians)
    two = hessian(lambda k: loss(q, k, v, state))(k)
    leaf = k.clone().requires_grad_()
    exact = torch.autograd.functional.hessian(
        lambda k: sum(x.pow(2).sum() for x in law(q, k, v, state)), leaf
    )
    assert relative(two, exact) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["rows", "packed"])
@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (2, None, 1, None), (None, 1, None, 0)], ids=str)
def test_vmap(backend, cu_seqlens, in_dims):
    q, k, v, state = (
        x.detach() for x in random_inputs(1, 7, 2, 3, 2, rows=None if cu_seqlens is None else 3)
    )
    q, k, v, state = (
        x if d is None else torch.stack([x, 2 * x, x.flip(0)], dim=d)
        for x, d in zip((q, k, v, state), in_dims, strict=True)
    )
    got = vmap(op(backend, cu_seqlens), in_dims)(q, k, v, state)
    for i in range(3):
        inputs = [x if d is None else x.select(d, i) for x, d in zip((q, k, v, state), in_dims, strict=True)]
        for a, b in zip(got, op("reference", cu_seqlens)(*inputs), strict=True):
            assert relative(a[i], b) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_decays(backend):
    q, k, v, _ = (x.detach() for x in random_inputs(2, 5, 2, 3, 2))
    decays = torch.stack([GAMMAS, GAMMAS * 2, GAMMAS - 1])
    got, _ = vmap(lambda d: retention(q, k, v, d, backend=backend))(decays)
    for i in range(3):
        assert relative(got[i], retention(q, k, v, decays[i], backend="reference")[0]) < 1e-12


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_every_backend_has_the_derivatives_of_a_decay_of_heads(backend):
    q, k, v, _ = (x.detach() for x in random_inputs(1, 5, 2, 3, 2))

    def loss(d, backend=backend):
        return retention(q, k, v, d, backend=backend)[0].pow(2).sum()

    want = torch.autograd.functional.jacobian(lambda d: loss(d, "reference"), GAMMAS)
    assert want.norm() > 0.1
    assert relative(grad(loss)(GAMMAS), want) < 1e-12
    assert relative(jacfwd(loss)(GAMMAS), want) < 1e-12
    assert relative(vmap(grad(loss))(GAMMAS[None])[0], want) < 1e-12
    assert relative(grad(lambda d: vmap(loss)(d[None]).sum())(GAMMAS), want) < 1e-12
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(GAMMAS, torch.ones(2, dtype=torch.float64))
        assert relative(forward_ad.unpack_dual(loss(dual)).tangent, want.sum()) < 1e-12
    second = hessian(lambda d: loss(d, "reference"))(GAMMAS)
    assert relative(hessian(loss)(GAMMAS), second) < 1e-12


@pytest.mark.parametrize(
    "slots",
    [pytest.param(None, id="rows"), pytest.param(torch.tensor([2, -1]), id="slots", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("backend", few_fast(["auto", "reference"], "auto"))
def test_steps_are_differentiated_by_the_reference(backend, slots):
    """Also through the state, which each step changes in place."""
    g = torch.Generator().manual_seed(0)
    q, k, v, state = (
        torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 2, 2), (2, 3, 2, 2), (2, 3, 2, 1), (3, 2, 2, 1))
    )

    def run(q, k, v, state):
        state = state.clone()
        first = retention_steps(q[:, :2], k[:, :2], v[:, :2], GAMMAS, state, slots, backend=backend)
        last = retention_step(q[:, 2], k[:, 2], v[:, 2], GAMMAS, state, slots, backend=backend)
        return first, last, state

    assert gradcheck(run, (q, k, v, state), check_forward_ad=True)
    assert gradgradcheck(run, (q, k, v, state))
    if slots is None:
        want = retention(q, k, v, GAMMAS, state[:2], backend="reference")
        first, last, after = run(q, k, v, state)
        assert relative(torch.cat([first, last[:, None]], dim=1), want[0]) < 1e-12
        assert relative(after[:2], want[1]) < 1e-12


@pytest.mark.parametrize("wanted", ["q", "v", "log_decay", "state"])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_other_backends_refuse_derivatives_of_a_step(backend, wanted):
    given = {"q": torch.randn(2, 2, 4), "v": torch.randn(2, 2, 3), "state": torch.zeros(2, 2, 4, 3)}
    given |= {"k": given["q"].clone(), "log_decay": GAMMAS.float()}
    learned = {**given, wanted: given[wanted].clone().requires_grad_() * 1}
    for step in (retention_step, retention_steps):
        if step is retention_steps:
            learned = {name: x[:, None] if name in "qkv" else x for name, x in learned.items()}
        with pytest.raises(ValueError, match=r"derivative of a step is wanted.*use backend 'auto' or 'ref"):
            step(**learned, backend=backend)
        with torch.no_grad():
            assert step(**learned, backend=backend).isfinite().all()
    operator = getattr(torch.ops.retnet, f"retention_step_{backend}")
    arguments = [given[name].clone() for name in ("q", "k", "v", "log_decay", "state")]
    out = operator(arguments[0].requires_grad_(), *arguments[1:], None, 1.0)
    with pytest.raises(NotImplementedError, match=r"retention_step_.* has no gradient; use `retention`, or"):
        out.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "reference", "torch", "numba"])
def test_a_step_refuses_transforms_and_leaves(backend):
    q, v, state = torch.randn(2, 2, 4), torch.randn(2, 2, 3), torch.zeros(2, 2, 4, 3)

    def step(q, state):
        return retention_step(q, q, v, GAMMAS.float(), state, backend=backend)

    for transformed in (
        lambda: jvp(lambda q: step(q, state.clone()), (q,), (q,)),
        lambda: grad(lambda q: step(q, state.clone()).sum())(q),
        lambda: vmap(step)(q[None], state[None]),
    ):
        with pytest.raises(NotImplementedError, match=r"in place, .*torch.func .*use `retention` on one tok"):
            transformed()
    with pytest.raises(ValueError, match=r"state requires a gradient and is a leaf.*pass state.clone\(\)"):
        step(q, state.clone().requires_grad_())


@pytest.mark.parametrize("layout", few_fast(["interleaved", "halves"], "halves"))
def test_rotation(layout):
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    cos, sin = rotation(torch.arange(3)[None], torch.rand(2, dtype=torch.float64), torch.float64)
    checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(lambda x: rotate(x, cos, sin, layout), (x,), **checks)
    assert gradgradcheck(lambda x: rotate(x, cos, sin, layout), (x,), check_fwd_over_rev=True)
    many = torch.stack([cos, cos * 2])
    got = vmap(lambda c: rotate(x.detach(), c, sin, layout))(many)
    assert relative(got[1], rotate(x.detach(), many[1], sin, layout)) < 1e-12
    angles = [a.clone().requires_grad_() for a in (cos, sin)]
    assert gradcheck(lambda c, s: rotate(x.detach(), c, s, layout), angles)
    assert gradcheck(lambda x, c, s: rotate(x, c, s, layout), (x, *angles))


@pytest.mark.parametrize("rows", [2, 70])
def test_products(rows):
    """Few rows and many, which different kernels compute."""
    x, weight = torch.randn(rows, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)

    def penalty(x, weight, linear):
        (dx,) = torch.autograd.grad(linear(x, weight).pow(3).sum(), x, create_graph=True)
        return dx.pow(2).sum()

    wide = [y.detach().double().requires_grad_() for y in (x, weight)]
    want = torch.autograd.grad(penalty(*wide, torch.nn.functional.linear), wide)
    got = torch.autograd.grad(penalty(x, weight, product), (x, weight))
    assert all(relative(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
    with torch.no_grad():
        _, tangent = jvp(lambda w: product(x.detach(), w), (weight.detach(),), (torch.ones(4, 5),))
        assert relative(tangent, x.detach().sum(-1, keepdim=True).expand(rows, 4)) < 1e-5
    each = vmap(grad(lambda w, x: product(x, w).pow(2).sum()), (None, 0))(
        weight.detach(), torch.stack([x.detach(), x.detach() * 2])
    )
    assert relative(each[1], 4 * each[0]) < 1e-5


@pytest.mark.parametrize("norm", few_fast(["group", "rms", "none"], "group"))
def test_head_norm(norm):
    o, gate = (
        torch.randn(2, 3, 2, 4).double().requires_grad_(),
        torch.randn(2, 3, 8).double().requires_grad_(),
    )
    weight = torch.randn(8).double().requires_grad_()

    def run(o, gate, weight):
        return head_norm(o, gate, norm, weight=weight, eps=0.1)

    assert gradcheck(run, (o, gate, weight), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(run, (o, gate, weight), check_fwd_over_rev=True)


def model_of(backend, dtype=torch.float64):
    from retnet import LanguageModel, ModelConfig
    from retnet.mixers import RetentionConfig

    torch.manual_seed(0)
    mixer = RetentionConfig(num_heads=2, backend=backend, chunk_size=4, form="chunkwise")
    return LanguageModel(ModelConfig(vocab_size=11, d_model=16, num_layers=2, mixer=mixer)).to(dtype)


TOKENS = torch.tensor([[1, 5, 2, 8, 3, 9, 4], [7, 0, 2, 6, 6, 1, 10]])


def gradient_penalty(backend):
    model = model_of(backend)
    weights = list(model.parameters())
    logits = model(TOKENS)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    penalty = sum(g.pow(2).sum() for g in torch.autograd.grad(loss, weights, create_graph=True))
    return torch.autograd.grad(penalty, weights, materialize_grads=True)


@pytest.mark.parametrize("backend", ["torch", "numba", "auto"])
def test_the_gradient_penalty_of_a_model(backend):
    for got, want in zip(gradient_penalty(backend), gradient_penalty("reference"), strict=True):
        assert relative(got, want) < 1e-8


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_each_sample_of_a_model(backend):
    model = model_of(backend)
    weights = {name: w.detach() for name, w in model.named_parameters()}

    def loss(weights, tokens):
        logits = functional_call(model, weights, (tokens[None],))
        return torch.nn.functional.cross_entropy(logits[0, :-1], tokens[1:])

    got = vmap(grad(loss), (None, 0))(weights, TOKENS)
    for i, row in enumerate(TOKENS):
        model.zero_grad()
        logits = model(row[None])
        torch.nn.functional.cross_entropy(logits[0, :-1], row[1:]).backward()
        for name, w in model.named_parameters():
            assert relative(got[name][i], w.grad) < 1e-10
    tangents = {name: torch.ones_like(w) for name, w in weights.items()}
    _, along = jvp(lambda w: loss(w, TOKENS[0]), (weights,), (tangents,))
    assert relative(along, sum(got[name][0].sum() for name in weights)) < 1e-8


def test_no_operator_is_without_rules():
    """Each of ours is defined by `library.define`, which gives it rules, or refusals, for all ways of differentiating it."""
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("retnet::")]
    assert {"retnet::retention_chunkwise_torch_backward", "retnet::rotary_torch"} <= set(names)
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "FuncTorchBatched"), name
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "AutogradCPU"), name


def test_gradients_of_each_long_sample_of_a_model_in_fp32():
    """At a size where products, activations and norms have kernels and backward passes of their own."""
    model = model_of("auto", torch.float32)
    weights = {name: w.detach() for name, w in model.named_parameters()}
    tokens = torch.randint(11, (2, 90))

    def loss(weights, tokens):
        return functional_call(model, weights, (tokens[None],)).pow(2).mean()

    got = vmap(grad(loss), (None, 0))(weights, tokens)
    for i, row in enumerate(tokens):
        model.zero_grad()
        model(row[None]).pow(2).mean().backward()
        for name, w in model.named_parameters():
            assert relative(got[name][i], w.grad) < 1e-4
    _, along = jvp(
        lambda w: loss(w, tokens[0]), (weights,), ({n: torch.ones_like(w) for n, w in weights.items()},)
    )
    assert relative(along, sum(got[name][0].sum() for name in weights)) < 1e-3
