"""RWKV-4: against its defining sums, and where exponentials would overflow."""

import math

import pytest
import torch

from retnet.mixers import Rwkv4Config, TimeMix
from retnet.mixers.rwkv4 import Weighted, wkv
from tests.helpers.contract import (
    assert_gradients_are_finite,
    assert_half_weights_stay_near,
    assert_learns,
    assert_mixer_holds,
    assert_survives_meta,
)
from tests.helpers.parity import relative


def mixer() -> TimeMix:
    torch.manual_seed(0)
    return TimeMix(16, Rwkv4Config()).double()


def nothing(k: torch.Tensor) -> Weighted:
    zero = torch.zeros_like(k[:, 0])
    return Weighted(zero, zero, zero - math.inf)


def defining_sums(k, v, w, u):
    """The paper's fractions, token by token; the largest exponent is taken out of each."""
    outs = []
    for t in range(k.shape[1]):
        ago = (t - 1 - torch.arange(t, dtype=k.dtype))[:, None] * w
        logs = torch.cat([k[:, :t] - ago, (u + k[:, t])[:, None]], dim=1)
        outs.append((logs.softmax(1) * v[:, : t + 1]).sum(1))
    return torch.stack(outs, dim=1)


def naive(module: TimeMix, x: torch.Tensor) -> torch.Tensor:
    time = module.time
    before = torch.zeros_like(x)
    before[:, 1:] = x[:, :-1]
    r, k, v = (
        proj(mix * x + (1 - mix) * before)
        for proj, mix in (
            (module.receptance_proj, time.mix_r), (module.k_proj, time.mix_k), (module.v_proj, time.mix_v)
        )
    )  # fmt: skip
    return module.out_proj(r.sigmoid() * defining_sums(k, v, time.decay.exp(), time.bonus))


def test_holds_the_contract():
    assert_mixer_holds(mixer(), 16)


@pytest.mark.parametrize("T", [1, 2, 3, 4, 48, 49, 50, 75])
def test_is_what_the_paper_writes(T):
    module = mixer()
    x = 3 * torch.randn(2, T, 16, dtype=torch.float64)
    assert relative(module(x), naive(module, x)) < 1e-12


@pytest.mark.parametrize("size", [1.0, 100.0, 3000.0])
def test_gradients_are_those_of_the_sums(size):
    """Also with keys whose exponentials no number holds, and decays that forget at once or never."""
    leaves = [
        size * torch.randn(2, 30, 5),
        torch.randn(2, 30, 5),
        torch.tensor([0.0, 1e-3, 1.0, 30.0, 3000.0]),
        torch.randn(5),
    ]
    leaves = [x.double().requires_grad_() for x in leaves]
    weight = torch.randn(2, 30, 5, dtype=torch.float64)
    results = []
    for out in (wkv(*leaves, nothing(leaves[0]))[0], defining_sums(*leaves)):
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for got, want in zip(*results, strict=True):  # where one key outweighs all, gradients are rounding alone
        assert (got - want).norm() <= 1e-9 * max(1, want.norm())


def test_is_safe_where_exponentials_overflow():
    k = 1e4 * torch.randn(1, 500, 8)
    w = torch.logspace(-3, 3, 8)
    out, after = wkv(k, torch.ones(1, 500, 8), w, torch.zeros(8), nothing(k))
    assert (out - 1).abs().max() < 1e-6  # means of ones
    assert all(part.isfinite().all() for part in after)


def test_the_state_is_the_sum_itself():
    k, v, w, u = torch.randn(1, 30, 3), torch.randn(1, 30, 3), torch.rand(3), torch.zeros(3)
    _, after = wkv(k, v, w, u, nothing(k))
    weights = (k - w * (29 - torch.arange(30.0))[:, None]).exp()
    assert relative(after.numerator * after.exponent.exp(), (weights * v).sum(1)) < 1e-5
    assert relative(after.denominator * after.exponent.exp(), weights.sum(1)) < 1e-5


def test_initial_values_are_those_of_the_reference():
    time = TimeMix(64, Rwkv4Config()).time
    assert float(time.decay[0].detach()) == -5
    assert float(time.decay[-1].detach()) == 3
    assert (time.decay.diff() > 0).all()
    assert sorted(set(time.bonus.detach().sub(math.log(0.3)).mul(10).round().tolist())) == [-5, 0, 5]
    mixes = [m.detach() for m in (time.mix_k, time.mix_v, time.mix_r)]
    assert all(float(m.min()) >= 0 and float(m.max()) < 1.2 for m in mixes)


def test_decays_are_not_rounded_with_the_weights():
    module = TimeMix(16, Rwkv4Config())
    before = {name: p.clone() for name, p in module.time.named_parameters()}
    module = module.to(torch.bfloat16)
    assert module.k_proj.weight.dtype == torch.bfloat16
    for name, p in module.time.named_parameters():
        assert torch.equal(p, before[name])
    assert all(part.dtype == torch.float32 for part in module.init_state(1))
    assert module.double().time.decay.dtype == torch.float64


def test_state_is_constant():
    module = mixer()
    assert module.state_bytes(10) == module.state_bytes(100_000) == 4 * 16 * 8


def test_half_weights():
    assert_half_weights_stay_near(TimeMix, Rwkv4Config(), 32, 2e-2)


def test_survives_meta():
    assert_survives_meta(TimeMix, Rwkv4Config(), 16)


def test_gradients_are_finite():
    assert_gradients_are_finite(TimeMix, Rwkv4Config(), 32)


@pytest.mark.slow
def test_learns():
    assert_learns(Rwkv4Config())
