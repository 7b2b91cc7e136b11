"""Runs: one owner, beginning and going on, starting from weights that exist, checkpoints that are whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from retnet.convert import convert
from retnet.model import ModelConfig
from retnet.settings import UserError, load
from retnet.train.config import RunConfig
from retnet.train.lock import LOCK, sole_owner
from retnet.train.progress import TrainingProgress
from retnet.train.trainer import train

HOLD = """
import sys, time
from pathlib import Path
from retnet.train.lock import sole_owner
with sole_owner(Path(sys.argv[1])):
    if "fork" in sys.argv:
        import os
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def tiny(config_file, **changes) -> RunConfig:
    run = load(RunConfig, config_file)
    return replace(run, train=replace(run.train, **({"steps": 4} | changes)))


def weights(run_dir: Path, name: str | None = None) -> dict[str, torch.Tensor]:
    name = name or (run_dir / "checkpoints/last").read_text().strip()
    return load_file(run_dir / "checkpoints" / name / "model.safetensors")


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def hold(path: Path, *words: str) -> subprocess.Popen:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), *words], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    return holder


class TestOwner:
    def test_a_second_process_is_refused_and_told_who_has_it(self, config_file, tmp_path):
        with hold(tmp_path / "run") as holder:
            with pytest.raises(UserError, match=rf"run is in use by process {holder.pid} on \S+ since \d"):
                train(tiny(config_file), tmp_path / "run")
            holder.kill()
        assert train(tiny(config_file), tmp_path / "run").finished
        assert not (tmp_path / "run" / LOCK).exists()

    def test_a_killed_owner_leaves_nothing_locked_even_where_a_worker_outlives_it(self, tmp_path):
        with hold(tmp_path / "run", "fork") as holder:
            os.kill(holder.pid, signal.SIGKILL)
        with sole_owner(tmp_path / "run"):
            said = json.loads((tmp_path / "run" / LOCK).read_text())
        assert said["process"] == os.getpid()

    def test_the_same_process_is_refused_too_and_the_owner_keeps_it(self, tmp_path):
        with sole_owner(tmp_path / "run"):
            for _ in range(2):
                with (
                    pytest.raises(UserError, match=f"in use by process {os.getpid()} "),
                    sole_owner(tmp_path / "run"),
                ):
                    pass
            script = "import sys; from pathlib import Path; from retnet.train.lock import sole_owner\n"
            script += "with sole_owner(Path(sys.argv[1])): pass"
            done = subprocess.run(
                [sys.executable, "-c", script, tmp_path / "run"], capture_output=True, text=True
            )
            assert "is in use by" in done.stderr
        assert not (tmp_path / "run").exists()  # nothing was begun

    def test_a_directory_that_cannot_be_made(self, config_file, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot write the run directory"):
            train(tiny(config_file), tmp_path / "file" / "run")


class TestBegin:
    def test_resuming_nothing_is_an_error(self, config_file, tmp_path):
        with pytest.raises(UserError, match=r"there is no run in .* to resume; leave out --resume"):
            train(tiny(config_file), tmp_path / "run", begin="resume")
        assert not (tmp_path / "run").exists()

    def test_either(self, config_file, tmp_path):
        for _ in range(2):
            outcome = train(tiny(config_file), tmp_path / "run", begin="resume-or-start")
            assert outcome.finished

    def test_a_checkpoint_of_no_run(self, config_file, tmp_path):
        with pytest.raises(UserError, match=r"--checkpoint step-1 is of a run that is resumed"):
            train(tiny(config_file), tmp_path / "run", begin="resume-or-start", checkpoint="step-1")

    def test_a_place_inside_a_run(self, config_file, tmp_path):
        train(tiny(config_file), tmp_path / "run")
        for inside in ("checkpoints", "checkpoints/step-00000004"):
            with pytest.raises(UserError, match=r"lies in the run \S*run; --run-dir \S*run names that"):
                train(tiny(config_file), tmp_path / "run" / inside, begin="resume")

    def test_a_directory_that_vanishes(self, config_file, tmp_path):
        class Removes(TrainingProgress):
            def step(self, step, loss, rate, left=None):
                if step == 2:
                    shutil.rmtree(tmp_path / "run")

        with pytest.raises(UserError, match=r"run has vanished; nothing of it is left, step 3 is not saved"):
            train(tiny(config_file), tmp_path / "run", progress=Removes(Console(quiet=True)))
        assert not (tmp_path / "run").exists()


class TestGoingOn:
    def test_a_finished_run_is_made_longer_and_says_so(self, config_file, tmp_path):
        constant = {"schedule": "constant", "checkpoint_every": 4}
        train(tiny(config_file, steps=4, **constant), tmp_path / "run")
        outcome = train(tiny(config_file, steps=8, **constant), tmp_path / "run", begin="resume")
        assert (outcome.step, outcome.finished) == (8, True)
        train(tiny(config_file, steps=8, **constant), tmp_path / "whole")
        assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))  # the schedule knows no length
        assert load(RunConfig, tmp_path / "run/config.toml").train.steps == 8
        (line,) = map(json.loads, (tmp_path / "run/changes.jsonl").read_text().splitlines())
        assert (line["step"], line["changes"]) == (4, ["train.steps: 4 → 8"])

    def test_a_run_cannot_be_made_shorter_than_it_is(self, config_file, tmp_path):
        train(tiny(config_file), tmp_path / "run")
        with pytest.raises(UserError, match=r"has made 4 steps already; train.steps 3 is less"):
            train(tiny(config_file, steps=3), tmp_path / "run", begin="resume")

    def test_what_is_learned_cannot_change(self, config_file, tmp_path):
        train(tiny(config_file), tmp_path / "run")
        with pytest.raises(
            UserError, match=r"train.learning_rate: 0.01 → 0.5.*; --init \S+ begins it with these weights"
        ):
            train(tiny(config_file, learning_rate=0.5, steps=9), tmp_path / "run", begin="resume")
        assert load(RunConfig, tmp_path / "run/config.toml").train.steps == 4

    def test_the_same_corpus_by_another_path(self, config_file, tmp_path):
        run = tiny(config_file)
        train(run, tmp_path / "run")
        other = tmp_path / "linked"
        other.symlink_to(run.data.corpus)
        run = replace(run, data=replace(run.data, corpus=str(other), cache=str(tmp_path / "cache")))
        assert train(run, tmp_path / "run", begin="resume").finished

    def test_a_copy_that_somebody_keeps_beside_the_checkpoints(self, config_file, tmp_path):
        constant = {"schedule": "constant"}
        train(tiny(config_file, **constant), tmp_path / "run")
        home = tmp_path / "run" / "checkpoints"
        shutil.copytree(home / "step-00000004", home / "step-00000004.bak")
        shutil.copytree(home / "step-00000004", home / "step-mine")
        assert train(tiny(config_file, steps=6, **constant), tmp_path / "run", begin="resume").step == 6
        assert (home / "step-00000004.bak").is_dir()


