"""S4D: against the discretised recurrence, one complex number a state; the mixer made of it."""

import math

import pytest
import torch
import torch.nn.functional as F

from retnet.mixers import S4D, S4DConfig, S4DMixer
from retnet.settings import UserError
from tests.helpers.contract import (
    assert_gradients_are_finite,
    assert_half_weights_stay_near,
    assert_learns,
    assert_mixer_holds,
    assert_survives_meta,
)
from tests.helpers.parity import relative

VARIANTS = [{}, {"spectrum": "inv", "state_size": 6}, {"state_size": 2, "step_min": 0.5, "step_max": 0.5}]
LEAK = 1e-13


def ssm(channels=3, state_size=8, spectrum="lin", step_min=1e-3, step_max=1e-1) -> S4D:
    torch.manual_seed(0)
    return S4D(channels, state_size, spectrum, step_min, step_max).double()


def recurrence(module: S4D, u: torch.Tensor) -> torch.Tensor:
    """x' = A x + B u held over a step Δ, with full conjugate pairs and 2 × 2 … N × N matrices, for one u [T] a channel."""
    D, half = module.shape
    outs = []
    for d in range(D):
        rows = slice(d * half, (d + 1) * half)
        a = torch.complex(-module.log_decay[rows].exp(), module.frequency[rows])
        c = torch.view_as_complex(module.output.view(D, half, 2)[d])
        A = torch.diag(torch.cat([a, a.conj()]))
        B = torch.ones(2 * half, 1, dtype=A.dtype)
        C = torch.cat([c, c.conj()])[None]
        step = module.log_step[d].exp()
        Abar = torch.linalg.matrix_exp(step * A)
        Bbar = torch.linalg.solve(A, (Abar - torch.eye(2 * half)) @ B)
        x, y = torch.zeros(2 * half, 1, dtype=A.dtype), []
        for value in u[d]:
            x = Abar @ x + Bbar * value
            y.append((C @ x)[0, 0] + module.skip[d] * value)
        outs.append(torch.stack(y))
    out = torch.stack(outs)
    assert out.imag.abs().max() < 1e-9
    return out.real


@pytest.mark.parametrize("T", [1, 2, 9, 40])
@pytest.mark.parametrize("spectrum", ["lin", "inv"])
def test_is_the_discretised_system(T, spectrum):
    module = ssm(spectrum=spectrum)
    u = torch.randn(3, T, dtype=torch.float64)
    want = recurrence(module, u)
    assert relative(module(u[None, :, None])[0, :, 0], want) < 1e-11
    y, _ = module.extend(u[None, :, None], module.init_state(1, 1, "cpu", torch.float64))
    assert relative(y[0, :, 0], want) < 1e-11


@pytest.mark.parametrize("T", [1, 2, 3, 16, 17, 1000])
def test_the_kernel_is_its_sum(T):
    module = ssm()
    log_a, weight = module._discrete()
    want = 2 * (weight[..., None] * torch.exp(log_a[..., None] * torch.arange(T))).sum(1).real
    assert relative(module.kernel(T), want) < 1e-12


def test_a_long_text_is_read_in_blocks(monkeypatch):
    module = ssm(channels=2)
    u = torch.randn(2, 2, 3, 700, dtype=torch.float64)
    state = module.init_state(2, 3, "cpu", torch.float64)
    first, state = module.extend(u[..., :300], state)
    second, state = module.extend(u[..., 300:], state)
    assert relative(torch.cat([first, second], dim=-1), module(u)) < 1e-11
    y, _ = module.step(u[..., 0], state)
    assert relative(y, module(torch.cat([u, u[..., :1]], dim=-1))[..., -1]) < 1e-11


def test_no_tensor_of_channels_times_states_times_tokens_is_made():
    module = S4D(32, 64, "lin", 1e-3, 1e-1)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        module(torch.randn(1, 32, 1, 4096))
    assert max(sizes) == 32 * 2 * 4096  # a spectrum; 32 channels · 32 states · 4096 tokens it would be


def test_initial_values():
    lin, inv = S4D(2, 8, "lin", 1e-3, 1e-1), S4D(2, 8, "inv", 1e-3, 1e-1)
    assert relative(lin.frequency, math.pi * torch.arange(4.0).repeat(2)) < 1e-6
    n = torch.arange(4.0)
    assert relative(inv.frequency[:4], 8 / math.pi * (8 / (2 * n + 1) - 1)) < 1e-6
    assert relative(-lin.log_decay.exp(), torch.full((8,), -0.5)) < 1e-6
    steps = S4D(1000, 2, "lin", 1e-3, 1e-1).log_step.detach().exp()
    assert 1e-3 <= float(steps.min()) < 2e-3 < 5e-2 < float(steps.max()) <= 0.1001
    assert all(p.dim() == 1 for p in lin.parameters())  # matrices would be decayed


def mixer(**options) -> S4DMixer:
    torch.manual_seed(0)
    return S4DMixer(16, S4DConfig(**options)).double()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_holds_the_contract(options):
    assert_mixer_holds(mixer(**options), 16, leak=LEAK)


def test_the_mixer_is_s4s_layer():
    module = mixer(state_size=4)
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    y = recurrence(module.ssm, x[0].T).T
    a, b = (F.gelu(y) @ module.glu_proj.weight.T).chunk(2, dim=-1)
    assert relative(module(x)[0], a * torch.sigmoid(b)) < 1e-10


def test_dynamics_are_not_rounded_with_the_weights():
    module = S4DMixer(16, S4DConfig())
    before = {name: p.clone() for name, p in module.ssm.named_parameters()}
    module = module.to(torch.bfloat16)
    assert module.glu_proj.weight.dtype == torch.bfloat16
    assert all(torch.equal(p, before[name]) for name, p in module.ssm.named_parameters())
    assert module.init_state(1).ssm.dtype == torch.float32


def test_kernels_are_not_rounded_under_autocast():
    module = S4D(4, 16, "lin", 1e-3, 1e-1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module.kernel(100)
    assert torch.equal(rounded, module.kernel(100))


def test_state_is_constant():
    assert mixer().state_bytes(10) == mixer().state_bytes(100_000) == 16 * 64 * 8


def test_half_weights():
    assert_half_weights_stay_near(S4DMixer, S4DConfig(), 32, 2e-2)


def test_survives_meta():
    assert_survives_meta(S4DMixer, S4DConfig(), 16)


def test_gradients_are_finite():
    assert_gradients_are_finite(S4DMixer, S4DConfig(), 32)


@pytest.mark.slow
def test_learns():
    assert_learns(S4DConfig(state_size=16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_size": 7}, "state_size is 7; it must be even"),
        ({"state_size": 0}, "state_size is 0"),
        ({"step_min": 0.0}, "step_min is 0.0; it must be above 0"),
        ({"step_max": 1e-4}, "step_max is 0.0001; it must be at least step_min = 0.001"),
    ],
)
def test_mistakes_in_the_configuration(options, message):
    with pytest.raises(UserError, match=message):
        S4DConfig(**options)
