"""Choices of lightning attention as fields of retention: Ring's layer written out, γ by layer, groups of heads, sums."""

import dataclasses

import pytest
import torch

from retnet.mixers import MultiScaleRetention, RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.ops import log_decays
from retnet.settings import UserError, config_path, load
from retnet.train.config import RunConfig
from tests.helpers.fast import few_fast
from tests.helpers.parity import assert_three_ways_agree, relative

D, H, K, LAYERS, GROUPS, TURNED = 24, 8, 6, 5, 4, 4


def shipped(name, **sizes):
    return dataclasses.replace(load(RunConfig, config_path(name)).model, vocab_size=61, **sizes)


def ring(**mixer):
    """The preset, small."""
    config = shipped("lightning/ring-mini", d_model=D, num_layers=LAYERS, ffn_dim=32)
    sizes = {"num_heads": H, "key_dim": K, "value_dim": K, "rotary_dim": TURNED, "head_norm_groups": GROUPS}
    softmax = dataclasses.replace(
        config.mixers["softmax"], num_heads=4, kv_heads=2, key_dim=K, rotary_dim=TURNED
    )
    mixer = dataclasses.replace(config.mixer, **sizes, **mixer)
    return dataclasses.replace(config, mixer=mixer, mixers={"softmax": softmax})


def filled(config):
    torch.manual_seed(0)
    model = LanguageModel(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def ring_by_hand(x, weights, layer, first):
    """One layer of lightning attention of Ring-mini-linear-2.0, token by token: x [T,D] → [T,D].

    Args:
        x: what the layer reads.
        weights: of the mixer, by name.
        layer: its number.
        first: what is taken off that number, 1 or 0, as codes differ.
    """

    def rms(y):
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turn(y, t):
        half = TURNED // 2
        angle = t * 600_000.0 ** -(torch.arange(half, dtype=torch.float64) * 2 / TURNED)
        a, b = y[:half], y[half:TURNED]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), y[TURNED:]])

    slopes = [2.0 ** -(8 * (h + 1) / H) * (1 - (layer - first) / (LAYERS - 1) + 1e-5) for h in range(H)]
    state, outputs = torch.zeros(H, K, K, dtype=torch.float64), []
    for t, token in enumerate(x):
        q, k, v, gate = (
            (weights[f"{name}_proj.weight"] @ token).view(H, K) for name in ("q", "k", "v", "gate")
        )
        heads = []
        for h in range(H):
            query = turn(rms(q[h]) * weights["q_norm.weight"], t)
            key = turn(rms(k[h]) * weights["k_norm.weight"], t)
            state[h] = state[h] * torch.exp(torch.tensor(-slopes[h], dtype=torch.float64)) + torch.outer(
                key, v[h]
            )
            heads.append(query @ state[h] * K**-0.5)
        y = rms(torch.stack(heads).view(GROUPS, -1)).flatten() * weights["head_norm_weight"]
        outputs.append(weights["out_proj.weight"] @ (y * torch.sigmoid(gate.flatten())))
    return torch.stack(outputs)


@pytest.mark.parametrize(("schedule", "first"), [("lightning-1", 1), ("lightning", 0)])
def test_rings_layer_is_the_preset(schedule, first):
    model, x = filled(ring(decay_by_layer=schedule)), torch.randn(1, 30, D, dtype=torch.float64)
    for layer in (0, 1, 3):
        mixer = model.blocks[layer].mixer
        want = ring_by_hand(x[0], mixer.state_dict(), layer, first)
        assert relative(mixer(x)[0], want) < 1e-9
    assert shipped("lightning/ring-mini").mixer.decay_by_layer == "lightning-1"  # as in the model's own code


@pytest.mark.parametrize("name", few_fast(["ring", "minimax"], "ring"))
def test_presets_in_three_ways(name):
    config = ring() if name == "ring" else shipped("lightning/minimax-3m", d_model=96, ffn_dim=40)
    assert_three_ways_agree(filled(config), torch.randint(61, (2, 70)), 1e-9)


