"""A model with int8 weights against the model it was made of, and against the weights its codes stand for."""

import argparse
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from retnet.engine import quantise
from retnet.mixers import MIXERS, RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.nn import Int8Linear, Linear
from retnet.settings import UserError
from tests.helpers.parity import relative


def made(mixer=None, **options):
    torch.manual_seed(0)
    mixer = mixer or RetentionConfig(num_heads=4)
    return LanguageModel(
        ModelConfig(vocab_size=257, d_model=128, num_layers=2, mixer=mixer, **options)
    ).eval()


def stood_for(model, quantised):
    """The fp32 model whose weights are exactly those that the codes stand for."""
    layers = dict(quantised.named_modules())
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            layer.weight = torch.nn.Parameter(layers[name].weight)
    return model


def test_codes_are_the_nearest_of_255_in_each_row():
    layer = Linear(300, 100)
    layer.weight.data *= torch.logspace(-30, 3, 100)[:, None]
    layer.weight.data[7] = 0
    made = Int8Linear(layer)
    weight = layer.weight.detach()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((made.weight - weight).abs() <= 0.5001 * step).all()
    assert made.codes.dtype is torch.int8
    assert (made.codes.abs().amax(1) == 127).sum() == 99
    assert not made.weight[7].any()


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("rows", [1, 9])
def test_every_mixer_runs_three_ways_with_int8_weights(mixer, rows):
    model = made(MIXERS[mixer].Config())
    quantised = quantise(model)
    assert not any(isinstance(m, Linear) for m in quantised.modules())
    tokens = torch.randint(257, (rows, 21))
    with torch.no_grad():
        want = stood_for(model, quantised)(tokens)
        assert relative(quantised(tokens), want) < 1e-5
        read, state = quantised.prefill(tokens[:, :15], quantised.init_state(rows))
        assert relative(read, want[:, :15]) < 1e-4
        for t in range(15, 21):
            logits, state = quantised.step(tokens[:, t], state)
            assert relative(logits, want[:, t]) < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_stays_and_the_head_is_int8(tied):
    model = made(tie_embeddings=tied)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    quantised = quantise(model)
    assert isinstance(quantised.head, Int8Linear)
    assert torch.equal(quantised.embedding.weight, model.embedding.weight)
    assert quantised.embedding.weight.data_ptr() != model.embedding.weight.data_ptr()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert (model.head.weight is model.embedding.weight) == tied
    assert model.train().training


def test_training_is_refused():
    quantised = quantise(made())
    with pytest.raises(UserError, match="int8 weights cannot be trained; train the fp32 model and quantise"):
        quantised.train()
    assert not any(p.requires_grad for p in quantised.parameters())
    assert not quantised.eval().training


def test_what_cannot_be_int8_is_refused():
    with pytest.raises(UserError, match="of a float32 model, not of bfloat16"):
        quantise(made().bfloat16())
    with pytest.raises(UserError, match="int8 weights already"):
        quantise(quantise(made()))
    model = made()
    model.head.forward = lambda x: x
    with pytest.raises(UserError, match="head was wrapped"):
        quantise(model)
    model = made()
    model.blocks[1].ffn.fc1.weight.data[3, 4] = float("nan")
    with pytest.raises(UserError, match="not a number"):
        quantise(model)


def test_scales_keep_their_type():
    quantised = quantise(made())
    scale = quantised.head.scale.clone()
    quantised.bfloat16()
    assert torch.equal(quantised.head.scale, scale)
    with torch.no_grad():
        logits, _ = quantised.step(torch.tensor([65]), quantised.init_state(1))
    assert logits.dtype is torch.bfloat16
    assert logits.isfinite().all()


@pytest.mark.slow
def test_a_trained_model_loses_less_than_a_hundredth_of_a_bit_per_byte():
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    learned, unseen = text[:-20_000].unfold(0, 129, 128), text[-20_000:].unfold(0, 129, 128)
    model = made().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def bits(model, tokens):
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()) / math.log(2)

    for _ in range(60):
        optimizer.zero_grad()
        bits(model, learned[torch.randint(len(learned), (8,))]).backward()
        optimizer.step()
    with torch.no_grad():
        before, after = bits(model.eval(), unseen), bits(quantise(model), unseen)
    print(before, after)
    assert before < 3.6  # it has learned something: without weights that matter nothing could be lost
    assert abs(after - before) <= 0.01


def test_gradients_flow_through_int8_weights():
    layer = Int8Linear(Linear(130, 140))
    for rows in (2, 100):
        x = torch.randn(rows, 130, requires_grad=True)
        layer(x).square().sum().backward()
        want = torch.autograd.grad(F.linear(x, layer.weight).square().sum(), x)[0]
        assert relative(x.grad, want) < 1e-5
