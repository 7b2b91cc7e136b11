"""Runs that may take so many minutes: what is planned, that it is kept, and that resuming is exact."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
from rich.console import Console

from retnet.settings import UserError, load
from retnet.train.config import RunConfig, TrainConfig
from retnet.train.optimizer import learning_rate
from retnet.train.pace import Pace, fitted
from retnet.train.progress import TrainingProgress
from retnet.train.trainer import train
from tests.helpers.fast import few_fast
from tests.train.test_trainer import assert_identical, config

DEMO = TrainConfig(
    steps=560, minutes=5, seq_len=512, batch_size=8, warmup_steps=50, eval_every=140, checkpoint_every=140
)
HELD_OUT = 100_000  # tokens of a validation


class Clock:
    """A machine on which steps take as long as the test says."""

    now = 1000.0

    def __call__(self):
        return self.now


def simulated(c, second, *, prepared=20.0, slow_start=3.0, noise=lambda step: 1.0):
    """Seconds and settings of a run of `c` where a step takes `second` seconds, a validation a third of that per token."""
    clock = Clock()
    pace = Pace(clock.now, HELD_OUT, clock)
    clock.now += prepared
    step, planned = 0, False

    def spend(seconds, note):
        clock.now += seconds
        note(seconds)

    while step < c.steps:
        spend(second * noise(step) * (slow_start if step < 2 else 1), pace.step)
        step += 1
        if not planned and step < c.steps and pace.ready(c):
            spend(0.1, pace.save)
            c, planned = pace.plan(step, c), True
        last = step == c.steps
        if last or step % c.eval_every == 0:
            spend(HELD_OUT / c.tokens_per_step * second / 3, pace.validation)
        if last or step % c.checkpoint_every == 0:
            spend(0.1, pace.save)
    return clock.now - 1000, c


@pytest.mark.parametrize("second", [0.2, 0.45, 0.6, 1.0, 1.5, 2.5, 4.0])
def test_a_run_ends_with_its_minutes_on_slow_machines_and_fast_ones(second):
    seconds, c = simulated(DEMO, second, prepared=20 * second)
    assert seconds <= 300
    assert c.steps == 560 or seconds > 0.9 * 300  # none of the time is left over
    assert (c.steps < 560) == (second > 0.45)
    assert learning_rate(c.steps - 1, c) == 0.0  # the schedule ends with the run
    assert c.warmup_steps <= max(c.steps // 4, 10)


def test_noise_does_not_cost_the_promise():
    seconds, _ = simulated(DEMO, 1.0, noise=lambda step: 1.0 + 0.3 * (step % 7 == 0))
    assert 0.88 * 300 < seconds < 1.02 * 300


def test_the_end_waits_for_what_is_still_written():
    """Of several processes, which go on meanwhile."""
    pace = Pace(0.0, HELD_OUT)
    for _ in range(9):
        pace.step(1.0)
    pace.save(0.2)
    before = pace.left(9, DEMO)
    pace.written(7.0)
    assert pace.left(9, DEMO) == pytest.approx(before + 7)


def test_with_no_time_left_there_is_one_more_step():
    seconds, c = simulated(replace(DEMO, minutes=0.5), 5.0)
    assert c.steps == 11  # 2 that do not count, 8 that do, and the last
    assert seconds > 30


def test_what_is_measured_grows_with_the_minutes_up_to_a_minute():
    pace = Pace(0.0, HELD_OUT)
    for _ in range(20):
        pace.step(1.0)
    assert pace.ready(DEMO)  # 18 of 300 seconds
    assert not pace.ready(replace(DEMO, minutes=6))
    for _ in range(42):
        pace.step(1.0)
    assert pace.ready(replace(DEMO, minutes=10_000))


def test_time_left_is_of_the_last_steps_not_of_the_slow_start():
    c = replace(DEMO, minutes=None, steps=100, eval_every=0, checkpoint_every=1000)
    pace = Pace(0.0, 0)
    assert pace.left(0, c) is None
    for step in range(50):
        pace.step(20.0 if step < 25 else 1.0)
    assert pace.left(50, c) == pytest.approx(50.0)
    pace.validation(7.0)
    pace.save(2.0)
    assert pace.left(50, c) == pytest.approx(50.0 + 7.0 + 2.0)  # the last step validates and saves
    assert pace.left(50, replace(c, eval_every=20)) == pytest.approx(50.0 + 3 * 9.0)  # at 60, 80 and 100


def test_a_shorter_run_rises_in_a_part_of_it():
    assert fitted(DEMO, 400, 10) == replace(DEMO, steps=400)
    assert fitted(DEMO, 80, 10).warmup_steps == 20
    assert fitted(DEMO, 20, 10).warmup_steps == 10  # what was made stays in the rise


class Stopping(TrainingProgress):
    """Sends this process a signal after a step, as a person might."""

    def __init__(self, at):
        super().__init__(Console(quiet=True))
        self.at, self.said = at, []

    def say(self, text):
        self.said.append(text)

    def step(self, step, *measured):
        if step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def planned(monkeypatch):
    _plan_nine(monkeypatch)


def _plan_nine(monkeypatch):
    """Pretends that the machine was measured after 4 steps, and 9 fit."""
    monkeypatch.setattr(Pace, "ready", lambda self, c: self._steps >= 4)
    monkeypatch.setattr(Pace, "plan", lambda self, step, c: fitted(c, 9, step))


def plan_of(run):
    return json.loads((run / "plan.json").read_text())


@pytest.fixture(scope="module")
def whole_once(config_file, tmp_path_factory):
    progress, path = Stopping(None), tmp_path_factory.mktemp("pace") / "whole"
    with pytest.MonkeyPatch.context() as patched:
        _plan_nine(patched)
        done = train(config(config_file, minutes=3.0), path, progress=progress)
    assert (done.step, done.finished) == (9, True)
    assert "9 steps fit into 3 minutes on this machine" in progress.said
    return path


@pytest.fixture
def whole(whole_once, planned):
    """A run of minutes that nobody stopped; others are planned as it was."""
    return whole_once


def test_what_was_chosen_is_written_to_the_run(whole):
    c = load(RunConfig, whole / "config.toml").train
    assert (c.steps, c.warmup_steps, c.minutes) == (9, 2, 3.0)
    assert plan_of(whole) == {"after": 4, "asked": 12, "steps": 9, "warmup_steps": 2}


@pytest.mark.parametrize("stop", few_fast([5, 7], 5))
def test_stopped_after_the_choice_a_run_ends_as_if_it_never_was(
    stop, whole, config_file, tmp_path, monkeypatch
):
    run, asked = tmp_path / "run", config(config_file, minutes=3.0)
    assert train(asked, run, progress=Stopping(stop)).step == stop
    monkeypatch.setattr(Pace, "plan", lambda self, step, c: pytest.fail("it was chosen already"))
    assert train(asked, run, begin="resume").finished
    assert_identical(run, whole)


def test_stopped_before_the_choice_a_run_measures_again(whole, config_file, tmp_path, monkeypatch):
    run, asked = tmp_path / "run", config(config_file, minutes=3.0)
    assert train(asked, run, progress=Stopping(2)).step == 2
    assert not (run / "plan.json").exists()
    monkeypatch.setattr(Pace, "ready", lambda self, c: self._steps >= 2)  # in this call: after step 4 again
    assert train(asked, run, begin="resume").finished
    assert_identical(run, whole)


def test_a_crash_between_plan_and_configuration_changes_nothing(whole, config_file, tmp_path):
    run, asked = tmp_path / "run", config(config_file, minutes=3.0)
    train(asked, run, progress=Stopping(5))
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("steps = 9", "steps = 12"))
    assert train(asked, run, begin="resume").step == 9
    assert_identical(run, whole)


def test_other_steps_than_were_asked_for_go_on(whole, config_file, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert train(config(config_file, minutes=3.0, steps=11), run, begin="resume").step == 11
    assert train(config(config_file, minutes=3.0), run, begin="resume").step == 11  # now planned so
    with pytest.raises(UserError, match=r"train.minutes: 3.0 → 4.0"):
        train(config(config_file, minutes=4.0), run, begin="resume")
    (run / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan.json is damaged"):
        train(config(config_file, minutes=3.0), run, begin="resume")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill", ["retnet.train.run_dir:write_json:2", "retnet.train.progress:TrainingProgress.planned:1"]
)
def test_killed_in_earnest(kill, config_file, forks, tmp_path, monkeypatch):
    """Planned by the clock of this machine; killed right before the plan is written, or right after it."""
    run = tmp_path / "run"
    words = [config_file, run, "--train.minutes", "0.02", "--train.steps", "2000"]

    def drive(*more):
        return forks.run([*words, *more], tmp_path, call="tests.train.driver:main")

    assert drive("--kill", kill).returncode == -signal.SIGKILL
    assert drive("--resume").returncode == 0
    plan = plan_of(run)
    monkeypatch.setattr(Pace, "ready", lambda self, c: self._steps >= plan["after"])
    monkeypatch.setattr(Pace, "plan", lambda self, step, c: fitted(c, plan["steps"], step))
    train(config(config_file, minutes=0.02, steps=2000), tmp_path / "reference")
    assert_identical(run, tmp_path / "reference")
