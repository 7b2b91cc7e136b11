"""Linear attention: against the quadratic formula of its paper."""

import pytest
import torch
import torch.nn.functional as F

from retnet.mixers import LinearAttention, LinearConfig
from retnet.mixers.linear import features
from retnet.settings import UserError
from tests.helpers.contract import (
    assert_gradients_are_finite,
    assert_half_weights_stay_near,
    assert_learns,
    assert_mixer_holds,
    assert_survives_meta,
)
from tests.helpers.parity import relative

VARIANTS = [{}, {"rotary": "none"}, {"rotary": "interleaved", "num_heads": 1}]


def mixer(**options) -> LinearAttention:
    torch.manual_seed(0)
    return LinearAttention(16, LinearConfig(**options)).double()


def naive(module: LinearAttention, x: torch.Tensor) -> torch.Tensor:
    """Every query against every key, weights divided by their sum (eq. 8); rotated features in the numerator alone."""
    c, H = module.config, module.num_heads
    K, T = x.shape[-1] // H, x.shape[1]
    q, k, v = (p(x).unflatten(-1, (H, K)) for p in (module.q_proj, module.k_proj, module.v_proj))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    sums = torch.einsum("bnhk,bmhk->bhnm", q, k).tril().sum(-1, keepdim=True) + c.eps
    if c.rotary != "none":
        theta = c.rotary_base ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
        turn = torch.exp(1j * torch.arange(T)[:, None, None] * theta)
        pairs = (K // 2, 2) if c.rotary == "interleaved" else (2, K // 2)
        axis = -1 if c.rotary == "interleaved" else -2
        q, k = (torch.complex(*y.unflatten(-1, pairs).unbind(axis)) * turn for y in (q, k))
    weights = torch.einsum("bnhk,bmhk->bhnm", q, k.conj()).real.tril() / sums
    return module.out_proj(torch.einsum("bhnm,bmhv->bnhv", weights, v).flatten(2))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_holds_the_contract(options):
    assert_mixer_holds(mixer(**options), 16)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_is_what_the_paper_writes(options):
    module = mixer(**options)
    x = 3 * torch.randn(2, 80, 16, dtype=torch.float64)
    assert relative(module(x), naive(module, x)) < 1e-12


def test_without_rotation_outputs_are_means_of_values():
    module = mixer(rotary="none", eps=1e-12)
    with torch.no_grad():
        module.v_proj.weight.zero_()[:, 0] = 1.0
        module.out_proj.weight.copy_(torch.eye(16))
    x = torch.randn(1, 50, 16, dtype=torch.float64)
    x[..., 0] = 2.5  # every value is 2.5
    assert (module(x) - 2.5).abs().max() < 1e-9


def test_features_are_elu_plus_one_and_keep_what_is_small():
    x = torch.linspace(-60, 60, 1001)
    assert relative(features(x), F.elu(x.double()) + 1) < 1e-6
    assert relative(features(x[:400]).log(), x[:400]) < 1e-6  # elu + 1 in fp32 would be 0 from −17 on
    y = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    features(y).sum().backward()
    assert y.grad.tolist() == [0, 1, 1]


def test_state_is_constant():
    module = mixer()
    assert module.state_bytes(10) == module.state_bytes(100_000) == 8 * (4 * 4 * 4 + 4 * 4) + 8
    assert module.init_state(1, dtype=torch.bfloat16).kv.dtype == torch.float32


def test_half_weights():
    assert_half_weights_stay_near(LinearAttention, LinearConfig(), 32, 2e-2)


def test_survives_meta():
    assert_survives_meta(LinearAttention, LinearConfig(), 16)


def test_gradients_are_finite():
    assert_gradients_are_finite(LinearAttention, LinearConfig(), 32)


@pytest.mark.slow
def test_learns():
    assert_learns(LinearConfig())


def test_mistakes():
    with pytest.raises(UserError, match=r"eps is 0\.0; it must be above 0"):
        LinearConfig(eps=0.0)
    with pytest.raises(UserError, match="d_model 16 is not a multiple of num_heads 5"):
        LinearAttention(16, LinearConfig(num_heads=5))
