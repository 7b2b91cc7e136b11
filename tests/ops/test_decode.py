"""The compiled products and heads of decoding against the parts they stand for."""

import pytest
import torch
import torch.nn.functional as F

from retnet.mixers import MultiScaleRetention, RetentionConfig
from retnet.model import ModelConfig
from retnet.model.language_model import FeedForward
from retnet.ops import decode, decoding, products
from tests.helpers.parity import assert_three_ways_agree, relative

numba = pytest.importorskip("numba")

OPTIONS = [
    {},
    {"gate": False},
    {"head_norm": "rms"},
    {"head_norm": "rms", "score_norm": "decay", "head_norm_eps": 1e-2},
    {"head_norm": "none", "score_norm": "none"},
    {"head_norm": "none", "score_norm": "decay"},
    {"decay": "none", "score_norm": "decay"},
    {"rotary": "halves", "rotary_spacing": "geometric"},
    {"rotary": "none"},
    {"key_dim": 34, "value_dim": 131},
]


def parts_alone(monkeypatch):
    """Without numba: everything is composed of torch's operators."""
    monkeypatch.setattr(decode, "_kernels", lambda: None)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fused_heads_are_their_parts(options, monkeypatch):
    module = MultiScaleRetention(256, RetentionConfig(num_heads=4, **options))
    x = torch.randn(3, 40, 256)
    with torch.no_grad():
        fused, composed = module.init_state(3), module.init_state(3)
        fused.position.add_(10**6)  # far into a text, where angles are large
        composed.position.add_(10**6)
        outs = []
        for t in range(40):
            assert (
                module._step_fused(x[:, t], module.init_state(3)) is not None
            )  # it is the kernel that is tested
            y, fused = module.step(x[:, t], fused)
            outs.append(y)
        parts_alone(monkeypatch)
        for t, y in enumerate(outs):
            want, composed = module.step(x[:, t], composed)
            assert relative(y, want) < 1e-5
    assert relative(fused.kv, composed.kv) < 1e-5
    assert torch.equal(fused.position, composed.position)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_three_ways_at_a_size_that_is_fused(options):
    assert_three_ways_agree(
        MultiScaleRetention(256, RetentionConfig(num_heads=4, **options)), torch.randn(2, 50, 256), 1e-5
    )


@pytest.mark.parametrize("options", [{"head_norm_affine": True}, {"score_norm": "paper"}], ids=str)
def test_what_is_not_fused_is_composed(options):
    module = MultiScaleRetention(256, RetentionConfig(num_heads=4, **options))
    with torch.no_grad():
        assert module._step_fused(torch.randn(1, 256), module.init_state(1)) is None
    assert_three_ways_agree(module, torch.randn(1, 50, 256), 1e-5)


@pytest.mark.parametrize("rows", [1, 3, 8, 9])
def test_products(rows):
    x = torch.randn(rows, 130)
    weights = tuple(torch.randn(n, 130) for n in (200, 131, 513))
    want = [F.linear(x, w) for w in weights]
    with torch.no_grad():
        got = products(x, weights)
        assert all(relative(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
        strided = torch.randn(rows, 260)[:, ::2]
        assert relative(products(strided, weights)[0], F.linear(strided, weights[0])) < 1e-5


@pytest.mark.parametrize("ffn", ["gelu", "geglu", "swiglu"])
@pytest.mark.parametrize("rows", [1, 5])
def test_fused_feed_forward(ffn, rows, monkeypatch):
    module = FeedForward(ModelConfig(d_model=130, ffn=ffn, ffn_dim=300))
    x = torch.randn(rows, 130)
    with torch.no_grad():
        gate = None if module.gate is None else module.gate.weight
        act = "silu" if ffn == "swiglu" else "gelu"
        fused = decode.feed_forward(x, module.fc1.weight, gate, module.fc2.weight, act)
        assert torch.equal(module(x), fused)  # decoding takes it
        parts_alone(monkeypatch)
        assert relative(fused, module(x)) < 1e-5
    assert module(x.requires_grad_()).requires_grad


def test_other_types_go_through_torch():
    for dtype in (torch.float64, torch.bfloat16):
        x, w = torch.randn(1, 256, dtype=dtype), torch.randn(256, 256, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(products(x, (w,))[0], F.linear(x, w))


def test_nothing_happens_to_a_state_the_kernel_refuses():
    module = MultiScaleRetention(256, RetentionConfig(num_heads=4)).double()
    state = module.init_state(1)
    with torch.no_grad():
        assert module._step_fused(torch.randn(1, 256, dtype=torch.float64), state) is None
    assert not state.kv.any()


def test_torch_gets_its_threads_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with decoding():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_without_numba_it_says_what_to_install(monkeypatch, caplog):
    import sys

    monkeypatch.setitem(sys.modules, "numba", None)
    with caplog.at_level("INFO", logger="retnet.ops"):
        assert decode._kernels.__wrapped__() is None
    assert "pip install 'retnet[fast]'" in caplog.text
