"""Runs: one owner, beginning and going on, starting from weights that exist, checkpoints that are whole."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from retnet.convert import convert
from retnet.data import Tokenizer
from retnet.engine import open_run
from retnet.lock import LOCK, sole_owner
from retnet.model import ModelConfig
from retnet.model.checkpoint import model_files, write_checkpoint
from retnet.model.runs import find_checkpoint
from retnet.settings import UserError, load
from retnet.train import run_dir
from retnet.train.config import RunConfig
from retnet.train.progress import TrainingProgress
from retnet.train.trainer import train

HOLD = """
import sys, time
from pathlib import Path
from retnet.lock import sole_owner
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
            script = "import sys; from pathlib import Path; from retnet.lock import sole_owner\n"
            script += "with sole_owner(Path(sys.argv[1])): pass"
            done = subprocess.run(
                [sys.executable, "-c", script, tmp_path / "run"], capture_output=True, text=True
            )
            assert "is in use by" in done.stderr
        assert not (tmp_path / "run").exists()  # nothing was begun

    def test_of_threads_that_begin_at_once_one_has_it(self, tmp_path):
        start, done, held, refused = threading.Barrier(8), threading.Event(), [], []

        def begin():
            start.wait()
            try:
                with sole_owner(tmp_path / "run"):
                    held.append(threading.get_ident())
                    done.wait(10)
            except UserError as error:
                refused.append(str(error))
            if len(refused) == 7:
                done.set()

        threads = [threading.Thread(target=begin) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(held), len(refused)) == (1, 7)
        assert all(f"in use by process {os.getpid()} " in said for said in refused)

    def test_a_child_of_the_owner_is_refused_and_leaves_it_alone(self, tmp_path):
        script = """
import os, sys
from pathlib import Path
from retnet.errors import UserError
from retnet.lock import LOCK, sole_owner
run = Path(sys.argv[1])
owner = os.getpid()
def child(act):
    number = os.fork()
    if not number:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
def refused():
    try:
        with sole_owner(run):
            pass
    except UserError as error:
        assert f"in use by process {owner} " in str(error), error
    else:
        raise AssertionError
def leaves():
    holder.__exit__(None, None, None)
def takes():
    with sole_owner(run):
        pass
holder = sole_owner(run)
holder.__enter__()
assert child(refused) == 0
assert child(leaves) == 0
assert (run / LOCK).is_file()
number = os.fork()
if not number:  # lives on behind its parent's end of the lock
    os.read(0, 1)
    refused_by = child(takes)
    os._exit(refused_by)
holder.__exit__(None, None, None)
os.close(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]))
"""
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path / "run"], input="x", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def test_a_lock_that_another_machine_left_is_taken_and_said(self, tmp_path, caplog):
        """Its process died, or the file system has no locks between machines: only people can know."""
        owner = {"process": 17, "host": "far-away", "since": "2026-01-02 03:04:05"}
        (tmp_path / LOCK).write_text(json.dumps(owner))
        with sole_owner(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
        assert (
            "run.lock was left by process 17 on far-away since 2026-01-02 03:04:05, which has died"
            in caplog.text
        )

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"process": 3}', "\0\0", "caf\xe9"])
    def test_a_lock_file_that_says_nothing(self, content, tmp_path, caplog):
        (tmp_path / LOCK).write_bytes(content.encode("latin-1"))
        with sole_owner(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
        assert not caplog.text

    def test_a_folder_that_was_there_stays(self, tmp_path):
        (tmp_path / "run").mkdir()
        with sole_owner(tmp_path / "run"):
            pass
        assert list((tmp_path / "run").iterdir()) == []

    @pytest.mark.parametrize("how", ["moved", "lock removed"])
    def test_a_run_that_another_process_got_into(self, how, config_file, tmp_path):
        """Nothing is written into what is another's now."""

        class Meddles(TrainingProgress):
            def step(self, step, loss, rate, left=None):
                if step != 2:
                    return
                if how == "moved":
                    (tmp_path / "run").rename(tmp_path / "moved")
                    shutil.copytree(tmp_path / "moved", tmp_path / "run")
                else:
                    (tmp_path / "run" / LOCK).unlink()
                    other.append(hold(tmp_path / "run"))

        other: list[subprocess.Popen] = []
        with pytest.raises(
            UserError, match=r"is another one now, or in use by another .*; step 3 is not saved"
        ):
            train(
                tiny(config_file, checkpoint_every=3), tmp_path / "run", progress=Meddles(Console(quiet=True))
            )
        for holder in other:
            holder.kill()
            holder.communicate()
        assert not list((tmp_path / "run" / "checkpoints").iterdir())

    def test_a_tensorboard_that_cannot_be_ended(self, config_file, tmp_path, monkeypatch):
        """What it keeps back until the end is not lost in silence."""

        class Board:
            def add_scalar(self, name, value, step):
                pass

            def close(self):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(run_dir, "_board", lambda path, step: Board())
        with pytest.raises(
            UserError, match=r"run/tensorboard: No space left on device; step-00000004 is whole"
        ):
            train(tiny(config_file, tensorboard=True), tmp_path / "run")

    def test_training_in_a_thread(self, config_file, tmp_path):
        found = []
        thread = threading.Thread(target=lambda: found.append(train(tiny(config_file), tmp_path / "run")))
        thread.start()
        thread.join()
        assert found[0].finished

    def test_a_link_that_leads_nowhere(self, config_file, tmp_path):
        (tmp_path / "link").symlink_to("gone")
        for place in ("link", "link/run"):
            with pytest.raises(UserError, match=r"cannot write the run directory .*link to gone"):
                train(tiny(config_file), tmp_path / place)

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

        with pytest.raises(UserError, match=r"run is gone, moved or removed; step 3 is not saved"):
            train(tiny(config_file), tmp_path / "run", progress=Removes(Console(quiet=True)))
        assert not (tmp_path / "run").exists()


def other_text(config_file, tmp_path) -> RunConfig:
    other = tmp_path / "other"
    shutil.copytree(load(RunConfig, config_file).data.corpus, other)
    (other / "03.txt").write_text("another text " * 50)
    run = tiny(config_file)
    return replace(run, data=replace(run.data, corpus=str(other)))


class Fails(TrainingProgress):
    """Ends training at a step as something that nobody expected would."""

    def __init__(self, at):
        super().__init__(Console(quiet=True))
        self.at = at

    def step(self, step, loss, rate, left=None):
        if step == self.at:
            raise RuntimeError("a bug")


class TestSameData:
    """A run goes on with the tokens that it began with, and what is not the same is named."""

    def begun(self, run, path):
        """A run that made a step, and has no checkpoint yet."""
        with pytest.raises(RuntimeError, match="a bug"):
            train(run, path, progress=Fails(1))
        assert not list((path / "checkpoints").iterdir())

    @pytest.mark.parametrize("saved", [False, True])
    def test_another_corpus(self, saved, config_file, tmp_path):
        run = tiny(config_file)
        train(run, tmp_path / "run") if saved else self.begun(run, tmp_path / "run")
        other = other_text(config_file, tmp_path)
        before = (tmp_path / "run/data.json").read_text()
        with pytest.raises(
            UserError, match=r"^the corpus has changed since \S+run was begun, so the run cannot"
        ):
            train(other, tmp_path / "run", begin="resume")
        assert (tmp_path / "run/data.json").read_text() == before
        assert train(run, tmp_path / "run", begin="resume").finished

    def test_another_tokenizer(self, config_file, tmp_path):
        Tokenizer.train(["a b c"], 257).save(tmp_path / "tokenizer.json")
        run = tiny(config_file)
        run = replace(run, data=replace(run.data, tokenizer=str(tmp_path / "tokenizer.json")))
        self.begun(run, tmp_path / "run")
        Tokenizer.load("bytes").save(tmp_path / "tokenizer.json")
        with pytest.raises(UserError, match=r"^the tokenizer has changed since"):
            train(run, tmp_path / "run", begin="resume")

    def test_another_validation_text(self, config_file, tmp_path):
        (tmp_path / "v.txt").write_text("some words " * 50)
        run = tiny(config_file)
        run = replace(run, data=replace(run.data, validation=str(tmp_path / "v.txt")))
        self.begun(run, tmp_path / "run")
        (tmp_path / "v.txt").write_text("other words " * 50)
        with pytest.raises(UserError, match=r"^the validation text has changed since"):
            train(run, tmp_path / "run", begin="resume")

    def test_a_run_of_an_older_version_is_known_by_its_checkpoint(self, config_file, tmp_path):
        run = tiny(config_file)
        train(run, tmp_path / "run")
        said = (tmp_path / "run/data.json").read_text()
        (tmp_path / "run/data.json").unlink()
        with pytest.raises(UserError, match=r"^the corpus has changed since"):
            train(other_text(config_file, tmp_path), tmp_path / "run", begin="resume")
        assert train(run, tmp_path / "run", begin="resume").finished
        assert (tmp_path / "run/data.json").read_text() == said

    def test_a_damaged_record(self, config_file, tmp_path):
        train(tiny(config_file), tmp_path / "run")
        (tmp_path / "run/data.json").write_text('{"train": 3}')
        with pytest.raises(UserError, match=r"cannot read \S+data.json: .*; restore it, or remove it"):
            train(tiny(config_file), tmp_path / "run", begin="resume")


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

    def test_a_call_that_cannot_go_on_changes_nothing(self, config_file, tmp_path):
        run = tiny(config_file)
        train(run, tmp_path / "run")
        other = tmp_path / "other.txt"
        other.write_text("another text " * 500)
        changed = replace(run, data=replace(run.data, corpus=str(other)), train=replace(run.train, steps=9))
        with pytest.raises(UserError, match="the corpus has changed since"):
            train(changed, tmp_path / "run", begin="resume")
        assert load(RunConfig, tmp_path / "run/config.toml").train.steps == 4
        assert not (tmp_path / "run/changes.jsonl").exists()

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

    def test_weights_that_a_resumed_run_would_not_read_are_refused(self, config_file, tmp_path):
        train(tiny(config_file), tmp_path / "old")
        other = tiny(config_file, start_from=str(tmp_path / "old"), steps=6)
        with pytest.raises(
            UserError, match=r"old was begun with fresh weights .* --init \S+old would not be read"
        ):
            train(other, tmp_path / "old", begin="resume-or-start")
        train(other, tmp_path / "new")
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "old")
        same = tiny(config_file, start_from=str(link), steps=7)
        assert train(same, tmp_path / "new", begin="resume-or-start").step == 7

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

    def test_weights_that_broke_are_named_instead_of_documents(self, config_file, tmp_path, monkeypatch):
        plain = torch.optim.AdamW.step

        def broken(self, *args, **options):
            plain(self, *args, **options)
            parameter = self.param_groups[0]["params"][1]
            if self.state[parameter]["step"] == 2:
                parameter.data.view(-1)[5] = float("inf")

        monkeypatch.setattr(torch.optim.AdamW, "step", broken)
        with pytest.raises(
            UserError, match=r"at step 3, since blocks.0\S+weight is not finite after step 2"
        ) as told:
            train(tiny(config_file, checkpoint_every=9, eval_every=0), tmp_path / "run")
        assert "documents" not in str(told.value)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_checkpoint_that_somebody_made_of_such_numbers_is_not_opened(
        self, value, config_file, tmp_path
    ):
        run = tiny(config_file)
        train(run, tmp_path / "run")
        model = open_run(tmp_path / "run").model
        with torch.no_grad():
            model.blocks[0].mixer_norm.weight[3] = value
        path = find_checkpoint(tmp_path / "run")[0]
        kept = [name for name in os.listdir(path) if name not in ("manifest.json", *model_files(model))]
        kept_files = {
            name: partial(lambda name, to: shutil.copy(tmp_path / "kept" / name, to), name) for name in kept
        }
        shutil.copytree(path, tmp_path / "kept")
        write_checkpoint(path, {**model_files(model), **kept_files})
        for opening in (
            lambda: open_run(tmp_path / "run"),
            lambda: train(replace(run, train=replace(run.train, steps=6)), tmp_path / "run", begin="resume"),
            lambda: convert(tmp_path / "run", tmp_path / "folder"),
            lambda: train(tiny(config_file, start_from=str(tmp_path / "run")), tmp_path / "new"),
        ):
            with pytest.raises(
                UserError, match=r"blocks.0.mixer_norm.weight has (numbers that are not finite|1 values)"
            ):
                opening()
