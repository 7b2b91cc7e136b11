"""What a GPU day survives: parts that die, hang, or cannot be written."""

import json
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path
from unittest.mock import ANY

import psutil
import pytest
import torch

from retnet.settings import UserError
from tests.helpers.fast import few_fast
from tests.helpers.gpu_day import gone, part
from tools.gpu_day import plan, runner, step
from tools.gpu_day.notebook import Notebook
from tools.gpu_day.runner import Day

ROOT = Path(__file__).parents[2]
BARE = [sys.executable, "-I", "-S"]  # nothing is installed for it, so it begins in a fifth of the time
pytest.importorskip("triton")


class TestRunner:
    """With steps that are little scripts instead of measurements."""

    @pytest.fixture
    def day(self, tmp_path, monkeypatch):
        monkeypatch.setattr(plan, "PARTS", [part("ops", name, 1, 1) for name in "abc"])
        monkeypatch.setattr(plan, "PAGE", 1.0)
        monkeypatch.setattr(runner, "GLANCE", 0.02)
        monkeypatch.setattr(plan, "AT_LEAST", 1.0)
        script = tmp_path / "step.py"

        def make(body, seconds=60.0):
            script.write_text(
                "import json, os, sys, time\n"
                f"file = {str(tmp_path / 'ops.json')!r}\n"
                "parts = json.load(open(file))['parts'] if os.path.exists(file) else {}\n"
                "def put(name, **state):\n"
                "    parts[name] = {'began': time.time(), 'seconds': 0.0, **state}\n"
                "    record = {'configuration': {'rehearsal': False}, 'parts': parts}\n"
                "    json.dump(record, open(file + '.new', 'w'))\n"
                "    os.replace(file + '.new', file)\n"
                f"for name in sys.argv[1:]:\n    put(name, state='begun')\n{body}\n"
                "    put(name, state='done', found={'name': name})\n"
            )
            monkeypatch.setattr(Day, "_command", lambda self, step, names: [*BARE, str(script), *names])
            self.said = []
            return Day(tmp_path, False, seconds, ["ops"], self.said.append)

        return make

    def states(self, day):
        return {name: p["state"] for name, p in Notebook(day.out, "ops", False).parts().items()}

    def test_all_done_once(self, day):
        one = day("")
        assert one.run()
        assert self.states(one) == dict.fromkeys("abc", "done")
        assert one.chosen() == []

    @pytest.mark.parametrize(
        ("dies", "why"),
        [
            pytest.param("os.kill(os.getpid(), 9)", "status -9", id="killed"),
            pytest.param(
                "time.sleep(60)",
                "it took more than 3 s; 1 were expected",
                id="hung",
                marks=pytest.mark.slow,
            ),
        ],
    )
    def test_a_part_that_dies_loses_no_other_and_is_tried_again_by_the_next_call(self, day, dies, why):
        one = day(f"    if name == 'b': {dies}")
        assert not one.run()
        assert self.states(one) == {"a": "done", "b": "failed", "c": "done"}
        assert why in Notebook(one.out, "ops", False).parts()["b"]["why"]
        again = day("")
        assert [p.name for p in again.chosen()] == ["b"]
        assert again.run()

    @pytest.mark.slow
    def test_what_does_not_listen_is_killed_wherever_it_is(self, day, tmp_path):
        """A worker that is stopped and in a session of its own outlives no step: not one that hangs, nor one that died."""
        one = day(
            "    if name in 'ab':\n"
            "        import signal, subprocess\n"
            "        words = [sys.executable, '-c', 'import time; time.sleep(100)']\n"
            "        worker = subprocess.Popen(words, start_new_session=True)\n"
            "        worker.send_signal(signal.SIGSTOP)\n"
            f"        open({str(tmp_path)!r} + '/' + name, 'w').write(str(worker.pid))\n"
            "        time.sleep(60) if name == 'a' else os.kill(os.getpid(), 9)"
        )
        assert not one.run()
        assert self.states(one) == {"a": "failed", "b": "failed", "c": "done"}
        for name in "ab":
            assert gone(int((tmp_path / name).read_text()))

    @pytest.mark.parametrize("left", ["a", "z"])
    def test_what_a_killed_call_left_open_is_closed(self, day, left):
        """It is neither taken for what this call does, nor for having hung since then."""
        one = day("    time.sleep(0.05)")
        parts = {left: {"state": "begun", "began": time.time() - 9000}}
        one.out.joinpath("ops.json").write_text(
            json.dumps({"configuration": {"rehearsal": False}, "parts": parts})
        )
        assert one.run()
        want = dict.fromkeys("abc", "done") | ({"z": "failed"} if left == "z" else {})
        assert self.states(one) == want

    def test_a_record_that_cannot_be_written_ends_the_day(self, day):
        one = day("")
        one.out.joinpath("step.py").write_text("raise SystemExit(4)")
        with pytest.raises(UserError, match=r"the record of ops cannot be written; \S+ops.log says why"):
            one.run()

    def test_a_poisoned_process_is_replaced(self, day):
        one = day("    if name == 'a':\n        put(name, state='failed', why='card')\n        sys.exit(3)")
        assert not one.run()
        assert self.states(one) == {"a": "failed", "b": "done", "c": "done"}

    def test_a_step_that_cannot_begin_is_not_tried_for_ever(self, day):
        one = day("")
        one.out.joinpath("step.py").write_text("raise SystemExit(5)")
        assert not one.run()
        assert any("was not reached (status 5)" in line for line in self.said)

    @pytest.mark.slow
    def test_a_part_for_which_too_little_time_is_left_is_left_to_another_call(self, day, monkeypatch):
        """Not taken for one that failed."""
        monkeypatch.setattr(plan, "START", 0.0)
        monkeypatch.setattr(
            plan, "PARTS", [part("ops", "a", 1, 1), part("ops", "b", 1, 1)._replace(least=3.0)]
        )
        one = day("    if name == 'b':\n        sys.exit(0)\n    time.sleep(3)", seconds=5.2)
        one.out.joinpath("step.py").write_text(
            one.out.joinpath("step.py").read_text().replace("for name in sys.argv[1:]:", "for name in 'a':")
        )
        monkeypatch.setattr(plan, "PATIENCE", 20.0)
        assert one.run()
        assert self.states(one) == {"a": "done"}
        assert one.failed == set()
        assert "ops: b was not reached; another call does it" in self.said

    def stop_when_it_has_begun(self, day):
        while not Notebook(day.out, "ops", False).parts():
            time.sleep(0.02)
        day.stop()

    @pytest.mark.parametrize("how", few_fast(["time", "stopped"], "stopped"))
    def test_it_ends_in_time_and_when_it_is_told_to(self, day, monkeypatch, how):
        monkeypatch.setattr(plan, "START", 0.0)
        monkeypatch.setattr(plan, "AT_LEAST", 60.0)
        one = day("    time.sleep(30)", seconds=2.6 if how == "time" else 600)
        if how == "stopped":
            threading.Thread(target=self.stop_when_it_has_begun, args=(one,)).start()
        begin = time.monotonic()
        assert not one.run()
        assert time.monotonic() - begin < 10
        why = "the call's time was over" if how == "time" else "the call was stopped"
        assert Notebook(one.out, "ops", False).parts() == {"a": ANY}
        assert Notebook(one.out, "ops", False).parts()["a"]["why"] == why


