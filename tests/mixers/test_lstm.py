"""The LSTM: against its equations, token by token."""

import pytest
import torch

from retnet.mixers import LSTM, LstmConfig
from tests.helpers.contract import (
    assert_gradients_are_finite,
    assert_half_weights_stay_near,
    assert_learns,
    assert_mixer_holds,
    assert_survives_meta,
)
from tests.helpers.parity import relative


def mixer() -> LSTM:
    torch.manual_seed(0)
    return LSTM(16, LstmConfig()).double()


def test_holds_the_contract():
    assert_mixer_holds(mixer(), 16)


def test_is_what_its_equations_say():
    module = mixer()
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    w = module.lstm
    h = c = torch.zeros(2, 16, dtype=torch.float64)
    outs = []
    for t in range(40):
        gates = x[:, t] @ w.weight_ih_l0.T + h @ w.weight_hh_l0.T + w.bias_ih_l0 + w.bias_hh_l0
        i, f, g, o = gates.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outs.append(h)
    assert relative(module(x), torch.stack(outs, dim=1)) < 1e-12


def test_the_forget_gate_is_open_at_first():
    biases = sum(b.detach() for name, b in mixer().lstm.named_parameters() if "bias" in name)
    assert biases.view(4, 16).tolist() == [[0.0] * 16, [1.0] * 16, [0.0] * 16, [0.0] * 16]


def test_parameters_are_8_d_squared_and_biases():
    assert sum(p.numel() for p in mixer().parameters()) == 8 * 16**2 + 8 * 16


def test_states_are_wide_with_half_weights():
    module = mixer().to(torch.bfloat16)
    with torch.no_grad():
        y, state = module.step(torch.randn(2, 16).bfloat16(), module.init_state(2))
    assert y.dtype == torch.bfloat16
    assert all(part.dtype == torch.float32 for part in state)
    assert module.state_bytes(10) == module.state_bytes(10_000) == 2 * 16 * 4


def test_half_weights():
    assert_half_weights_stay_near(LSTM, LstmConfig(), 32, 2e-2)


def test_survives_meta():
    assert_survives_meta(LSTM, LstmConfig(), 16)


def test_gradients_are_finite():
    assert_gradients_are_finite(LSTM, LstmConfig(), 16)


@pytest.mark.slow
def test_learns():
    assert_learns(LstmConfig(), learning_rate=2e-2)
