"""Schedules against their definitions, groups of parameters, the memory of the optimiser."""

import math

import pytest
import torch

from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.train.config import TrainConfig
from retnet.train.optimizer import adamw, learning_rate, optimizer_tensors, restore_optimizer


def rates(**options):
    config = TrainConfig(learning_rate=1.0, **options)
    return [learning_rate(step, config) for step in range(config.steps)]


def test_linear():
    got = rates(steps=10, warmup_steps=4)
    assert got == pytest.approx([0.25, 0.5, 0.75, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0])


def test_cosine_with_a_floor():
    got = rates(steps=12, warmup_steps=2, schedule="cosine", final_lr_fraction=0.1)
    assert got[:2] == [0.5, 1.0]
    assert got[-1] == pytest.approx(0.1)
    assert got[6] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert sorted(got[2:], reverse=True) == got[2:]


def test_warmup_stable_decay():
    got = rates(steps=20, warmup_steps=2, schedule="wsd", decay_fraction=0.25)
    assert got[1:15] == [1.0] * 14
    assert got[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_constant_and_no_warmup():
    assert rates(steps=3, warmup_steps=0, schedule="constant") == [1.0] * 3


def test_a_warmup_longer_than_the_run():
    assert rates(steps=2, warmup_steps=100) == [0.5, 1.0]


def model():
    return LanguageModel(
        ModelConfig(
            vocab_size=11, d_model=8, num_layers=1, mixer=RetentionConfig(num_heads=2, head_norm_affine=True)
        )
    )


def test_norms_have_no_weight_decay():
    module = model()
    decayed, plain = adamw(module, TrainConfig()).param_groups
    assert decayed["weight_decay"] == 0.05
    assert plain["weight_decay"] == 0.0
    assert decayed["betas"] == (0.9, 0.98)
    assert {p.dim() for p in plain["params"]} == {1}
    assert {p.dim() for p in decayed["params"]} == {2}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(module.parameters()))


def test_restored_memory_gives_the_same_next_step():
    torch.manual_seed(0)
    module, twin = model(), model()
    optimizer = adamw(module, TrainConfig())

    def step(module, optimizer, seed):
        torch.manual_seed(seed)
        for p in module.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    step(module, optimizer, 1)
    twin.load_state_dict(module.state_dict())
    other = adamw(twin, TrainConfig())
    restore_optimizer(twin, other, {n: t.clone() for n, t in optimizer_tensors(module, optimizer).items()})
    step(module, optimizer, 2)
    step(twin, other, 2)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))
