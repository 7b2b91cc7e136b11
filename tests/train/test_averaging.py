"""The average of weights: its definition, that it is what is evaluated and saved, and that training does not see it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from retnet.model.checkpoint import load_model
from retnet.settings import load
from retnet.train.averaging import AveragedWeights
from retnet.train.config import RunConfig
from retnet.train.trainer import train


def test_it_is_the_average_of_its_definition():
    model = nn.Linear(3, 2)
    average = AveragedWeights(model, 0.4)
    want = model.weight.detach().double().clone()
    for step in range(1, 13):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3))
        average.update(step)
        decay = min(0.4, step / (step + 9))  # 0.1 at first: weights nobody learned are soon forgotten
        want = decay * want + (1 - decay) * model.weight.detach().double()
    assert torch.allclose(average.tensors["weight"].double(), want, atol=1e-6)


def test_the_model_has_it_inside_the_block_alone():
    model = nn.Linear(3, 2)
    average, own = AveragedWeights(model, 0.9), model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)

    def inside():
        with average.in_place():
            assert torch.equal(model.weight, own)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        inside()
    assert torch.equal(model.weight, own + 1)
    assert model.weight.requires_grad


@pytest.fixture(scope="module")
def runs(config_file, tmp_path_factory):
    home = tmp_path_factory.mktemp("averaged")
    run = load(RunConfig, config_file)
    for name, decay in (("plain", 0.0), ("averaged", 0.9)):
        train(replace(run, train=replace(run.train, steps=8, ema=decay)), home / name)
    return home


def saved(runs, name, file):
    return load_file(runs / name / "checkpoints/step-00000008" / file)


def test_training_does_not_see_it(runs):
    """Validation with the average leaves the weights that training goes on with, and dropout's masks."""
    got, want = saved(runs, "averaged", "training.safetensors"), saved(runs, "plain", "model.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], x) for name, x in want.items())


def test_the_model_of_a_checkpoint_is_the_average(runs, config_file):
    averaged, own = (saved(runs, "averaged", f"{name}.safetensors") for name in ("model", "training"))
    assert all(not torch.equal(averaged[name], x) for name, x in own.items())
    model = load_model(runs / "averaged/checkpoints/step-00000008")
    assert torch.equal(model.embedding.weight, averaged["embedding.weight"])


def test_both_are_validated(runs):
    def validations(name, key):
        lines = map(json.loads, (runs / name / "metrics.jsonl").read_text().splitlines())
        return [line[key] for line in lines if key in line]

    key = "validation_bits_per_byte"
    assert validations("averaged", f"{key}_not_averaged") == validations("plain", key)
    assert validations("averaged", key) != validations("plain", key)
    assert not validations("plain", f"{key}_not_averaged")
