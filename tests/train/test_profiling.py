"""`--profile`: a trace of a few steps in the format that Perfetto reads, and training that does not feel it."""

import gzip
import json

import pytest
import torch

from retnet.train.profiling import profiled
from retnet.train.progress import TrainingProgress
from retnet.train.trainer import train
from tests.train.test_trainer import config, final_weights


@pytest.mark.slow
def test_three_steps_are_traced(config_file, tmp_path, capsys):
    run = config(config_file, steps=9, eval_every=0)
    train(run, tmp_path / "run", profile=True, progress=TrainingProgress())
    (path,) = (tmp_path / "run/profile").iterdir()
    assert path.name == "steps-5-to-7.json.gz"
    assert f"profile of steps 5 to 7: {path}; https://ui.perfetto.dev opens it" in capsys.readouterr().err
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    assert {"ph", "ts", "dur", "name", "pid", "tid"} <= next(
        e for e in events if e.get("cat") == "cpu_op"
    ).keys()
    names = [event.get("name", "") for event in events]
    assert sum("Optimizer.step#AdamW.step" in name for name in names) == 3
    assert names.count("forward and backward") == 3
    train(run, tmp_path / "plain")
    want = final_weights(tmp_path / "plain")
    assert all(torch.equal(x, want[name]) for name, x in final_weights(tmp_path / "run").items())


def test_a_profile_that_cannot_be_written_is_said_and_training_goes_on(tmp_path):
    said = []
    (tmp_path / "profile").touch()
    with profiled(tmp_path / "profile", 0, torch.device("cpu"), said.append) as after_step:
        for _ in range(9):
            after_step()
    (line,) = said
    assert line.startswith(f"no profile: cannot write {tmp_path / 'profile/steps-5-to-7.json.gz'}: ")
    assert "is a file" in line


def test_too_few_steps_are_said(tmp_path):
    said = []
    with profiled(tmp_path / "profile", 10, torch.device("cpu"), said.append) as after_step:
        for _ in range(5):
            after_step()
    assert said == ["no profile: it is of steps 15 to 17, and there were 5 in this call"]
    assert not (tmp_path / "profile").exists()
