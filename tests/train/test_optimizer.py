"""Schedules against their definitions, groups of parameters, the memory of the optimiser."""

import math

import pytest
import torch

from retnet.data import IGNORED
from retnet.mixers import MIXERS, RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.settings import UserError
from retnet.train.config import TrainConfig
from retnet.train.objective import Objective
from retnet.train.optimizer import adamw, empty_memory, learning_rate, optimizer_tensors, optimizers


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


MUON = TrainConfig(optimizer="muon", learning_rate=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("config", [TrainConfig(), MUON], ids=["adamw", "muon"])
def test_restored_memory_gives_the_same_next_step(config):
    torch.manual_seed(0)
    module, twin = model(), model()
    learners = optimizers(module, config)

    def step(module, learners, seed):
        torch.manual_seed(seed)
        for p in module.parameters():
            p.grad = torch.randn_like(p)
        for learner in learners:
            learner.step()

    step(module, learners, 1)
    twin.load_state_dict(module.state_dict())
    others = optimizers(twin, config)
    saved = optimizer_tensors(module, learners)
    for name, memory in empty_memory(twin, others, saved).items():
        memory.copy_(saved[name])
    step(module, learners, 2)
    step(twin, others, 2)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


class TestMuon:
    @pytest.mark.parametrize("mixer", MIXERS)
    def test_it_has_the_matrices_of_blocks_and_adamw_has_the_rest(self, mixer):
        size = {"d_model": 32, "num_layers": 2, "tie_embeddings": False, "mixer": MIXERS[mixer].Config()}
        module = LanguageModel(ModelConfig(vocab_size=11, **size))
        muon, rest = optimizers(module, MUON)
        names = {p: name for name, p in module.named_parameters()}
        owned = [[names[p] for group in o.param_groups for p in group["params"]] for o in (muon, rest)]
        assert sorted(owned[0] + owned[1]) == sorted(names.values())  # each once
        assert {"embedding.weight", "head.weight", "norm.weight"} <= set(owned[1])
        assert {f"blocks.{n}.ffn.fc1.weight" for n in range(2)} <= set(owned[0])
        assert all(
            p.dim() == 2 and "blocks" in names[p] for group in muon.param_groups for p in group["params"]
        )

    def test_a_step_is_that_of_its_definition(self):
        """Momentum, Nesterov, U Vᵀ of the SVD up to Newton-Schulz' singular values, scaled, beside a decoupled decay."""
        torch.manual_seed(0)
        module = model()
        muon, _ = optimizers(module, MUON)
        weight = module.blocks[0].ffn.fc1.weight
        momentum, μ = torch.zeros_like(weight), 0.95
        for _ in range(3):
            before = weight.detach().clone()
            weight.grad = torch.randn_like(weight)
            momentum = μ * momentum + (1 - μ) * weight.grad
            muon.step()
            moved = (1 - 1e-2 * 0.1) * before - weight.detach()
            update = moved / (1e-2 * 0.2 * math.sqrt(max(weight.shape)))
            U, _, Vh = torch.linalg.svd((1 - μ) * weight.grad + μ * momentum, full_matrices=False)
            singular = U.mT @ update @ Vh.mT
            assert (singular.diagonal() - 1).abs().max() < 0.4  # it settles for values about 1
            assert (singular - singular.diagonal().diag()).abs().max() < 0.05

    def test_its_updates_have_the_size_of_adamws(self):
        torch.manual_seed(0)
        size = ModelConfig(vocab_size=11, d_model=64, num_layers=1, mixer=RetentionConfig(num_heads=2))
        moved = {}
        for name in ("muon", "adamw"):
            module = LanguageModel(size)
            weight = module.blocks[0].ffn.fc1.weight
            before = weight.detach().clone()
            learners = optimizers(module, TrainConfig(optimizer=name, learning_rate=1.0, weight_decay=0.0))
            for _ in range(20):
                for p in module.parameters():
                    p.grad = torch.randn_like(p)
                before = weight.detach().clone()
                for learner in learners:
                    learner.step()
            moved[name] = float((weight.detach() - before).square().mean().sqrt())
        assert (
            0.1 < moved["muon"] < 0.3
        )  # 0.2 to 0.4 is what AdamW's have in training, where gradients are alike
        assert 0.1 < moved["adamw"] < 0.5

    def test_momentum_is_its_own(self):
        assert optimizers(model(), TrainConfig(optimizer="muon", momentum=0.5))[0].defaults["momentum"] == 0.5
        with pytest.raises(UserError, match="momentum is of optimizer 'muon', and optimizer is 'adamw'"):
            TrainConfig(momentum=0.9)


def test_z_loss_adds_its_gradient_and_shows_the_cross_entropy():
    torch.manual_seed(0)
    module = model().double()
    tokens, targets = torch.randint(11, (2, 5)), torch.randint(11, (2, 5))
    targets[0, 3:] = IGNORED
    bounds = torch.tensor([0, 5, 10], dtype=torch.int32)

    def gradient(loss):
        return torch.autograd.grad(loss, module.embedding.weight, retain_graph=True)[0]

    plain, with_z = (
        Objective(module)(tokens, targets, bounds),
        Objective(module, 0.1)(tokens, targets, bounds),
    )
    logits = module(tokens.view(1, -1), cu_seqlens=bounds).squeeze(0).float()
    Z = logits[targets.flatten() != IGNORED].exp().sum(-1)
    z = 0.1 * Z.log().square().sum()
    assert torch.equal(with_z, plain)
    assert torch.allclose(gradient(with_z), gradient(plain + z), atol=1e-5)
    assert not torch.allclose(gradient(plain), gradient(plain + z), atol=1e-3)
    with_z, plain = (Objective(module, weight).eval()(tokens, targets, bounds) for weight in (0.1, 0.0))
    assert torch.equal(gradient(with_z), gradient(plain))  # in training alone


class TestRamp:
    C = TrainConfig(accumulate=8, ramp_from=2, ramp_steps=9)

    def test_every_size_for_equally_many_steps(self):
        assert [self.C.passes(step) for step in range(12)] == [2, 2, 2, 4, 4, 4, 6, 6, 6, 8, 8, 8]

    def test_no_pass_is_left_out_or_made_twice(self):
        c, place = self.C, 0
        for step in range(15):
            assert c.passes_before(step) == place
            place += c.passes(step)
        assert c.tokens_before(15) == place * c.batch_size * c.seq_len

    @pytest.mark.parametrize(("accumulate", "ramp_from"), [(1, 1), (6, 6), (7, 1), (12, 3), (64, 1)])
    @pytest.mark.parametrize("ramp_steps", [0, 1, 5, 7, 100])
    def test_the_place_of_a_step_is_the_sum_of_all_before(self, accumulate, ramp_from, ramp_steps):
        if ramp_from == 1 or ramp_steps:
            c = TrainConfig(accumulate=accumulate, ramp_from=ramp_from, ramp_steps=ramp_steps)
            passes = [c.passes(step) for step in range(120)]
            assert all(c.passes_before(step) == sum(passes[:step]) for step in range(120))

    def test_without_one(self):
        c = TrainConfig(accumulate=3)
        assert [c.passes(step) for step in range(3)] == [3, 3, 3]
        assert c.tokens_before(7) == 7 * c.tokens_per_step

    def test_what_is_none(self):
        with pytest.raises(UserError, match="ramp_from is 3; accumulate, which is 8, must be a multiple"):
            TrainConfig(accumulate=8, ramp_from=3, ramp_steps=9)
        with pytest.raises(UserError, match="ramp_from is 2 and ramp_steps 0"):
            TrainConfig(accumulate=8, ramp_from=2)