class TestInit:
    def test_from_a_run_with_another_learning_rate(self, config_file, tmp_path):
        train(tiny(config_file), tmp_path / "old")
        run = tiny(
            config_file, start_from=str(tmp_path / "old"), learning_rate=0.0, weight_decay=0.0, steps=1
        )
        train(run, tmp_path / "new")
        assert equal(
            weights(tmp_path / "new"), weights(tmp_path / "old", "step-00000004")
        )  # its best is its last
        origin = json.loads((tmp_path / "new/origin.json").read_text())
        assert (origin["kind"], origin["source"]) == ("run", str(tmp_path / "old"))
        assert "model.safetensors" in origin["sha256"]

    def test_from_a_folder_without_a_model_table(self, config_file, tmp_path):
        train(tiny(config_file), tmp_path / "old")
        convert(tmp_path / "old", tmp_path / "folder", to="hf")
        run = replace(tiny(config_file, start_from=str(tmp_path / "folder"), steps=2), model=ModelConfig())
        assert train(run, tmp_path / "new").finished
        assert load(RunConfig, tmp_path / "new/config.toml").model.d_model == 16

    def test_resumed_without_the_source(self, config_file, tmp_path):
        train(tiny(config_file), tmp_path / "old")
        train(tiny(config_file, start_from=str(tmp_path / "old")), tmp_path / "new")
        (tmp_path / "old").rename(tmp_path / "gone")
        run = tiny(config_file, steps=6)
        assert train(run, tmp_path / "new", begin="resume").step == 6

    def test_another_model_is_refused_by_name(self, config_file, tmp_path):
        train(tiny(config_file), tmp_path / "old")
        run = tiny(config_file, start_from=str(tmp_path / "old"))
        run = replace(run, model=replace(run.model, d_model=32))
        with pytest.raises(UserError, match=r"holds another model .*: model.d_model 32, there 16"):
            train(run, tmp_path / "new")

    def test_nothing_there(self, config_file, tmp_path):
        with pytest.raises(UserError, match=r"there is no"):
            train(tiny(config_file, start_from=str(tmp_path / "nowhere")), tmp_path / "new")
        assert not (tmp_path / "new").exists()


class TestWhole:
    def test_a_damaged_newest_checkpoint_names_the_one_to_go_on_from(self, config_file, tmp_path):
        run = tiny(config_file, steps=6, keep=5)
        train(run, tmp_path / "run")
        want = weights(tmp_path / "run")
        newest = tmp_path / "run/checkpoints/step-00000006/optimizer.safetensors"
        newest.write_bytes(newest.read_bytes()[:-9])
        with pytest.raises(
            UserError, match=r"step-00000004 is whole: --resume --checkpoint step-00000004 goes on"
        ):
            train(run, tmp_path / "run", begin="resume")
        assert train(run, tmp_path / "run", begin="resume", checkpoint="step-00000004").finished
        assert equal(weights(tmp_path / "run"), want)
        assert (tmp_path / "run/checkpoints/aside/step-00000006").is_dir()
        with pytest.raises(UserError, match="no checkpoint 'step-00000005'"):
            train(run, tmp_path / "run", begin="resume", checkpoint="step-00000005")

    @pytest.mark.parametrize("where", ["weight", "memory"])
    def test_what_is_not_finite_is_never_saved(self, where, config_file, tmp_path, monkeypatch):
        plain = torch.optim.AdamW.step

        def broken(self, *args, **options):
            plain(self, *args, **options)
            parameter = self.param_groups[0]["params"][1]
            target = parameter if where == "weight" else self.state[parameter]["exp_avg_sq"]
            if self.state[parameter]["step"] == 3:
                target.data.view(-1)[5] = float("nan")

        monkeypatch.setattr(torch.optim.AdamW, "step", broken)
        name = r"blocks.0\S+weight" + ("" if where == "weight" else "/exp_avg_sq")
        with pytest.raises(UserError, match=rf"{name} is not finite after step 3, so nothing was saved"):
            train(tiny(config_file, checkpoint_every=1), tmp_path / "run")
        assert (tmp_path / "run/checkpoints/last").read_text() == "step-00000002\n"
