"""Steps that are skipped: what is no step to take, that nothing changes, when a run ends, and what it says."""

import json
import math
import re
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from retnet.settings import UserError, load
from retnet.train.config import RunConfig, TrainConfig
from retnet.train.objective import Objective, Quality
from retnet.train.progress import TrainingProgress
from retnet.train.step_filter import ENOUGH, StepFilter
from retnet.train.trainer import train
from tests.helpers.fast import few_fast

PLAIN = {"warmup_steps": 0, "schedule": "constant", "eval_every": 0, "checkpoint_every": 100}
TENSOR = "blocks.0.ffn.fc1.weight"


def config(config_file, **changes) -> RunConfig:
    run = load(RunConfig, config_file)
    return replace(run, model=replace(run.model, dropout=0.0), train=replace(run.train, **PLAIN, **changes))


@contextmanager
def injected(monkeypatch, number, passes):
    """Gradients of one tensor that are NaN or infinite in its last element, in these passes, counted from 1."""
    plain, count = Objective.forward, iter(range(1, 10**9))

    def forward(self, *batch):
        here = next(count) in passes
        weight = dict(self.model.named_parameters())[TENSOR]

        def spoil(gradient):
            handle.remove()
            spoiled = gradient.clone()
            spoiled[-1, -1] = number
            return spoiled

        if here:
            handle = weight.register_hook(spoil)
        return plain(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "forward", forward)
        yield


def tensors(run_dir, step):
    home = run_dir / f"checkpoints/step-{step:08d}"
    files = [file for file in home.glob("*.safetensors") if file.name != "random.safetensors"]
    return {(file.name, name): x for file in files for name, x in load_file(file).items()}


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


class TestRule:
    def test_what_is_no_number(self):
        steps = StepFilter(TrainConfig())
        assert steps.problem(math.nan, math.nan) == "the loss became nan"
        assert steps.problem(1.0, math.inf) == "the gradient became inf"
        assert (steps.skipped, steps.in_a_row) == (2, 2)
        assert steps.problem(1.0, 1.0) == ""
        assert (steps.skipped, steps.in_a_row) == (2, 0)

    def test_a_norm_whose_square_no_fp32_holds(self):
        """AdamW would keep it as an infinity, in which the weight's updates end for ever."""
        assert torch.tensor(1e19).square().isfinite()
        assert "1e+20" in StepFilter(TrainConfig(clip=0.0)).problem(1.0, 1e20)

    def test_spikes_are_measured_by_the_median_of_steps_that_were_taken(self):
        steps = StepFilter(TrainConfig(spike=5.0))
        for n in range(ENOUGH):
            assert not steps.problem(1.0, 100.0 if n == 3 else 1.0)  # too few are known yet
        assert not steps.problem(1.0, 4.9)
        for _ in range(200):  # skipped ones never become usual
            assert "became 5.1, and the median of the steps before is 1" in steps.problem(1.0, 5.1)
        assert not steps.problem(1.0, 1.0)

    def test_none_is_a_spike_unless_asked(self):
        steps = StepFilter(TrainConfig())
        assert not any(steps.problem(1.0, norm) for norm in (1.0,) * 50 + (1e6,))
        assert steps.norms == ()

    def test_it_ends_after_so_many_in_a_row(self):
        steps = StepFilter(TrainConfig(skip_limit=2))
        for loss, ended in ((math.nan, False), (1.0, False), (math.nan, False), (math.nan, True)):
            steps.problem(loss, 1.0)
            assert steps.ended == ended

    @pytest.mark.parametrize("spike", [0.5, 1.0])
    def test_a_spike_that_would_skip_half_of_all(self, spike):
        with pytest.raises(UserError, match=r"it must be above 1, or 0 to skip none"):
            TrainConfig(spike=spike)


@pytest.mark.parametrize("number", few_fast([math.nan, math.inf, -math.inf], math.inf))
@pytest.mark.parametrize("precision", few_fast(["fp32", "bf16"], "fp32"))
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_changes_no_bit(number, precision, optimizer, config_file, tmp_path, monkeypatch):
    """Weights, moments, momentum and average after 3 steps are those after a 4th that is skipped."""
    changes = {"precision": precision, "optimizer": optimizer, "ema": 0.9}
    train(config(config_file, steps=3, **changes), tmp_path / "three")
    with injected(monkeypatch, number, passes={7}):  # the first of two of step 4
        train(config(config_file, steps=4, **changes), tmp_path / "four")
    three, four = tensors(tmp_path / "three", 3), tensors(tmp_path / "four", 4)
    assert three.keys() == four.keys()
    assert {file for file, _ in four} == {
        "model.safetensors",
        "training.safetensors",
        "optimizer.safetensors",
    }
    assert all(torch.equal(four[name], x) for name, x in three.items())
    last = [line for line in lines(tmp_path / "four") if "loss" in line][-1]
    assert last["skipped_steps"] == 1
    assert "gradient_norm" not in last  # it is no number


