"""Every way to learn resumes bit for bit: a run that died in mid-step, and again, ends as one that never did."""

from dataclasses import replace

import pytest
from safetensors.torch import load_file

from retnet.settings import UserError, load
from retnet.train import trainer
from retnet.train.config import RunConfig
from tests.helpers.fast import few_fast
from tests.train.test_trainer import assert_identical

WAYS = {
    "muon": {"optimizer": "muon", "momentum": 0.9},
    "wsd": {"schedule": "wsd", "decay_fraction": 0.5},
    "z-loss": {"z_loss": 1e-2},
    "average": {"ema": 0.8},
    "ramp": {"ramp_steps": 5, "accumulate": 3},
    "spikes": {"spike": 1.5},
}
WAYS["all"] = {key: value for way in WAYS.values() for key, value in way.items()}


class Death(BaseException):
    """Of the process, as far as a test can die."""


def dying_at(step, plain=trainer.learning_rate):
    """A schedule that ends the process in this step, after the backward pass."""

    def learning_rate(at, config):
        if at == step:
            raise Death
        return plain(at, config)

    return learning_rate


@pytest.mark.parametrize("way", few_fast((pytest.param(way, id=name) for name, way in WAYS.items()), "all"))
def test_bit_for_bit(way, config_file, tmp_path, monkeypatch):
    run = load(RunConfig, config_file)
    run = replace(run, train=replace(run.train, steps=10, eval_every=5, **way))
    trainer.train(run, tmp_path / "whole")
    begin = "new"
    for step in (4, 7):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "learning_rate", dying_at(step))
            with pytest.raises(Death):
                trainer.train(run, tmp_path / "died", begin=begin)
        begin = "resume"
    trainer.train(run, tmp_path / "died", begin="resume")
    assert_identical(tmp_path / "died", tmp_path / "whole")
    for file in (
        "optimizer.safetensors",
        "random.safetensors",
        *(["training.safetensors"] if run.train.ema else []),
    ):
        got, want = (
            load_file(tmp_path / name / "checkpoints/step-00000010" / file) for name in ("died", "whole")
        )
        assert got.keys() == want.keys()
        assert all(got[name].equal(x) for name, x in want.items()), file


def test_the_way_must_stay(config_file, tmp_path):
    """Whatever changes what is learned is refused by name when a run is resumed."""
    run = load(RunConfig, config_file)
    trainer.train(replace(run, train=replace(run.train, steps=1)), tmp_path / "run")
    for way in WAYS.values():
        name = next(iter(way))
        with pytest.raises(UserError, match=f"train.{name}: "):
            trainer.train(
                replace(run, train=replace(run.train, steps=1, **way)), tmp_path / "run", begin="resume"
            )
