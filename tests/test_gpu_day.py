"""The GPU day: what it plans, what it survives, what it says; and all of it on a CPU, as a rehearsal."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from unittest.mock import ANY

import psutil
import pytest

from retnet.settings import UserError
from tools.gpu_day import __main__ as command
from tools.gpu_day import plan, runner, verify
from tools.gpu_day.notebook import Notebook
from tools.gpu_day.plan import PAGE, PARTS, START, STEPS, Part, choose, expected
from tools.gpu_day.runner import Day

ROOT = Path(__file__).parents[1]
triton = pytest.importorskip("triton")


def part(step, name, seconds, rank, least=0.0):
    return Part(step, name, seconds, rank, "", least)


class TestPlan:
    def test_what_matters_most_first_and_in_the_order_of_the_day(self):
        parts = [part("verify", "a", 50, 2), part("verify", "b", 30, 1), part("ops", "c", 40, 1)]
        everything = 50 + 30 + 40 + 2 * START + PAGE
        assert choose(parts, set(), everything) == parts
        assert choose(parts, set(), everything - 1) == parts[1:]
        assert choose(parts, set(), 30 + START + PAGE) == [parts[1]]
        assert choose(parts, {("verify", "b")}, 40 + START + PAGE) == [parts[2]]
        assert choose(parts, set(), 10) == []

    def test_what_can_go_on_later_takes_what_is_left(self):
        parts = [part("ops", "a", 20, 2), part("quality", "b", 500, 3, least=100)]
        assert choose(parts, set(), 130 + 2 * START + PAGE) == parts
        assert choose(parts, set(), 119 + 2 * START + PAGE) == parts[:1]

    def test_the_whole_day_fits_its_default_time_and_ten_minutes_hold_all_of_the_first_rank(self):
        alone = [p for p in PARTS if not p.needs]
        assert choose(alone, set(), 60 * command.MINUTES) == alone
        assert expected(alone) <= 60 * 25
        short = choose(PARTS, set(), 600)
        assert {p for p in PARTS if p.rank == 1} <= set(short)
        assert expected(short) <= 600

    def test_what_is_not_installed_takes_no_time(self, tmp_path, monkeypatch):
        monkeypatch.setattr(plan, "find_spec", lambda name: None)
        assert not [p for p in Day(tmp_path, False, 60, list(STEPS), print).parts if p.needs]
        monkeypatch.setattr(plan, "find_spec", lambda name: object())
        day = Day(tmp_path, False, 1500, list(STEPS), print)
        assert [p.name for p in day.chosen() if p.needs] == [
            "fla-256-512"
        ]  # the others wait for another call

    @pytest.mark.parametrize("step", STEPS)
    def test_every_part_has_its_function(self, step):
        module = import_module(f"tools.gpu_day.{step}")
        assert set(module.PARTS) == {p.name for p in PARTS if p.step == step}
        module.summarise({})


class TestRunner:
    """With steps that are little scripts instead of measurements."""

    @pytest.fixture
    def day(self, tmp_path, monkeypatch):
        monkeypatch.setattr(plan, "PARTS", [part("ops", name, 1, 1) for name in "abc"])
        monkeypatch.setattr(plan, "PAGE", 1.0)
        monkeypatch.setattr(runner, "GLANCE", 0.02)
        monkeypatch.setattr(runner, "AT_LEAST", 1.0)
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
            monkeypatch.setattr(
                Day, "_command", lambda self, step, names: [sys.executable, str(script), *names]
            )
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
            ("os.kill(os.getpid(), 9)", "status -9"),
            ("time.sleep(60)", "it took more than 3 s, 3 times what was expected"),
        ],
        ids=["killed", "hung"],
    )
    def test_a_part_that_dies_loses_no_other_and_is_tried_again_by_the_next_call(self, day, dies, why):
        one = day(f"    if name == 'b': {dies}")
        assert not one.run()
        assert self.states(one) == {"a": "done", "b": "failed", "c": "done"}
        assert why in Notebook(one.out, "ops", False).parts()["b"]["why"]
        again = day("")
        assert [p.name for p in again.chosen()] == ["b"]
        assert again.run()

    @pytest.mark.parametrize("left", ["a", "z"])
    def test_what_a_killed_call_left_open_is_closed(self, day, left):
        """It is neither taken for what this call does, nor for having hung since then."""
        one = day("    time.sleep(0.2)")
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

    @pytest.mark.parametrize("how", ["time", "stopped"])
    def test_it_ends_in_time_and_when_it_is_told_to(self, day, monkeypatch, how):
        monkeypatch.setattr(plan, "START", 0.0)
        monkeypatch.setattr(runner, "AT_LEAST", 60.0)
        one = day("    time.sleep(30)", seconds=2.6 if how == "time" else 600)
        if how == "stopped":
            threading.Timer(0.5, one.stop).start()
        begin = time.monotonic()
        assert not one.run()
        assert time.monotonic() - begin < 10
        why = "the call's time was over" if how == "time" else "the call was stopped"
        assert Notebook(one.out, "ops", False).parts() == {"a": ANY}
        assert Notebook(one.out, "ops", False).parts()["a"]["why"] == why


def test_the_smallest_case_that_still_fails(tmp_path):
    """Wrong wherever K is above 40 and the documents hold an empty one."""

    class Fake:
        def ask(self, case):
            bad = case["K"] > 40 and 0 in (case["lengths"] or ())
            return {"errors": {"out": 1.0 if bad else 0.0}, "allowed": 1e-3}

    case = verify.base(K=128, V=256, B=1, T=90, lengths=[40, 0, 50], state=True, layout="slice", seed=1)
    assert verify.faults(Fake().ask(case)) == ["out: 1.00e+00, allowed 1e-03"]
    found = verify._smallest(Fake(), case, time.time() + 60, 0)["smallest"]
    assert found["K"] < 128
    assert 0 in found["lengths"]
    assert verify.faults(Fake().ask(found))
    assert found["H"] == 1


def test_nan_is_wrong():
    found = {"errors": {"out": float("nan")}, "allowed": {"out": 1.0}}
    assert verify.faults(json.loads(json.dumps(found)))
    assert verify.faults({"failed": "it died"}) == ["it died"]
    assert not verify.faults({"refused": "do not fit"})


def test_winners_become_rows_of_the_table():
    from retnet.ops.triton import tile_table
    from tools.gpu_day import tune

    table = tile_table.table("sm_90")
    found = {
        "state": {"start": list(table.state), "best": list(table.state)},
        "out-256": {"start": list(table.out[256]), "best": [64, 32, 256, 64, 512, 8, 2]},
    }
    assert tune.winners(found) == {"state": None, "out": {"256": [64, 32, 256, 64, 512, 8, 2]}}
    namespace = {
        name: getattr(tile_table, name)
        for name in ("ArchitectureTiles", "StateTiles", "OutTiles", "StepTiles")
    }
    rows = eval("{" + tune.patch("sm_90", found) + "}", namespace)
    assert rows["sm_90"].out[256] == tile_table.OutTiles(64, 32, 256, 64, 512, 8, 2)
    assert rows["sm_90"]._replace(out=table.out) == table
    assert tile_table.OutTiles(64, 32, 256, 64, 512, 8, 3) in tune.neighbours(table.out[256])
    assert table.out[256] not in tune.neighbours(table.out[256])


def test_a_rehearsal_is_no_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "RECORDS", tmp_path)
    with pytest.raises(SystemExit):
        command.main(["--rehearse", "--out", str(tmp_path / "gpu")])
    assert "a rehearsal is none" in capsys.readouterr().err
    assert not (tmp_path / "gpu").exists()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"[]", "is no record of a step; move it away"),
        (b'{"parts": {"a": {}}, "configuration": {"rehearsal": true}}', "is no record of a step"),
        (b'{"parts": {', "cannot read"),
        (b"\xff\xfe", "cannot read"),
        (b'{"parts": {}, "configuration": {"rehearsal": true}}', "is a rehearsal's; .* are kept apart"),
    ],
)
def test_records_that_are_none(content, why, tmp_path, capsys):
    """One sentence, and they stay where they are: a rehearsal's under the name of another, too."""
    file = tmp_path / "ops.json"
    file.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        command.main(["--dry-run", "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert re.search(why, capsys.readouterr().err)
    assert file.read_bytes() == content


def test_two_days_in_one_folder(tmp_path, capsys):
    script = "import sys, time; from pathlib import Path; from retnet.lock import sole_owner\n"
    script += "with sole_owner(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    words = [sys.executable, "-c", script, tmp_path / "day"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(SystemExit):
            command.main(["--rehearse", "--out", str(tmp_path / "day")])
        holder.kill()
    assert f"is in use by process {holder.pid}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        command.main(["--rehearse", "--out", str(tmp_path / "file" / "day")])
    assert "cannot write the day's directory" in capsys.readouterr().err


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
    family = [*steps, *steps[0].children(recursive=True)]
    call.kill()
    call.wait()
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive
    assert Notebook(tmp_path, "verify", True).open() is not None
    Notebook(tmp_path, "verify", True).close()
    assert Notebook(tmp_path, "verify", True).open() is None


def test_a_bare_checkout_is_enough(tmp_path):
    """Nothing of ours is installed: the checkout's own sources are found."""
    code = "import sys; sys.path = [p for p in sys.path if not p.endswith('/src')]; import runpy; "
    code += "runpy.run_module('tools.gpu_day', run_name='__main__')"
    words = [sys.executable, "-c", code, "--dry-run", "--out", str(tmp_path / "day")]
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quality architectures" in done.stdout or "architectures: nine" in done.stdout


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path)])
    assert "finds no GPU here; --rehearse runs everything" in capsys.readouterr().err