def test_training_goes_on_after_a_skipped_step(config_file, tmp_path, monkeypatch):
    with injected(monkeypatch, math.nan, passes={2, 9}):
        outcome = train(config(config_file, steps=12, skip_limit=1 + 1), tmp_path / "run")
    assert outcome.finished
    learned = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert [line["skipped_steps"] for line in learned] == [1] * 4 + [2] * 8
    assert learned[-1]["loss"] < learned[0]["loss"] - 1
    state = json.loads((tmp_path / "run/checkpoints/step-00000012/trainer.json").read_text())
    assert state["skipped"] == 2
    memory = load_file(tmp_path / "run/checkpoints/step-00000012/optimizer.safetensors")
    assert memory[f"{TENSOR}/step"] == 10
    assert all(x.isfinite().all() for x in memory.values())


def test_after_so_many_in_a_row_it_saves_says_where_and_can_go_on(config_file, tmp_path, monkeypatch, capsys):
    run = config(config_file, steps=8, skip_limit=2)
    with (
        injected(monkeypatch, math.inf, passes=range(9, 100)),
        pytest.raises(UserError, match="2 steps in a row were skipped") as error,
    ):
        train(run, tmp_path / "run", progress=TrainingProgress())
    said = str(error.value)
    assert "became inf at step 6, in documents [" in said
    assert f"; its gradient is not finite from {TENSOR} on down" in said
    assert "saved at step 6" in said
    assert "skipped: the gradient became inf at step 5, in documents [" in capsys.readouterr().err
    assert (tmp_path / "run/checkpoints/last").read_text() == "step-00000006\n"
    assert train(run, tmp_path / "run", begin="resume").finished
    assert lines(tmp_path / "run")[-2]["skipped_steps"] == 2  # as many as before


def test_a_run_whose_last_steps_were_skipped_is_whole_and_says_so(config_file, tmp_path, monkeypatch):
    run = config(config_file, steps=4, skip_limit=2)
    with (
        injected(monkeypatch, math.nan, passes=range(5, 9)),
        pytest.raises(UserError, match="2 steps in a row were skipped") as error,
    ):
        train(run, tmp_path / "run")
    assert "step 4 was the last" in str(error.value)
    assert "--resume" not in str(error.value)
    assert "validation_bits_per_byte" in lines(tmp_path / "run")[-1]
    assert (tmp_path / "run/checkpoints/best").read_text() == "step-00000004\n"


def test_steps_skipped_in_a_row_are_counted_over_calls(config_file, tmp_path, monkeypatch):
    """Two before the run was stopped and one after make three; what a run ended of is not counted again."""
    run = config(config_file, steps=8, skip_limit=3)
    with injected(monkeypatch, math.nan, passes=range(5, 9)):
        train(replace(run, train=replace(run.train, steps=4)), tmp_path / "run")
    with injected(monkeypatch, math.nan, passes={1}), pytest.raises(UserError, match="saved at step 5"):
        train(run, tmp_path / "run", begin="resume")
    with injected(monkeypatch, math.nan, passes={1}):
        assert train(run, tmp_path / "run", begin="resume").finished


def test_of_many_documents_some_are_named(config_file, tmp_path, monkeypatch, capsys):
    run = config(config_file, steps=1, batch_size=16)
    with injected(monkeypatch, math.nan, passes={1}):
        train(run, tmp_path / "run", progress=TrainingProgress())
    (said,) = re.findall(r"in documents (\[.*?)\;", capsys.readouterr().err)
    assert re.fullmatch(r"\[(\d+, ){7}\d+\] and \d+ more", said)


def test_a_validation_that_is_no_number_is_never_the_best(config_file, tmp_path, monkeypatch):
    results = iter([math.nan, 8.0, math.nan, 9.0])
    monkeypatch.setattr(Quality, "bits_per_byte", property(lambda self: next(results)))
    run = config(config_file, steps=4, log_every=4)
    run = replace(run, train=replace(run.train, eval_every=1))
    bests = []

    class Watched(TrainingProgress):
        def validated(self, step, bits):
            file = tmp_path / "run/checkpoints/best"
            bests.append(file.read_text() if file.exists() else None)

    train(run, tmp_path / "run", progress=Watched())
    bests.append((tmp_path / "run/checkpoints/best").read_text())
    assert bests == [None, None, *["step-00000002\n"] * 3]


def test_spikes_of_a_run(config_file, tmp_path, monkeypatch):
    """A gradient 1000 times as long as usual is skipped; what is usual comes back from a checkpoint."""
    run = config(config_file, steps=ENOUGH + 2, spike=50.0, log_every=1)
    train(replace(run, train=replace(run.train, steps=ENOUGH)), tmp_path / "run")
    state = json.loads((tmp_path / f"run/checkpoints/step-{ENOUGH:08d}/trainer.json").read_text())
    assert len(state["norms"]) == ENOUGH
    with injected(monkeypatch, 1e6, passes={1}):
        train(run, tmp_path / "run", begin="resume")
    learned = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert [line["skipped_steps"] for line in learned[-3:]] == [0, 1, 1]
    assert learned[-2]["gradient_norm"] > 1000


def test_fp16_is_refused(config_file):
    with pytest.raises(UserError, match=r"train\.precision 'fp16'"):
        load(RunConfig, config_file, {"train.precision": "fp16"})
