"""Whatever library computes a product, it is the product, and so are its gradients."""

import pytest
import torch
import torch.nn.functional as F

from retnet.ops import product
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
