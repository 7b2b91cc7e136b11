"""What a training step keeps for its backward pass: of RetNet no more than of a Transformer with FlashAttention."""

from dataclasses import replace

import pytest
import torch

from retnet.measure.memory import kept_for_backward
from retnet.mixers import MultiScaleRetention, RetentionConfig, SoftmaxConfig
from retnet.model import LanguageModel, ModelConfig
from tests.helpers.parity import relative

T, D = 1024, 64
RETNET = ModelConfig(vocab_size=31, d_model=D, num_layers=3, mixer=RetentionConfig(num_heads=2))
FLASH = replace(RETNET, ffn_dim=4 * D, mixer=SoftmaxConfig(num_heads=2, sdpa="flash"))


def kept(config, autocast=False):
    """Numbers of fp32 that the blocks keep, in widths of the model, for each token and layer."""
    model = LanguageModel(config)
    x = torch.randn(1, T, D, requires_grad=True)
    positions = model._positions(x)[0]

    def blocks():
        y = x
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for block in model.blocks:
                y = block(y, None, positions)
        return y

    return kept_for_backward(blocks, model.parameters()) / (4 * T * D * config.num_layers)


def test_retnet_keeps_no_more_than_a_transformer_with_flash_attention(monkeypatch):
    """Input and norm of both halves, q, k, v, gate, and what fc1 gives: 12 widths; cos and sin once for all layers."""
    found = kept(RETNET)
    assert found == pytest.approx(12 + 0.5 / 3, abs=0.1)
    assert found <= kept(FLASH)
    monkeypatch.setattr(MultiScaleRetention, "keeps_heads", True)
    assert kept(RETNET) == pytest.approx(found + 2, abs=0.1)


@pytest.mark.parametrize("ffn", ["gelu", "geglu", "swiglu"])
@pytest.mark.parametrize(
    "mixer", [{}, {"gate": False, "score_norm": "decay", "head_norm_affine": True}], ids=str
)
def test_gradients_are_those_of_a_model_that_keeps_all(ffn, mixer, monkeypatch):
    """In fp64, against the composed layers, whose hooks make each `Linear` be called."""
    config = replace(RETNET, ffn=ffn, mixer=RetentionConfig(num_heads=2, **mixer))
    torch.manual_seed(0)
    model = LanguageModel(config).double()
    tokens, bounds = torch.randint(31, (1, 300)), torch.tensor([0, 7, 300], dtype=torch.int32)

    def gradients():
        model.zero_grad()
        model(tokens, cu_seqlens=bounds).square().sum().backward()
        return [p.grad for p in model.parameters()]

    made = gradients()
    calls = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(MultiScaleRetention, "keeps_heads", True)
    composed = gradients()
    assert len(calls) == sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    assert all(relative(a, b) < 1e-12 for a, b in zip(made, composed, strict=True))


def test_recomputing_blocks_still_keeps_their_inputs_alone():
    model = LanguageModel(RETNET)
    x = torch.randn(1, T, D, requires_grad=True)
    positions = model._positions(x)[0]

    def blocks():
        y = x
        for block in model.blocks:
            y = torch.utils.checkpoint.checkpoint(block, y, None, positions, use_reentrant=False)
        return y

    assert kept_for_backward(blocks, model.parameters()) <= 4 * T * D * (RETNET.num_layers + 1)
    blocks().sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())
