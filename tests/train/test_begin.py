"""Beginning a run: new or there already, what cannot be, and that nothing is left of one that never began."""

import re
import shutil
from dataclasses import replace

import pytest
from rich.console import Console

from retnet.settings import UserError
from retnet.train.progress import TrainingProgress
from retnet.train.trainer import train
from tests.helpers.fast import few_fast
from tests.train.runs import Fails, tiny


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
        for inside in ("checkpoints", "checkpoints/step-00000004", "checkpoints/best", "config.toml"):
            with pytest.raises(UserError, match=r"lies in the run \S*run; --run-dir \S*run names that"):
                train(tiny(config_file), tmp_path / "run" / inside, begin="resume")

    @pytest.mark.parametrize("begin", few_fast(["new", "resume", "resume-or-start"], "resume-or-start"))
    def test_checkpoints_without_a_configuration_are_not_gone_on_from(self, begin, config_file, tmp_path):
        train(tiny(config_file), tmp_path / "run")
        (tmp_path / "run/config.toml").unlink()
        with pytest.raises(UserError, match=r"run has checkpoints and no config.toml"):
            train(tiny(config_file, steps=6), tmp_path / "run", begin=begin)
        assert train(tiny(config_file, start_from=str(tmp_path / "run")), tmp_path / "other").finished

    def test_a_directory_that_vanishes(self, config_file, tmp_path):
        class Removes(TrainingProgress):
            def step(self, step, loss, rate, left=None):
                if step == 2:
                    shutil.rmtree(tmp_path / "run")

        with pytest.raises(UserError, match=r"run is gone, moved or removed; step 3 is not saved"):
            train(tiny(config_file), tmp_path / "run", progress=Removes(Console(quiet=True)))
        assert not (tmp_path / "run").exists()


class TestNothingBegun:
    """A run that ends before its first step leaves nothing; one that made a step stays, to be resumed."""

    @pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError(), KeyboardInterrupt()])
    def test_before_the_first_step(self, error, config_file, tmp_path, monkeypatch):
        def fail(self):
            raise error

        monkeypatch.setattr("retnet.train.trainer._Trainer._learn", fail)
        with pytest.raises(type(error)):
            train(tiny(config_file), tmp_path / "deep" / "run")
        assert not (tmp_path / "deep").exists()

    def test_what_others_have_there_stays(self, config_file, tmp_path, monkeypatch):
        (tmp_path / "run" / "notes").mkdir(parents=True)
        (tmp_path / "run" / "notes.txt").write_text("mine")

        def learn(self):
            (tmp_path / "run" / "another").mkdir()  # while it is being prepared
            raise ZeroDivisionError

        monkeypatch.setattr("retnet.train.trainer._Trainer._learn", learn)
        with pytest.raises(ZeroDivisionError):
            train(tiny(config_file), tmp_path / "run")
        left = sorted(path.name for path in (tmp_path / "run").iterdir())
        assert left == ["another", "notes", "notes.txt"]

    def test_a_run_that_was_begun_stays(self, config_file, tmp_path, monkeypatch):
        with pytest.raises(RuntimeError):
            train(tiny(config_file), tmp_path / "run", progress=Fails(1))
        monkeypatch.setattr("retnet.train.trainer._Trainer._learn", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tiny(config_file), tmp_path / "run", begin="resume")
        assert (tmp_path / "run/config.toml").is_file()

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("batch_size", 10**12, r"a pass of train.batch_size 1000000000000 rows"),
            ("seq_len", 10**12, r"of train.seq_len 1000000000000 "),
            ("accumulate", 10**12, r"the tokens of train.accumulate 1000000000000 passes"),
            ("batch_size", 1 << 62, r"training needs .* GiB at the least, and cpu has"),
            ("device", "meta", r"device 'meta' cannot be used here: it has shapes, and no numbers"),
            ("device", "banana", r"device 'banana' cannot be used here"),
        ],
    )
    def test_what_cannot_be_is_said_before(self, name, value, message, config_file, tmp_path):
        with pytest.raises(UserError, match=message):
            train(tiny(config_file, **{name: value}), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_a_model_that_cannot_fit(self, config_file, tmp_path):
        run = tiny(config_file)
        run = replace(run, model=replace(run.model, d_model=1 << 20, ffn_dim=1 << 20))
        with pytest.raises(UserError, match=r"a model of [\d,]+ parameters takes"):
            train(run, tmp_path / "run")
        sizes = {}
        for optimizer, ema in (("adamw", 0.0), ("muon", 0.0), ("muon", 0.9)):
            changed = replace(run, train=replace(run.train, optimizer=optimizer, ema=ema))
            with pytest.raises(UserError, match="training needs") as error:
                train(changed, tmp_path / "run")
            sizes[optimizer, ema] = re.search(r"parameters takes ([\d,.]+)", str(error.value))[1].replace(
                ",", ""
            )
        adamw, muon, averaged = map(float, sizes.values())
        assert muon / adamw == pytest.approx(12 / 16)
        assert averaged == pytest.approx(adamw)
        with pytest.raises(
            UserError, match=r"num_layers is 1000000000; it must be at least 1 and at most 10000"
        ):
            replace(run.model, num_layers=10**9)
