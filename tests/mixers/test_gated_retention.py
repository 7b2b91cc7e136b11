"""Gated retention: against its recurrence, its parallel form, and retention where γ is constant."""

import pytest
import torch
import torch.nn.functional as F

from retnet.mixers import GatedRetention, GatedRetentionConfig
from retnet.mixers.gated_retention import chunkwise
from retnet.ops import retention
from retnet.settings import UserError
from tests.helpers.contract import (
    assert_gradients_are_finite,
    assert_half_weights_stay_near,
    assert_learns,
    assert_mixer_holds,
    assert_survives_meta,
)
from tests.helpers.parity import random_inputs, relative

VARIANTS = [
    {},
    {"num_heads": 1, "chunk_size": 7},
    {"rotary": "none", "value_dim": 3, "temperature": 1.0},
    {"chunk_size": 1},
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
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + c.head_norm_eps).sqrt()
    return module.out_proj(F.silu(module.gate_proj(x)) * y.flatten(2))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_holds_the_contract(options):
    assert_mixer_holds(mixer(**options), 16)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_is_its_recurrence(options):
    module = mixer(**options)
    x = 3 * torch.randn(2, 80, 16, dtype=torch.float64)
    assert relative(module(x), naive(module, x)) < 1e-10


@pytest.mark.parametrize("C", [1, 7, 64, 1000])
@pytest.mark.parametrize("T", [1, 63, 64, 130])
def test_chunks_are_the_parallel_form_in_value_and_gradient(T, C):
    q, k, v, state = random_inputs(2, T, 2, 4, 5)
    g = torch.randn(2, T, 2, dtype=torch.float64).mul(3).requires_grad_()
    leaves = [q, k, v, g, state]
    log_decay = F.logsigmoid(g)
    a = log_decay.cumsum(1)
    n = torch.arange(T)
    D = torch.where((n[:, None] >= n)[..., None], (a[:, :, None] - a[:, None]).exp(), 0.0)  # [B,n,m,H]
    parallel = torch.einsum("bnhk,bmhk,bnmh,bmhv->bnhv", q, k, D, v)
    parallel = parallel + torch.einsum("bnhk,bnh,bhkv->bnhv", q, a.exp(), state)
    after = torch.einsum("bmhk,bmh,bmhv->bhkv", k, (a[:, -1:] - a).exp(), v)
    after = after + a[:, -1, :, None, None].exp() * state
    weights = torch.randn_like(parallel), torch.randn_like(after)
    results = []
    for o, s in (chunkwise(q, k, v, log_decay, state, C), (parallel, after)):
        loss = (o * weights[0]).sum() + (s * weights[1]).sum()
        results.append([o, s, *torch.autograd.grad(loss, leaves, retain_graph=True)])
    for got, want in zip(*results, strict=True):
        assert relative(got, want) < 1e-11


def test_with_constant_gamma_it_is_retention():
    q, k, v, state = random_inputs(2, 150, 3, 4, 5)
    log_decay = torch.tensor([-1e-3, -0.5, 0.0])
    want = retention(q, k, v, log_decay, state, scale=1.0)
    got = chunkwise(q, k, v, log_decay.double().expand(2, 150, 3), state, 64)
    assert relative(got[0], want[0]) < 1e-11
    assert relative(got[1], want[1]) < 1e-11


def test_nothing_overflows_however_fast_a_head_forgets():
    q, k, v, state = random_inputs(1, 200, 2, 4, 4, dtype=torch.float32)
    log_decay = torch.tensor([-1e4, -1e-7]).expand(1, 200, 2).clone().requires_grad_()
    out, after = chunkwise(q, k, v, log_decay, state, 64)
    assert (
        relative(out[:, 1:, 0], torch.einsum("bthk,bthk,bthv->bthv", q, k, v)[:, 1:, 0]) < 1e-5
    )  # itself alone
    (out.sum() + after.sum()).backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v, state, log_decay))


def test_long_texts_are_read_in_pieces(monkeypatch):
    module = mixer()
    x = torch.randn(1, 150, 16, dtype=torch.float64)
    want = module(x)
    monkeypatch.setattr("retnet.mixers.gated_retention.PIECE", 40)
    assert relative(module(x), want) < 1e-12


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
        ({"head_norm_eps": -1.0}, "head_norm_eps is -1.0"),
    ],
)
def test_mistakes_in_the_configuration(options, message):
    with pytest.raises(UserError, match=message):
        GatedRetentionConfig(**options)
