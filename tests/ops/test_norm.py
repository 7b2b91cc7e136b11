"""Norm and gate of the heads, against the formula written out."""

import pytest
import torch

from retnet.ops import head_norm
from retnet.ops.dispatch import TABLE
from tests.helpers.parity import relative, skips_what_cannot_run


def formula(o, gate, norm, eps, weight, bias, sums):
    """swish(g) ⊙ (w ⊙ norm(o / s) + b), one head of one token at a time."""
    y = torch.empty_like(o)
    for at in torch.cartesian_prod(*map(torch.arange, o.shape[:-1])).tolist():
        head = at[-1]
        x = o[tuple(at)]
        if sums is not None:
            x = x / sums.expand(o.shape[:-1])[tuple(at)].sqrt()
        if norm == "group":
            x = (x - x.mean()) / (x.var(correction=0) + eps).sqrt()
        elif norm == "rms":
            x = x / (x.square().mean() + eps).sqrt()
        if weight is not None:
            x = x * weight.view(o.shape[-2:])[head]
        if bias is not None:
            x = x + bias.view(o.shape[-2:])[head]
        y[tuple(at)] = x
    y = y.flatten(-2)
    return y if gate is None else y * gate / (1 + torch.exp(-gate))


@pytest.mark.parametrize("norm", ["group", "rms", "none"])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("backend", ["auto", *TABLE["head_norm"].implementations])
def test_the_formula(norm, full, backend):
    o, gate = torch.randn(2, 3, 2, 5, dtype=torch.float64) / 20, torch.randn(2, 3, 10, dtype=torch.float64)
    rest = [torch.randn(10, dtype=torch.float64) for _ in range(2)] if full else [None, None]
    sums = 1 + 30 * torch.rand(1, 3, 2, dtype=torch.float64) if full else None
    gate = gate if full else None
    options = {"norm": norm, "eps": 1e-3, "backend": backend}
    with skips_what_cannot_run():
        got = head_norm(o, gate, weight=rest[0], bias=rest[1], sums=sums, **options)
    assert relative(got, formula(o, gate, norm, 1e-3, *rest, sums)) < 1e-12


def test_sums_multiply_epsilon():
    """Dividing by s before the norm is ε·s² in place of ε, which is what the kernels compute."""
    o, s2 = torch.randn(1, 4, 1, 6, dtype=torch.float64) / 20, 7.0
    sums = torch.full((1, 4, 1), s2, dtype=torch.float64)
    for norm in ("group", "rms"):
        want = head_norm(o, norm=norm, eps=1e-3 * s2)
        assert relative(head_norm(o, norm=norm, eps=1e-3, sums=sums), want) < 1e-12
        assert relative(head_norm(o, norm=norm, eps=1e-3), want) > 0.1


def test_types():
    """Statistics are fp32 for narrow inputs; the result has the gate's type, or that asked for."""
    o, gate = (torch.randn(2, 3, 2, 8) * 1e-4).half(), torch.randn(2, 3, 16).bfloat16()
    assert head_norm(o).dtype == torch.float16
    assert head_norm(o, gate).dtype == torch.bfloat16
    assert head_norm(o, dtype=torch.float32).dtype == torch.float32
    want = head_norm(o.double(), norm="rms", eps=1e-12)
    assert relative(head_norm(o, norm="rms", eps=1e-12), want) < 1e-3  # fp16 squares of 1e-4 would be zero


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "layer"}, "norm is 'layer'; allowed: 'group', 'rms', 'none'"),
        ({"backend": "gpu"}, "backend is 'gpu'; allowed: 'reference', 'torch', 'numba', 'triton', 'auto'"),
        ({"gate": torch.zeros(2, 3, 8)}, r"gate has shape \(2, 3, 8\); allowed: \(2, 3, 10\)"),
        ({"weight": torch.zeros(5)}, r"weight has shape \(5,\); allowed: \(10,\)"),
        ({"bias": torch.zeros(2, 5)}, r"bias has shape \(2, 5\); allowed: \(10,\)"),
        (
            {"sums": torch.ones(3, 3, 2)},
            r"sums has shape \(3, 3, 2\); allowed: \(2, 3, 2\) as in o, or 1 for",
        ),
        ({"o": torch.zeros(2, 5)}, r"o has shape \(2, 5\); allowed: \[...,H,V\], at least \[1,H,V\]"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        head_norm(**({"o": torch.zeros(2, 3, 2, 5)} | change))
