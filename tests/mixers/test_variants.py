"""The shipped comparisons: every mixer and every ablation of the paper, alike in all but what is compared."""

import dataclasses

import pytest
import torch

from retnet.mixers import MIXERS
from retnet.model import LanguageModel
from retnet.model.cost import cost
from retnet.settings import config_path, load, shipped_configs
from retnet.train.config import RunConfig
from tests.helpers.parity import assert_three_ways_agree

ABLATIONS = {
    "reference": {},
    "no-gate": {"gate": False},
    "no-group-norm": {"head_norm": "none", "score_norm": "paper"},
    "no-decay": {"decay": "none"},
    "single-decay": {"decay": 127 / 128},
    "small-heads": None,
}


def shipped(name: str) -> RunConfig:
    return load(RunConfig, config_path(name))


@pytest.mark.parametrize("scale", ["", "200m/"])
@pytest.mark.parametrize("name", MIXERS)
def test_variants_have_as_many_parameters_as_retnet_and_differ_in_the_mixer_alone(name, scale):
    run, retnet = shipped(f"variants/{scale}{name}"), shipped(f"variants/{scale}retention")
    assert run.model.mixer.name == name
    same = {"mixer": retnet.model.mixer, "ffn_dim": retnet.model.ffn_dim}
    assert dataclasses.replace(run.model, **same) == retnet.model
    assert (run.data, run.train) == (retnet.data, retnet.train)
    ours, theirs = cost(run.model), cost(retnet.model)
    assert abs(ours.total / theirs.total - 1) < 0.02
    layers = [sum(c.parameters[part] for part in ("mixers", "feed-forward")) for c in (ours, theirs)]
    assert abs(layers[0] / layers[1] - 1) < 0.02
    assert layers[1] == 12 * retnet.model.d_model**2 * retnet.model.num_layers


@pytest.mark.parametrize("scale", ["", "200m/"])
@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_differ_from_the_reference_in_what_they_say(name, scale):
    run, reference = shipped(f"ablations/{scale}{name}"), shipped(f"ablations/{scale}reference")
    mixer = reference.model.mixer
    change = ABLATIONS[name]
    if change is None:  # heads a quarter as wide, all together as wide
        change = {
            "num_heads": 4 * mixer.num_heads,
            "key_dim": run.model.mixer.key_dim,
            "value_dim": run.model.mixer.value_dim,
        }
        wide = mixer.widths(run.model.d_model)
        assert run.model.mixer.widths(run.model.d_model) == (wide[0] // 4, wide[1] // 4)
    assert run == dataclasses.replace(
        reference, model=dataclasses.replace(reference.model, mixer=dataclasses.replace(mixer, **change))
    )
    if name != "no-gate":
        assert cost(run.model).total == cost(reference.model).total


def test_the_reference_is_the_papers_model():
    paper = shipped("paper/200m")
    assert shipped("ablations/200m/reference") == shipped("variants/200m/retention") == paper
    assert shipped("ablations/reference") == shipped("variants/retention")


def test_nothing_else_is_shipped():
    names = {f"{scale}{name}" for scale in ("", "200m/") for name in ABLATIONS}
    assert {n.removeprefix("ablations/") for n in shipped_configs() if n.startswith("ablations/")} == names
    names = {f"{scale}{name}" for scale in ("", "200m/") for name in MIXERS} | {"fla", "torchscale"}
    assert {n.removeprefix("variants/") for n in shipped_configs() if n.startswith("variants/")} >= names


@pytest.mark.parametrize("name", MIXERS)
def test_whole_models_run_in_three_ways(name):
    """Small models of every kind in fp64, also with a padding mask and with rows that are empty."""
    torch.manual_seed(0)
    config = shipped(f"variants/{name}").model
    config = dataclasses.replace(config, vocab_size=61, d_model=48, num_layers=2, ffn_dim=48)
    model = LanguageModel(config).double().eval()
    tokens = torch.randint(61, (3, 40))
    assert_three_ways_agree(model, tokens, 1e-8)
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, 30:], mask[1, :] = False, False
    with torch.inference_mode():
        logits, state = model.prefill(tokens, model.init_state(3), mask=mask)
        following, _ = model.step(tokens[:, 0], state)
        for row, length in enumerate((30, 0, 40)):
            alone = model(torch.cat([tokens[row : row + 1, :length], tokens[row : row + 1, :1]], dim=1))
            assert torch.allclose(logits[row, :length], alone[0, :-1], atol=1e-9)
            assert torch.allclose(following[row], alone[0, -1], atol=1e-9)
