"""One owner of a run: who has the lock, who is refused, and what is left when it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from retnet.lock import LOCK, sole_owner
from retnet.settings import UserError
from retnet.train.progress import TrainingProgress
from retnet.train.trainer import train
from tests.train.runs import tiny

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

            def flush(self):
                pass

            def close(self):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", lambda path, purge_step: Board())
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
