"""H3: against two state spaces run as recurrences, matrices and all."""

import pytest
import torch

from retnet.mixers import H3, H3Config
from retnet.settings import UserError
from tests.helpers.contract import (
    assert_gradients_are_finite,
    assert_half_weights_stay_near,
    assert_learns,
    assert_mixer_holds,
    assert_survives_meta,
)
from tests.helpers.parity import relative

SMALL = {"state_size": 8, "shift_size": 5}
VARIANTS = [
    SMALL,
    {"head_width": 1, **SMALL},
    {"head_width": 4, "shift_size": 1, "state_size": 2, "spectrum": "inv"},
]


def mixer(**options) -> H3:
    torch.manual_seed(0)
    return H3(16, H3Config(**options)).double()


def naive(module: H3, x: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of the paper, token by token: a shift matrix, and Ā as a matrix of full conjugate pairs."""
    B, T, D = x.shape
    W, ssm, taps = module.width, module.ssm, module.shift.taps
    H, half = ssm.shape
    q, k, v = (p(x) for p in (module.q_proj, module.k_proj, module.v_proj))
    shift = torch.diag(torch.ones(taps - 1, dtype=x.dtype), -1)  # moves every input one place on
    first = torch.zeros(taps, dtype=x.dtype)
    first[0] = 1
    a = torch.complex(-ssm.log_decay.exp(), ssm.frequency).view(H, half)
    c = torch.view_as_complex(ssm.output.view(H, half, 2))
    a, c = torch.cat([a, a.conj()], dim=1), torch.cat([c, c.conj()], dim=1)
    a_bar = torch.exp(ssm.log_step.exp()[:, None] * a)
    b_bar = (a_bar - 1) / a
    seen = torch.zeros(B, D, taps, dtype=x.dtype)
    state = torch.zeros(B, H, W, W, 2 * half, dtype=a.dtype)
    outs = []
    for t in range(T):
        seen = seen @ shift.T + k[:, t, :, None] * first
        shifted = (seen * module.shift.weight).sum(-1)
        kv = torch.einsum("bhi,bhj->bhij", shifted.view(B, H, W), v[:, t].view(B, H, W))
        state = a_bar[:, None, None] * state + b_bar[:, None, None] * kv[..., None]
        y = torch.einsum("bhijn,hn->bhij", state, c).real + ssm.skip[:, None, None] * kv
        outs.append(torch.einsum("bhi,bhij->bhj", q[:, t].view(B, H, W), y).flatten(1))
    return module.out_proj(torch.stack(outs, dim=1))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_holds_the_contract(options):
    assert_mixer_holds(mixer(**options), 16, leak=1e-13)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_is_what_the_paper_writes(options):
    module = mixer(**options)
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    assert relative(module(x), naive(module, x)) < 1e-11


def test_state_is_constant():
    module = mixer(**SMALL)
    assert module.state_bytes(10) == module.state_bytes(100_000) == 8 * (4 * 16 + 2 * 64 * 8)
    assert all(part.dtype == torch.float32 for part in module.init_state(1, dtype=torch.bfloat16))


def test_half_weights():
    assert_half_weights_stay_near(H3, H3Config(), 32, 2e-2)


def test_survives_meta():
    assert_survives_meta(H3, H3Config(), 16)


def test_gradients_are_finite():
    assert_gradients_are_finite(H3, H3Config(), 16)


@pytest.mark.slow
def test_learns():
    assert_learns(H3Config(**SMALL))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_width": 0}, "head_width is 0; it must be at least 1"),
        ({"shift_size": 0}, "shift_size is 0"),
        ({"state_size": 3}, "state_size is 3; it must be even"),
    ],
)
def test_mistakes_in_the_configuration(options, message):
    with pytest.raises(UserError, match=message):
        H3Config(**options)


def test_widths_that_do_not_fit():
    with pytest.raises(UserError, match="d_model 12 is not a multiple of head_width 8"):
        H3(12, H3Config())