def test_decay_by_layer():
    def model(by_layer):
        mixer = RetentionConfig(decay="alibi", num_heads=4, decay_by_layer=by_layer)
        return LanguageModel(ModelConfig(vocab_size=9, d_model=16, num_layers=3, mixer=mixer))

    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    factors = {
        "alike": (1, 1, 1),
        "lightning": (1, 0.5, 0),
        "lightning-1": (1.5, 1, 0.5),
        (2.0, 0.0, 0.25): (2, 0, 0.25),
    }
    for by_layer, wanted in factors.items():
        made = model(by_layer)
        for block, factor in zip(made.blocks, wanted, strict=True):
            tiny = 0 if isinstance(by_layer, tuple) or by_layer == "alike" else 1e-5
            assert relative(block.mixer.log_decay, -slopes * (factor + tiny)) < 1e-6
        assert made.config.is_uniform  # `mixer` says all about them
        assert {block.mixer_kind for block in made.blocks} == {0}  # and they share cos and sin
    with pytest.raises(UserError, match=r"decay_by_layer lists 2 numbers for 3 layers"):
        model((1.0, 2.0))
    with pytest.raises(UserError, match=r"decay_by_layer has -1\.0, by which ln γ cannot"):
        model((1.0, 2.0, -1.0))
    with pytest.raises(UserError, match=r"take config\.of_layer\(layer, num_layers\)"):
        MultiScaleRetention(16, RetentionConfig(decay_by_layer="lightning"))


def test_slopes_of_any_number_of_heads():
    """ALiBi's: of 6 heads the 4 of a power of two, and the first and third of 8."""
    want = [-(2.0**-e) for e in (2, 4, 6, 8, 1, 3)]
    assert log_decays("alibi", 6, torch.float64).tolist() == want


def test_heads_that_are_normalised_together_stay_together():
    """Tensor parallelism cuts between groups: what the parts make sums to the whole."""
    options = {
        "head_norm": "rms",
        "head_norm_affine": True,
        "head_norm_groups": 2,
        "gate_activation": "sigmoid",
    }
    parts = []
    for begin, end in ((0, 4), (0, 2), (2, 4)):
        torch.manual_seed(0)
        mixer = MultiScaleRetention(16, RetentionConfig(num_heads=4, **options)).double()
        torch.nn.init.normal_(mixer.head_norm_weight)
        mixer.keep_heads(begin, end)
        parts.append(mixer)
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    assert relative(parts[1](x) + parts[2](x), parts[0](x)) < 1e-12


def test_residual_sums():
    """By one α and β for all, or by those of each layer's mixer and FFN."""
    sizes = {"vocab_size": 9, "d_model": 16, "num_layers": 3, "residual": "norm"}
    one = ModelConfig(**sizes, residual_alpha=2.0, residual_beta=0.5)
    each = ModelConfig(**sizes, residual_alpha=(3.0, 2.0, 0.5, 0.25), residual_beta=(0.5, 1.0))
    for config, layer, (a, b, c, d) in (
        (one, 1, (2.0, 0.5, 2.0, 0.5)),
        (each, 0, (3.0, 0.5, 2.0, 1.0)),
        (each, 1, (0.5, 0.5, 0.25, 1.0)),
        (each, 2, (3.0, 0.5, 2.0, 1.0)),
    ):
        x = torch.randn(1, 5, 16, dtype=torch.float64)
        for block in (filled(config).blocks[layer], filled(config.of_layer(layer)).blocks[0]):
            normed = block.mixer_norm(x)
            y = block.ffn_norm(a * normed + b * block.mixer(normed))
            assert relative(block(x), c * y + d * block.ffn(y)) < 1e-12
    assert one.is_uniform
    assert not each.is_uniform
    for wrong in ((1.0, 2.0, 3.0), (), (1.0,) * 8):
        with pytest.raises(
            UserError, match=f"residual_beta lists {len(wrong)} numbers for 3 layers; give one"
        ):
            ModelConfig(**sizes, residual_beta=wrong)


WRONG = [
    ({"head_norm_groups": 3}, "num_heads 4 is not a multiple of head_norm_groups 3"),
    ({"head_norm_groups": 2, "head_norm": "none", "score_norm": "none"}, "head_norm = 'none' has none"),
    ({"head_norm_groups": 2, "score_norm": "decay"}, "is for heads that are normalised one by one"),
    ({"scale": 1.0, "score_norm": "torchscale"}, "leave out scale"),
    ({"rotary_dim": 3}, "rotary_dim is 3; rotation turns pairs of the 4"),
    ({"rotary_dim": 6}, "so make it even and at most 4"),
    ({"rotary_dim": 2, "rotary": "none"}, "rotary = 'none' turns nothing"),
]


@pytest.mark.parametrize(("options", "says"), WRONG, ids=[says for _, says in WRONG])
def test_what_cannot_be(options, says):
    with pytest.raises(UserError, match=says):
        MultiScaleRetention(16, RetentionConfig(num_heads=4, **options))
