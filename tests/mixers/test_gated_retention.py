"""Gated retention: against its recurrence with loops and complex numbers."""

import pytest
import torch
import torch.nn.functional as F

from retnet.mixers import GatedRetention, GatedRetentionConfig
from retnet.settings import UserError
from tests.helpers.contract import (
    assert_gradients_are_finite,
    assert_half_weights_stay_near,
    assert_learns,
    assert_mixer_holds,
    assert_survives_meta,
)
from tests.helpers.parity import relative

VARIANTS = [
    {},
    {"num_heads": 1, "chunk_size": 7},
    {"rotary": "none", "value_dim": 3, "temperature": 1.0},
    {"chunk_size": 1, "backend": "torch", "head_norm": "rms"},
]


def mixer(**options) -> GatedRetention:
    torch.manual_seed(0)
    return GatedRetention(16, GatedRetentionConfig(**options)).double()


def naive(module: GatedRetention, x: torch.Tensor) -> torch.Tensor:
    """The recurrence with loops and complex numbers."""
    c, H, K = module.config, module.num_heads, module.key_dim
    q, k, v = (p(x).unflatten(-1, (H, -1)) for p in (module.q_proj, module.k_proj, module.v_proj))
    if c.rotary != "none":
        theta = 10000.0 ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
        turn = torch.exp(1j * torch.arange(x.shape[1])[:, None, None] * theta)
        q, k = (torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turn for y in (q, k))
    gamma = torch.sigmoid(module.decay_proj(x)) ** (1 / c.temperature)
    state, outs = 0, []
    for t in range(x.shape[1]):
        state = gamma[:, t, :, None, None] * state + torch.einsum(
            "bhk,bhv->bhkv", k[:, t].conj(), v[:, t].to(k.dtype)
        )
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state).real / K**0.5)
    y = torch.stack(outs, dim=1)
    if c.head_norm == "group":
        y = y - y.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + c.head_norm_eps).sqrt()
    return module.out_proj(F.silu(module.gate_proj(x)) * y.flatten(2))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_holds_the_contract(options):
    assert_mixer_holds(mixer(**options), 16)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_is_its_recurrence(options):
    module = mixer(**options)
    x = 3 * torch.randn(2, 80, 16, dtype=torch.float64)
    assert relative(module(x), naive(module, x)) < 1e-10


def test_gamma_is_near_one_at_first():
    """Half a gate to the power of 1/16: a head remembers for some tens of tokens and learns the rest."""
    module = GatedRetention(16, GatedRetentionConfig())
    gamma = torch.sigmoid(module.decay_proj(torch.zeros(1, 16))) ** (1 / 16)
    assert relative(gamma, torch.full_like(gamma, 0.5 ** (1 / 16))) < 1e-6


def test_state_is_constant_and_wide():
    module = mixer()
    assert module.state_bytes(10) == module.state_bytes(100_000) == 4 * 4 * 8 * 8 + 8
    assert module.init_state(1, dtype=torch.bfloat16).kv.dtype == torch.float32


def test_half_weights():
    assert_half_weights_stay_near(GatedRetention, GatedRetentionConfig(), 32, 2e-2)


def test_survives_meta():
    assert_survives_meta(GatedRetention, GatedRetentionConfig(), 16)


def test_gradients_are_finite():
    assert_gradients_are_finite(GatedRetention, GatedRetentionConfig(), 32)


def test_learns():
    assert_learns(GatedRetentionConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads is 0; it must be at least 1"),
        ({"value_dim": 0}, "value_dim is 0"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"head_norm_eps": -1.0}, "head_norm_eps is -1.0"),
    ],
)
def test_mistakes_in_the_configuration(options, message):
    with pytest.raises(UserError, match=message):
        GatedRetentionConfig(**options)
