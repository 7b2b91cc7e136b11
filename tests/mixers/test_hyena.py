"""Hyena: against its sums written out, and what it declares: filters for any distance, a state that grows."""

import math

import pytest
import torch

from retnet.mixers import Hyena, HyenaConfig
from retnet.settings import UserError
from tests.helpers.contract import (
    assert_gradients_are_finite,
    assert_half_weights_stay_near,
    assert_learns,
    assert_mixer_holds,
    assert_survives_meta,
)
from tests.helpers.parity import relative

SMALL = {"filter_width": 8, "filter_bands": 3, "time_scale": 40}
VARIANTS = [{}, SMALL, {"short_taps": 1, **SMALL}]


def mixer(**options) -> Hyena:
    torch.manual_seed(0)
    return Hyena(16, HyenaConfig(**options)).double()


def naive_filter(module: Hyena, t: int) -> torch.Tensor:
    """h at one distance, [2,D], from the numbers of the configuration."""
    f, c = module.filters, module.config
    s = t / c.time_scale
    bands = torch.linspace(1e-4, c.filter_bands - 1, c.filter_bands, dtype=torch.float64)
    x = torch.cat(
        [
            torch.tensor([s], dtype=torch.float64),
            (2 * math.pi * bands * s).cos(),
            (2 * math.pi * bands * s).sin(),
        ]
    )
    for weight, bias in zip(f.weights, f.biases, strict=True):
        x = torch.sin(c.filter_frequency * (weight @ x + bias))
    D = module.d_model
    falls_to_1_percent_at = torch.linspace(c.slow_decay, c.fast_decay, D, dtype=torch.float64)
    h = (f.last @ x).view(2, D) * 0.01 ** (s / falls_to_1_percent_at)
    return h + f.skip.view(2, D) * (t == 0)


def naive(module: Hyena, x: torch.Tensor) -> torch.Tensor:
    """Definition 3.1 with N = 2, every sum written out."""
    T = x.shape[1]
    projected, taps = module.in_proj(x), module.short.taps
    p = torch.zeros_like(projected)
    for t in range(T):
        for j in range(min(taps, t + 1)):
            p[:, t] += module.short.weight[:, j] * projected[:, t - j]
    z, *gates = p.chunk(3, dim=-1)
    h = torch.stack([naive_filter(module, t) for t in range(T)])  # [T,2,D]
    for n, gate in enumerate(gates):
        convolved = torch.stack([sum(h[t - s, n] * z[:, s] for s in range(t + 1)) for t in range(T)], dim=1)
        z = gate * convolved
    return module.out_proj(z)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_holds_the_contract(options):
    assert_mixer_holds(mixer(**options), 16, leak=1e-13)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_is_what_the_paper_writes(options):
    module = mixer(**options)
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    assert relative(module(x), naive(module, x)) < 1e-11


def test_a_filter_is_the_same_whatever_the_length_of_the_text():
    f = mixer(**SMALL).filters
    short, long = f(torch.arange(10)), f(torch.arange(1000))  # 25 time scales
    assert relative(short, long[:, :10]) < 1e-14
    assert long.isfinite().all()
    assert long[:, -1].abs().max() < 1e-30


def test_filters_kept_in_evaluation_follow_the_weights():
    module = mixer(**SMALL).float()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    x = torch.randn(1, 20, 16)
    for _ in range(3):
        module.train()
        fresh = module(x)
        module.eval()
        with torch.no_grad():
            kept = [module(x), module(x)]
        assert relative(kept[0], fresh) < 1e-6
        assert torch.equal(kept[0], kept[1])
        fresh.square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        module.filters.skip.add_(1.0)
        changed = module(x)
    assert relative(changed, module.train()(x)) < 1e-6
    assert relative(changed, kept[0]) > 1e-2


def test_the_state_grows_with_the_text_and_little_beyond():
    module = mixer(**SMALL).eval()
    with torch.no_grad():
        _, state = module.prefill(torch.randn(2, 1000, 16, dtype=torch.float64), module.init_state(2))
        assert sum(part.nbytes for part in state) == 2 * module.state_bytes(1000)
        _, state = module.step(torch.randn(2, 16, dtype=torch.float64), state)
    assert sum(part.nbytes for part in state) < 2 * module.state_bytes(1200)
    assert module.state_bytes(2000) > 1.9 * module.state_bytes(1000)


def test_what_lies_behind_a_row_in_the_cache_is_never_read():
    module = mixer(**SMALL).eval()
    with torch.no_grad():
        _, state = module.prefill(torch.randn(1, 5, 16, dtype=torch.float64), module.init_state(1))
        _, state = module.step(torch.randn(1, 16, dtype=torch.float64), state)
        poisoned = state._replace(inputs=state.inputs.clone())
        poisoned.inputs[:, 6:] = torch.nan
        x = torch.randn(1, 3, 16, dtype=torch.float64)
        assert torch.equal(module.prefill(x, poisoned)[0], module.prefill(x, state)[0])


def test_gradients_flow_through_the_state():
    module = mixer(**SMALL)
    x = torch.randn(1, 12, 16, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(module(x).square().sum(), x)
    first, state = module.prefill(x[:, :7], module.init_state(1))
    second, state = module.prefill(x[:, 7:11], state)
    third, state = module.step(x[:, 11], state)
    (pieces,) = torch.autograd.grad(sum(y.square().sum() for y in (first, second, third)), x)
    assert relative(pieces, whole) < 1e-10


def test_filters_are_not_rounded_with_the_weights():
    module = Hyena(16, HyenaConfig())
    before = {name: p.clone() for name, p in module.filters.named_parameters()}
    module = module.to(torch.bfloat16)
    assert module.in_proj.weight.dtype == torch.bfloat16
    assert all(torch.equal(p, before[name]) for name, p in module.filters.named_parameters())


def test_filters_are_not_rounded_under_autocast():
    filters = Hyena(16, HyenaConfig()).filters
    with torch.autocast("cpu", torch.bfloat16):
        rounded = filters(torch.arange(50))
    assert torch.equal(rounded, filters(torch.arange(50)))


def test_half_weights():
    assert_half_weights_stay_near(Hyena, HyenaConfig(), 32, 3e-2)


def test_survives_meta():
    assert_survives_meta(Hyena, HyenaConfig(), 16)


def test_gradients_are_finite():
    assert_gradients_are_finite(Hyena, HyenaConfig(), 32)


@pytest.mark.slow
def test_learns():
    assert_learns(HyenaConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_scale": 0}, "time_scale is 0; it must be at least 1"),
        ({"short_taps": 0}, "short_taps is 0"),
        ({"fast_decay": 2.0}, "slow_decay is 1.5; it must be at least fast_decay = 2.0"),
    ],
)
def test_mistakes_in_the_configuration(options, message):
    with pytest.raises(UserError, match=message):
        HyenaConfig(**options)


def test_weights_made_for_inference_alone_are_followed_too():
    x = torch.randn(1, 20, 16)
    with torch.inference_mode():
        module = Hyena(16, HyenaConfig(**SMALL)).eval()
        first = module(x)
        module.filters.skip.add_(1.0)
        assert relative(module(x), first) > 1e-2