def test_a_step_begins_nothing_for_which_too_little_time_is_left(tmp_path):
    """A study needs some to begin before it can be told to stop."""
    begun = []
    runs = {name: lambda place: begun.append(place.part) or {} for name in ("architectures", "second-seed")}
    book = Notebook(tmp_path, "quality", True)
    for left in (60, 100):
        given = Namespace(
            step="quality", parts=["second-seed"], until=time.time() + left, rehearse=True, out=tmp_path
        )
        assert step._work(given, book, runs, torch.device("cpu")) == 0
        assert begun == (["second-seed"] if left == 100 else [])


@pytest.mark.slow
def test_a_step_does_not_outlive_the_call_that_was_killed(tmp_path):
    words = [sys.executable, "-m", "tools.gpu_day", "--rehearse", "--only", "verify", "--out", str(tmp_path)]
    call = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    record = tmp_path / "rehearsal.verify.json"
    steps = []
    for _ in range(600):
        steps = [process for process in psutil.Process(call.pid).children() if process.is_running()]
        if record.is_file() and steps:
            break
        time.sleep(0.1)
    workers = []
    while not workers:
        workers = [p for p in steps[0].children(recursive=True) if "tools.gpu_day.cases" in p.cmdline()]
        time.sleep(0.1)
    workers[0].suspend()
    call.kill()
    call.wait()
    _, alive = psutil.wait_procs([*steps, *workers], timeout=15)
    assert not [process for process in alive if not gone(process.pid)]
    parts = Notebook(tmp_path, "verify", True).parts()
    assert not any(part.get("found", {}).get("wrong") for part in parts.values())
    assert Notebook(tmp_path, "verify", True).open() is not None
    Notebook(tmp_path, "verify", True).close()
    assert Notebook(tmp_path, "verify", True).open() is None
