"""Runs at a glance, as they really lie about: half-written, damaged, in use, of other versions, among other folders."""

import json
import os
import socket
import subprocess
import sys

import pytest

from retnet.lock import LOCK, holder, sole_owner
from retnet.train.run_summary import differing, find_runs, is_run, read_metrics, summarise_run

CONFIG = "[model.mixer]\nname = 'retention'\n[train]\nsteps = 40\nlearning_rate = 0.01\n"


def make_run(path, *, steps=40, done=40, config=None, tail=""):
    """A run directory without a model: its configuration, metrics of every 10th step, a checkpoint."""
    home = path / f"checkpoints/step-{done:08d}"
    home.mkdir(parents=True)
    (home / "model.safetensors").write_bytes(b"weights")
    (home / "manifest.json").write_text(
        json.dumps({"files": {"model.safetensors": {"bytes": 7, "sha256": ""}}})
    )
    (path / "config.toml").write_text(config or CONFIG.replace("40", str(steps)))
    lines = []
    for step in range(10, done + 1, 10):
        line = {"step": step, "seconds": step / 2, "loss": 50 / step, "tokens_per_s": 1000.0 + step}
        lines += [
            line | {"skipped_steps": 1},
            {"step": step, "validation_bits_per_byte": 2 + abs(step - 20) / 10},
        ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def test_what_is_known_of_a_finished_run(tmp_path):
    run = summarise_run(make_run(tmp_path / "run"))
    assert (run.state, run.note, run.step, run.steps) == ("finished", "", 40, 40)
    assert (run.loss, run.bits, run.tokens_per_s, run.seconds, run.skipped) == (1.25, 2.0, 1025.0, 20.0, 1)
    assert run.settings["model.mixer.name"] == "retention"


@pytest.mark.parametrize(
    "tail", ['{"step": 50, "lo', "\x00\x00", "[1]\n3\n", '{"step": null}\n', '{"step": 50, "loss": "x"}\n']
)
def test_lines_that_are_cut_or_foreign_are_passed_by(tail, tmp_path):
    run = summarise_run(make_run(tmp_path / "run", tail=tail))
    assert (run.step, run.loss) == (40, 1.25)
    assert len(read_metrics(tmp_path / "run")) == 8


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.toml").write_text(CONFIG)
    run = summarise_run(tmp_path)
    assert (run.state, run.step, run.loss, run.bits, run.seconds, run.left) == (
        "stopped",
        0,
        None,
        None,
        None,
        None,
    )
    assert read_metrics(tmp_path) == []


def test_a_run_that_stopped(tmp_path):
    run = summarise_run(make_run(tmp_path / "run", done=30))
    assert (run.state, run.step, run.steps, run.left) == ("stopped", 30, 40, 5.0)


def test_how_long_a_run_takes_that_an_older_version_began(tmp_path):
    """Its first lines have no seconds, and a call began them anew: the steps made since say how long one takes."""
    path = make_run(tmp_path / "run", steps=1000, done=30)
    lines = [{"step": step, "loss": 1.0, "tokens_per_s": 1.0} for step in range(10, 410, 10)]
    lines += [
        {"step": step, "loss": 1.0, "tokens_per_s": 1.0, "seconds": step - 400}
        for step in range(410, 450, 10)
    ]
    lines += [
        {"step": step, "loss": 1.0, "tokens_per_s": 1.0, "seconds": step - 440}
        for step in range(450, 500, 10)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert summarise_run(path).left == 1000 - 490


class TestDamage:
    def test_no_toml(self, tmp_path):
        run = summarise_run(make_run(tmp_path / "run", config="[train\n"))
        assert run.state == "damaged"
        assert run.note.startswith("config.toml cannot be read: Expected")
        assert (run.step, run.loss) == (40, 1.25)  # all the same

    def test_bytes_that_are_no_text(self, tmp_path):
        path = make_run(tmp_path / "run")
        (path / "config.toml").write_bytes(b"\xff\xfe")
        assert summarise_run(path).state == "damaged"

    @pytest.mark.parametrize("steps", ["", "steps = 'x'"])
    def test_another_programs_settings(self, steps, tmp_path):
        run = summarise_run(make_run(tmp_path / "run", config=f"[train]\n{steps}\n"))
        assert (run.state, run.note, run.steps) == ("damaged", "config.toml has no train.steps", None)

    def test_a_checkpoint_cut_short(self, tmp_path):
        path = make_run(tmp_path / "run")
        (path / "checkpoints/step-00000040/model.safetensors").write_bytes(b"weigh")
        assert summarise_run(path).note == "step-00000040/model.safetensors has another size than was written"
        (path / "checkpoints/step-00000040/manifest.json").unlink()
        assert summarise_run(path).note == "step-00000040 is not complete"

    def test_a_partial_checkpoint_is_none(self, tmp_path):
        """What an interrupted write left is no damage: --resume removes it."""
        path = make_run(tmp_path / "run")
        (path / "checkpoints/.step-00000050.partial").mkdir()
        assert summarise_run(path).state == "finished"


class TestRunning:
    def test_where_the_system_is_not_asked(self, tmp_path, monkeypatch):
        """Off Linux the lock file alone says who has a run; a process of this machine that is dead has none."""
        path = make_run(tmp_path / "run", done=30)
        monkeypatch.setattr("retnet.lock._ASKED", False)
        for process, host, state in (
            (os.getpid(), socket.gethostname(), "running"),
            (os.getpid(), "elsewhere", "running"),
            ((1 << 31) - 1, socket.gethostname(), "stopped"),
            ("x", socket.gethostname(), "stopped"),
        ):
            owner = {"process": process, "host": host, "since": "2026-01-01 00:00:00"}
            (path / LOCK).write_text(json.dumps(owner))
            assert summarise_run(path).state == state
        (path / LOCK).write_text("{")
        assert summarise_run(path).state == "stopped"

    def test_by_this_process(self, tmp_path):
        path = make_run(tmp_path / "run", done=30)
        with sole_owner(path):
            run = summarise_run(path)
            assert run.state == "running"
            assert run.note.startswith(f"process {os.getpid()} on ")
            assert self.refused(path)  # looking has not given the lock away
        assert summarise_run(path).state == "stopped"

    def test_by_another_until_it_dies(self, tmp_path):
        path = make_run(tmp_path / "run", done=30)
        code = (
            "import sys; from pathlib import Path; from retnet.lock import sole_owner\n"
            "with sole_owner(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", code, path], text=True, **pipes) as other:
            assert other.stdout.readline() == "held\n"
            assert f"process {other.pid} on" in summarise_run(path).note
            other.kill()
        assert (path / LOCK).exists()
        assert summarise_run(path).state == "stopped"

    def test_nobody_is_kept_out_by_a_look(self, tmp_path):
        path = make_run(tmp_path / "run")
        (path / LOCK).write_text("")
        assert holder(path) == ""
        assert not self.refused(path)

    def refused(self, path):
        code = (
            "import sys; from pathlib import Path; from retnet.lock import sole_owner\n"
            "with sole_owner(Path(sys.argv[1])): pass"
        )
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
        return "is in use by" in done.stderr


def test_runs_are_found_among_other_folders(tmp_path):
    wanted = [make_run(tmp_path / name) for name in ("a", "b/c", "study/jobs/x/run")]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.toml").write_text("x = 1\n")
    make_run(tmp_path / ".hidden/run")
    make_run(tmp_path / "a/checkpoints/aside/run")  # inside of one: a checkpoint is no run
    (tmp_path / "b/up").symlink_to(tmp_path)  # round in a circle
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    assert sorted(find_runs(tmp_path)) == wanted
    assert not is_run(tmp_path / "foreign")


def test_settings_that_differ(tmp_path):
    runs = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", config=CONFIG.replace("0.01", "0.02") + "seed = 0\nclip = 1.0\n"),
        make_run(tmp_path / "c", config="damaged ["),
    ]
    found = differing([summarise_run(path) for path in runs], {"train.seed": 0})
    assert found == {"train.learning_rate": [0.01, 0.02, None], "train.clip": [None, 1.0, None]}


def test_metrics_are_read_anew_when_they_grew(tmp_path):
    path = make_run(tmp_path / "run", done=30)
    assert summarise_run(path).step == 30
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 33, "loss": 1.0, "tokens_per_s": 1.0}) + "\n")
    run = summarise_run(path)
    assert (run.step, run.loss, run.state) == (33, 1.0, "stopped")
