"""Softmax attention: against the formula with its matrix of scores, and its cache."""

import pytest
import torch

from retnet.mixers import SoftmaxAttention, SoftmaxConfig
from retnet.settings import UserError
from tests.helpers.contract import (
    assert_gradients_are_finite,
    assert_half_weights_stay_near,
    assert_learns,
    assert_mixer_holds,
    assert_survives_meta,
)
from tests.helpers.parity import relative

VARIANTS = [{}, {"num_heads": 1}, {"rotary": "interleaved"}, {"rotary": "none"}, {"sdpa": "math"}]


def mixer(**options) -> SoftmaxAttention:
    torch.manual_seed(0)
    return SoftmaxAttention(16, SoftmaxConfig(**options)).double()


def naive(module: SoftmaxAttention, x: torch.Tensor) -> torch.Tensor:
    """One query at a time; pairs as complex numbers, turned by i·n·base^(−2p/K)."""
    c, H = module.config, module.num_heads
    K = x.shape[-1] // H
    q, k, v = (p(x).unflatten(-1, (H, K)) for p in (module.q_proj, module.k_proj, module.v_proj))
    if c.rotary != "none":
        theta = c.rotary_base ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
        turn = torch.exp(1j * torch.arange(x.shape[1])[:, None, None] * theta)
        pairs = (K // 2, 2) if c.rotary == "interleaved" else (2, K // 2)
        axis = -1 if c.rotary == "interleaved" else -2
        q, k = (torch.complex(*y.unflatten(-1, pairs).unbind(axis)) * turn for y in (q, k))
    out = torch.zeros_like(v)
    for t in range(x.shape[1]):
        scores = torch.einsum("bhk,bshk->bhs", q[:, t], k[:, : t + 1].conj()).real / K**0.5
        out[:, t] = torch.einsum("bhs,bshk->bhk", scores.softmax(-1), v[:, : t + 1])
    return module.out_proj(out.flatten(2))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_holds_the_contract(options):
    assert_mixer_holds(mixer(**options), 16)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_is_softmax_attention(options):
    module = mixer(**options)
    x = 3 * torch.randn(2, 40, 16, dtype=torch.float64)
    assert relative(module(x), naive(module, x)) < 1e-12


def test_backends_agree():
    x = torch.randn(2, 300, 16)
    ways = [mixer(sdpa=name).float()(x) for name in ("math", "flash", "auto")]
    assert relative(ways[1], ways[0]) < 1e-5
    assert relative(ways[2], ways[0]) < 1e-5


def test_each_backend_is_the_one_that_was_asked_for():
    """Plain mathematics holds T × T scores for the backward pass; FlashAttention nothing of the kind."""
    largest = {}
    for name in ("math", "flash"):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x
        ):
            mixer(sdpa=name).float()(torch.randn(1, 500, 16))
        largest[name] = max(sizes)
    assert largest["math"] >= 4 * 500 * 500
    assert largest["flash"] <= 500 * 16


def test_a_backend_without_kernel_is_said_in_a_sentence(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    with pytest.raises(
        UserError, match=r"sdpa = 'flash' has no kernel for torch\.float64 of head width 4 on cpu; use 'auto'"
    ):
        mixer(sdpa="flash")(torch.randn(1, 3, 16, dtype=torch.float64))


def test_the_cache_grows_with_the_text_and_little_beyond():
    module = mixer()
    state = module.init_state(2)
    with torch.no_grad():
        _, state = module.prefill(torch.randn(2, 1000, 16, dtype=torch.float64), state)
        assert sum(part.nbytes for part in state) == 2 * module.state_bytes(1000)
        for _ in range(3):
            _, state = module.step(torch.randn(2, 16, dtype=torch.float64), state)
    assert sum(part.nbytes for part in state) < 2 * module.state_bytes(1200)
    assert state.length.tolist() == [1003, 1003]
    assert module.init_state(1, dtype=torch.bfloat16).keys.dtype == torch.bfloat16


def test_what_lies_behind_a_row_in_the_cache_is_never_read():
    module = mixer()
    with torch.no_grad():
        _, state = module.prefill(torch.randn(1, 5, 16, dtype=torch.float64), module.init_state(1))
        _, state = module.step(torch.randn(1, 16, dtype=torch.float64), state)
        token = torch.randn(1, 16, dtype=torch.float64)
        poisoned = state._replace(keys=state.keys.clone(), values=state.values.clone())
        poisoned.keys[:, 6:], poisoned.values[:, 6:] = torch.nan, torch.nan
        assert poisoned.keys[:, 6:].numel() > 0
        assert torch.equal(module.step(token, poisoned)[0], module.step(token, state)[0])


def test_gradients_flow_through_the_cache():
    module = mixer()
    x = torch.randn(1, 12, 16, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(module(x).square().sum(), x)
    first, state = module.prefill(x[:, :7], module.init_state(1))
    second, state = module.prefill(x[:, 7:11], state)
    third, state = module.step(x[:, 11], state)
    (pieces,) = torch.autograd.grad(sum(y.square().sum() for y in (first, second, third)), x)
    assert relative(pieces, whole) < 1e-12


def test_reading_on_from_a_cache_is_done_in_blocks_of_queries(monkeypatch):
    monkeypatch.setattr("retnet.mixers.softmax.QUERIES", 7)
    assert_mixer_holds(mixer(), 16)


def test_half_weights():
    assert_half_weights_stay_near(SoftmaxAttention, SoftmaxConfig(), 32, 2e-2)


def test_survives_meta():
    assert_survives_meta(SoftmaxAttention, SoftmaxConfig(), 16)


def test_gradients_are_finite():
    assert_gradients_are_finite(SoftmaxAttention, SoftmaxConfig(), 32)


@pytest.mark.slow
def test_learns():
    assert_learns(SoftmaxConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads is 0; it must be at least 1"),
        ({"rotary_base": -1.0}, "rotary_base is -1.0"),
    ],
)
def test_mistakes_in_the_configuration(options, message):
    with pytest.raises(UserError, match=message):
        SoftmaxConfig(**options)


def test_widths_that_do_not_fit():
    with pytest.raises(UserError, match="d_model 16 is not a multiple of num_heads 3"):
        SoftmaxAttention(16, SoftmaxConfig(num_heads=3))
    with pytest.raises(UserError, match="heads have width 1, which is odd"):
        SoftmaxAttention(16, SoftmaxConfig(num_heads=16))


@pytest.mark.slow
def test_training_it_is_one_graph():
    """What refuses second derivatives looks at the graph of a result, which a trace has not."""
    mixer = SoftmaxAttention(16, SoftmaxConfig(num_heads=2))
    x = torch.randn(2, 5, 16, requires_grad=True)
    torch.compile(mixer, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert x.grad is not None
