"""Whatever library computes a product, it is the product, and so are its gradients."""

import pytest
import torch
import torch.nn.functional as F

from retnet.ops import Remade, product, product_of, recompute
from tests.helpers.parity import relative


@pytest.mark.parametrize("shape", [(1, 40), (70, 40), (2, 70, 40), (0, 40), (3, 0, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_and_gradients(shape, dtype):
    x = torch.randn(shape).to(dtype).requires_grad_()
    weights = tuple(torch.randn(n, 40).to(dtype).requires_grad_() for n in (24, 1, 130))
    d_out = [torch.randn(*shape[:-1], w.shape[0]).to(dtype) for w in weights]
    wide = [y.detach().double().requires_grad_() for y in (x, *weights)]
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    got = [product(x, w) for w in weights]
    want = [F.linear(wide[0], w) for w in wide[1:]]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert relative(a, b) < tolerance
    grads = torch.autograd.grad(got, (x, *weights), d_out)
    exact = torch.autograd.grad(want, wide, [d.double() for d in d_out])
    assert all(relative(a, b) < tolerance for a, b in zip(grads, exact, strict=True))


def test_strided_inputs_and_frozen_parts():
    x = torch.randn(40, 100).t().requires_grad_()  # not contiguous
    weight = torch.randn(24, 40)
    out = product(x, weight)
    assert relative(out, F.linear(x, weight)) < 1e-6
    (dx,) = torch.autograd.grad(out.t().sum(), x)  # nor is this gradient
    assert relative(dx, weight.sum(0).expand(100, 40)) < 1e-6
    frozen = product(x.detach(), weight.requires_grad_())
    (dw,) = torch.autograd.grad(frozen.sum(), weight)
    assert relative(dw, x.detach().sum(0).expand(24, 40)) < 1e-6


def test_autocast_has_its_own_way():
    with torch.autocast("cpu", torch.bfloat16):
        assert product(torch.randn(100, 40), torch.randn(24, 40)).dtype == torch.bfloat16


def test_a_trace_sees_plain_linear_layers():
    class Layer(torch.nn.Module):
        def forward(self, x, w):
            return product(x, w)

    program = torch.export.export(Layer(), (torch.randn(100, 40), torch.randn(24, 40)))
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == ["aten.linear.default"]


def gated(x, gate, weight):
    return torch.sin(x) * torch.sigmoid(gate) + (0 if weight is None else weight)


@pytest.mark.parametrize("shape", [(3, 40), (70, 40), (2, 70, 40), (0, 40)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float64, False), (torch.float32, False), (torch.float32, True)], ids=str
)
@pytest.mark.parametrize("extra", [True, False])
def test_a_product_of_what_is_made_again_is_the_product(shape, dtype, autocast, extra):
    x, gate = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.randn(24, 40, dtype=dtype, requires_grad=True)
    added = torch.randn(40, dtype=dtype, requires_grad=True) if extra else None
    leaves = [y for y in (x, gate, weight, added) if y is not None]
    results = []
    for way in (
        lambda: product_of(gated, weight, x, gate, shared=(added,), lead=x.dim() - 1),
        lambda: product(gated(x, gate, added), weight),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = way()
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert relative(got, want) < {torch.float64: 1e-13, torch.float32: 1e-2 if autocast else 1e-5}[dtype]


def test_derivatives_of_any_order():
    x, gate = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    arguments = (weight, x, gate)
    assert torch.autograd.gradcheck(lambda *args: product_of(gated, *args, shared=(None,), lead=1), arguments)
    assert torch.autograd.gradgradcheck(
        lambda *args: product_of(gated, *args, shared=(None,), lead=1), arguments
    )
    assert torch.autograd.gradgradcheck(  # what it is called with may depend on each other
        lambda w, x: product_of(gated, w, x, x.cos(), shared=(None,), lead=1), (weight, x)
    )
    wide, rows = torch.randn(24, 40, requires_grad=True), torch.randn(70, 40, requires_grad=True)  # by oneDNN
    (first,) = torch.autograd.grad(product(rows, wide).square().sum(), rows, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), wide)
    exact = [y.detach().double().requires_grad_() for y in (rows, wide)]
    (first,) = torch.autograd.grad(F.linear(*exact).square().sum(), exact[0], create_graph=True)
    assert relative(second, torch.autograd.grad(first.square().sum(), exact[1])[0]) < 1e-5


def test_a_tensor_that_is_made_again_and_rows_in_blocks(monkeypatch):
    monkeypatch.setattr(recompute, "BLOCK_ROWS", 3)
    q, k, gate, other = (torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(4))
    weight, added = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 1))
    frozen = torch.randn(1, 4, dtype=torch.float64)
    leaves = (q, k, gate, other, weight, added)

    def mixed(q, k, frozen):
        return (q * k + frozen).cumsum(1)  # not row by row

    def again(q, k, gate, other, weight, added):
        o = Remade(mixed, (q, k, frozen))
        return product_of(
            lambda o, g, n, a: gated(o, g, a) * n, weight, o, gate, other, shared=(added,), lead=2
        )

    def kept(q, k, gate, other, weight, added):
        return product(gated(mixed(q, k, frozen), gate, added) * other, weight)

    d_out = torch.randn(2, 5, 5, dtype=torch.float64)
    assert relative(again(*leaves), kept(*leaves)) < 1e-14
    want = torch.autograd.grad(kept(*leaves), leaves, d_out)
    for got, exact in zip(torch.autograd.grad(again(*leaves), leaves, d_out), want, strict=True):
        assert got.shape == exact.shape
        assert relative(got, exact) < 1e-14
    assert torch.autograd.gradgradcheck(again, leaves)


def test_what_is_made_again_is_not_kept():
    x, gate = (torch.randn(100, 40, requires_grad=True) for _ in range(2))
    weight = torch.randn(24, 40, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        product_of(gated, weight, x, gate, shared=(None,), lead=1)
    assert {id(y) for y in kept} == {id(y) for y in (weight, x, gate)}
    frozen = product_of(gated, weight.detach(), x, gate.detach(), shared=(None,), lead=1)
    assert torch.autograd.grad(frozen.sum(), x)[0].isfinite().all()
    assert not product_of(
        gated, weight.detach(), x.detach(), gate.detach(), shared=(None,), lead=1
    ).requires_grad
    with torch.no_grad():
        assert not product_of(gated, weight, x, gate, shared=(None,), lead=1).requires_grad


def test_transforms_see_a_formula():
    """Also where the weights are real and only what goes in is transformed."""
    x, weight = torch.randn(3, 2, 4).double(), torch.randn(5, 4, requires_grad=True).double()

    def run(x):
        return product_of(gated, weight, x, x.cos(), shared=(None,), lead=1)

    want = product(gated(x, x.cos(), None), weight)
    assert relative(torch.func.vmap(run)(x), want) < 1e-14
    tangent = torch.func.jvp(run, (x[0],), (torch.ones_like(x[0]),))[1]
    assert relative(tangent, torch.func.jacfwd(run)(x[0]).sum((-1, -2))) < 1e-14