def test_the_plan_alone(tmp_path, capsys):
    assert command.main(["--dry-run", "--minutes", "10", "--out", str(tmp_path / "day")]) == 0
    said = capsys.readouterr().out
    assert "quality architectures: left out (rank 3): no time" in said
    assert not (tmp_path / "day").exists()


@pytest.mark.slow
def test_a_whole_day_rehearsed(tmp_path):
    """Every part of every step, the records and the page; called again, nothing is left to do."""
    out = tmp_path / "day"
    words = [sys.executable, "-m", "tools.gpu_day", "--rehearse", "--out", str(out)]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for step in STEPS:
        record = json.loads((out / f"rehearsal.{step}.json").read_text(encoding="utf-8"))
        assert record["name"] == f"rehearsal-gpu-{step}"
        assert record["configuration"] == {"rehearsal": True}
        assert {name: p["state"] for name, p in record["parts"].items()} == {
            p.name: "done" for p in PARTS if p.step == step and plan.is_possible(p)
        }
        if step == "verify":
            assert [p["found"]["wrong"] for p in record["parts"].values()] == [[]] * len(record["parts"])
    assert {file.name.split(".")[0] for file in out.iterdir()} == {"rehearsal"}
    page = (out / "rehearsal.report.html").read_text(encoding="utf-8")
    assert "A rehearsal: no number of it is a measurement" in page
    assert "cannot be shown" not in page
    assert page.count("<svg") > 10
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0
    assert "hold 0 of" in again.stdout
