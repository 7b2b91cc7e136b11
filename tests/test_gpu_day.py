"""The GPU day: what it plans, what it survives, what it says; and all of it on a CPU, as a rehearsal."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from copy import deepcopy
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from unittest.mock import ANY

import psutil
import pytest
import torch

from retnet.settings import UserError
from tools.gpu_day import __main__ as command
from tools.gpu_day import checks, identity, page, plan, runner, targets, verify
from tools.gpu_day.notebook import Notebook, attempts
from tools.gpu_day.place import Place, StoppedError
from tools.gpu_day.plan import PAGE, PARTS, START, STEPS, Part, choose, expected, processes
from tools.gpu_day.runner import Day

ROOT = Path(__file__).parents[1]
triton = pytest.importorskip("triton")


def part(step, name, seconds, rank, least=0.0):
    return Part(step, name, seconds, rank, "", least)


def gone(pid):
    """Whether a process has ended, be it that nobody has asked how."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


class TestPlan:
    def test_what_matters_most_first_and_in_the_order_of_the_day(self):
        parts = [part("verify", "a", 50, 2), part("verify", "b", 30, 1), part("ops", "c", 40, 1)]
        everything = 50 + 30 + 40 + 2 * START + PAGE
        assert choose(parts, set(), everything + START) == [*parts[1:], parts[0]]  # verify begins twice
        assert choose(parts, set(), everything + START - 1) == parts[1:]
        assert choose(parts, set(), 30 + START + PAGE) == [parts[1]]
        assert choose(parts, {("verify", "b")}, 40 + START + PAGE) == [parts[2]]
        assert choose(parts, set(), 10) == []

    def test_what_can_go_on_later_takes_what_is_left(self):
        parts = [part("ops", "a", 20, 2), part("quality", "b", 500, 3, least=100)]
        first, some = choose(parts, set(), 130 + 2 * START + PAGE)
        assert (first, some.key, some.seconds) == (parts[0], parts[1].key, 110)
        assert expected([first, some]) == 130 + 2 * START + PAGE
        assert choose(parts, set(), 5000)[1] == parts[1]
        assert choose(parts, set(), 119 + 2 * START + PAGE) == parts[:1]

    def test_ranks_come_one_after_the_other_and_nothing_costs_a_lower_number_its_time(self):
        parts = [part("verify", "a", 50, 2), part("ops", "b", 300, 2), part("train", "c", 60, 1)]
        chosen = choose(parts, set(), 200)
        assert [p.name for p in chosen] == ["c", "a"]
        assert [[p.name for p in together] for together in processes(choose(PARTS, set(), 1500))][:2] == [
            ["card", "ceilings"],
            ["heads", "layouts", "step", "rows"],
        ]
        ranks = [p.rank for p in choose(PARTS, set(), 1500)]
        assert ranks == sorted(ranks)

    def test_what_may_hang_again_comes_behind_the_rest_of_its_rank(self):
        parts = [part("verify", "a", 50, 1), part("verify", "b", 50, 1), part("ops", "c", 50, 2)]
        chosen = choose(parts, set(), 1000, tried={("verify", "a")})
        assert [p.name for p in chosen] == ["b", "a", "c"]

    @pytest.mark.parametrize("with_fla", [True, False])
    @pytest.mark.parametrize("minutes", [5, 8, 10, 15, 25, 60])
    def test_a_plan_never_takes_longer_than_its_minutes(self, minutes, with_fla):
        parts = [p for p in PARTS if with_fla or not p.needs]
        done = set()
        for _ in range(2):  # and a second call goes on
            chosen = choose(parts, done, 60 * minutes)
            assert expected(chosen) <= 60 * minutes
            done |= {p.key for p in chosen}

    @pytest.mark.parametrize("with_fla", [True, False])
    def test_eight_minutes_hold_the_first_rank_and_a_day_everything_that_completes_it(self, with_fla):
        parts = [p for p in PARTS if with_fla or not p.needs]
        assert {p.key for p in parts if p.rank == 1} <= {p.key for p in choose(parts, set(), 8 * 60)}
        day = {p.key: p for p in choose(parts, set(), 60 * command.MINUTES)}
        assert {p.key for p in parts if p.rank <= 4} <= day.keys()
        assert day["quality", "architectures"].seconds >= 300  # each of the nine at one rate
        assert {step for step, _ in day} == set(STEPS)

    def test_thirteen_minutes_in_two_calls_hold_what_it_is_judged_by(self):
        first = {p.key for p in choose(PARTS, set(), 8 * 60)}
        second = {p.key for p in choose(PARTS, first, 5 * 60)}
        assert ("ops", "fla-256-512") in second

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
            ("time.sleep(60)", "it took more than 3 s; 1 were expected"),
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
        monkeypatch.setattr(plan, "AT_LEAST", 60.0)
        one = day("    time.sleep(30)", seconds=2.6 if how == "time" else 600)
        if how == "stopped":
            threading.Timer(0.5, one.stop).start()
        begin = time.monotonic()
        assert not one.run()
        assert time.monotonic() - begin < 10
        why = "the call's time was over" if how == "time" else "the call was stopped"
        assert Notebook(one.out, "ops", False).parts() == {"a": ANY}
        assert Notebook(one.out, "ops", False).parts()["a"]["why"] == why


CASES = {
    "op": verify.base(K=128, V=256, B=1, T=90, lengths=[40, 0, 50], state=True, layout="slice"),
    "step": {**verify.base(K=128, V=256, B=5, T=3), "kind": "step"},
    "rotary": {**verify.base(K=60, B=2, T=70), "kind": "rotary", "layout": "halves"},
    "norm": {**verify.base(V=512, B=2, T=70), "kind": "norm", "norm": "rms"},
    "model": {"kind": "model", "d_model": 200, "T": 300, "seed": 1},
}


@pytest.mark.parametrize("kind", CASES)
def test_the_smallest_case_that_still_fails(kind):
    """Wrong wherever the first size is above a third of the case's, and there is an empty document where there was one."""
    case, size = CASES[kind], {"norm": "V", "model": "d_model"}.get(kind, "K")

    def ask(cases):
        found = []
        for one in cases:
            bad = one[size] > case[size] / 3 and (kind != "op" or 0 in one["lengths"])
            odd = kind == "rotary" and one["K"] % 2
            found.append(
                {"failed": "ValueError: odd"} if odd else {"errors": {"out": float(bad)}, "allowed": 1e-3}
            )
        return found

    (answer,) = ask([case])
    assert checks.faults(answer) == ["out: 1.00e+00, allowed 1e-03"]
    found = checks.smallest(case, answer, ask, 3, time.time() + 60)
    assert checks.faults(ask([found])[0]) == checks.faults(answer)
    assert found[size] <= case[size] // 2
    assert found["T"] == (1 if kind != "op" else sum(found["lengths"]))
    if kind == "op":
        assert 0 in found["lengths"]
        assert found["H"] == 1
    assert {key for key in case if key not in found} == set()


def test_types_and_states_meet_every_size():
    """No type stands at some value widths alone; odd K are among the sizes."""
    for _ in range(6):
        found = list(verify.sizes())
        assert {(case["K"], case["V"]) for case in found} == set(itertools.product(*verify.SIZES))
        for name, sizes in zip("KV", verify.SIZES, strict=True):
            for size in sizes:
                seen = {(case["dtype"], case["state"]) for case in found if case[name] == size}
                assert seen == set(itertools.product(verify.TYPES, (False, True)))
    assert {17, 33, 100} <= set(verify.SIZES[0])
    for T in (1, 2, 15, 16, 17, 255, 256, 1000):
        assert {"bfloat16", "float32"} == {case["dtype"] for case in verify.layouts() if case["T"] == T}


class TestChecks:
    """With workers that answer at once, or not at all."""

    @pytest.fixture
    def place(self, tmp_path):
        notebook = Notebook(tmp_path, "verify", True)
        notebook.begin("heads")
        now = time.time()
        return Place(tmp_path, True, torch.device("cpu"), notebook, "heads", now + 60, 20.0, now + 60)

    @pytest.fixture
    def answers(self, monkeypatch):
        class Fake:
            def ask(self, case, seconds):
                asked.append(case["T"])
                time.sleep(case.get("takes", 0.0))
                return {"errors": {"out": float(case["T"] == 3)}, "allowed": 0.5}

        asked = []
        monkeypatch.setattr(checks, "_workers", lambda device, count: [Fake()])
        return asked

    def test_what_is_wrong_is_noted_at_once_and_what_is_missed_is_named(self, place, answers):
        """The part may be ended at any time."""
        cases = [verify.base(T=T, takes=0.3 if T == 4 else 0.0) for T in range(1, 9)]
        notes = []
        checks.Checks(place, cases, lambda found: notes.append(deepcopy(found))).run(time.time() + 0.1)
        assert [len(note["wrong"]) for note in notes][:2] == [0, 1]
        assert [case["T"] for case in notes[1]["missed"]] == [4, 5, 6, 7, 8]
        assert notes[-1]["cases"] == 4
        assert [case["T"] for case in notes[-1]["missed"]] == [5, 6, 7, 8]
        assert notes[-1]["wrong"][0]["smallest"]["T"] == 3

    def test_the_next_attempt_goes_on_with_what_was_missed(self, place, answers, monkeypatch):
        monkeypatch.setattr(verify, "tiny", lambda case: case)
        monkeypatch.setitem(verify.REHEARSED, "heads", 9)
        cases = [verify.base(T=T, takes=1.3 if T == 2 else 0.0) for T in range(1, 5)]
        with pytest.raises(StoppedError, match="2 of its cases were not reached"):
            verify.check(replace(place, seconds=1.0), iter(cases))
        place.notebook.stop("heads", "2 of its cases were not reached")
        place.notebook.begin("heads")
        assert answers == [1, 2]
        del answers[:]
        place.notebook.finish("heads", verify.check(place, iter(cases)))
        assert answers[:2] == [3, 4]
        found = [one["found"] for one in attempts(place.notebook.parts()["heads"])]
        both = verify.joined(found)
        assert (both["cases"], both["right"], len(both["wrong"]), both["missed"]) == (4, 3, 1, [])
        assert (
            "4 cases were checked against fp64, 1 of them are wrong"
            in verify.summarise({"a": both}).findings[0]
        )

    @pytest.mark.parametrize("how", ["stopped", "killed"])
    def test_a_case_that_hangs_is_named_and_costs_no_other(self, how):
        worker = checks.Worker(torch.device("cpu"))
        worker._process = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(100)"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        process = worker._process
        process.send_signal(signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
        answer = worker.ask(verify.tiny(verify.base()), 1.0 if how == "stopped" else 60.0)
        if how == "stopped":
            assert checks.faults(answer) == ["no answer in time: 1 s"]
        assert gone(process.pid)
        worker.end()

    def test_a_case_ends_before_its_part(self, place):
        for name in ("step", "heads", "torch"):
            one = plan.find("verify", name)
            begun = replace(place, rehearsal=False, ended=time.time() + one.most)
            assert checks.Checks(begun, [], print)._seconds() < one.most - one.seconds / 3


def test_nan_is_wrong():
    found = {"errors": {"out": float("nan")}, "allowed": {"out": 1.0}}
    assert checks.faults(json.loads(json.dumps(found)))
    assert checks.faults({"failed": "it died"}) == ["it died"]
    assert not checks.faults({"refused": "do not fit"})


def test_winners_become_rows_of_the_table():
    from retnet.ops.triton import tile_table
    from tools.gpu_day import tune

    table = tile_table.table("sm_90")
    found = {
        "state": {"start": list(table.state), "best": list(table.state)},
        "out-256": {"start": list(table.out[256]), "best": [64, 32, 256, 64, 512, 8, 2], "verified": True},
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
    assert tile_table.OutTiles(64, 32, 256, 32, 512, 8, 3) in tune.neighbours(
        table.out[256]
    )  # docs/kernels.md
    assert table.out[256] not in tune.neighbours(table.out[256])


def test_winners_that_were_not_checked_are_named_and_in_no_patch(tmp_path):
    from retnet.ops.triton import tile_table
    from tools.gpu_day import tune

    start = list(tile_table.table("sm_90").out[256])
    found = {"architecture": "sm_90", "start": start, "best": [64, *start[1:]], "ratio": 0.5, "tried": [1, 2]}
    checked = {"cases": 4, "right": 3, "wrong": [{}], "refused": [], "missed": []}
    old = tmp_path / "tile_table.txt"
    for more, said in (
        ({}, "unverified"),
        ({"checked": {**checked, "wrong": []}}, "unverified"),  # cut before the last case
        ({"checked": checked, "verified": False}, "wrong in 1 of 4 cases"),
    ):
        old.write_text("of another day")
        parts = {"out-256": {**found, **more}}
        shown = tune.summarise(parts)
        assert said in shown.findings[0]
        assert len(shown.tables) == 1
        assert tune.write_patch(tmp_path, False, parts) is None
        assert not old.exists()
    parts = {"out-256": {**found, "checked": {**checked, "wrong": []}, "verified": True}}
    assert tune.write_patch(tmp_path, False, parts) == old
    assert "256: OutTiles(64, " in old.read_text()
    assert len(tune.summarise(parts).tables) == 2


def test_a_winner_is_checked_at_every_head_shape_that_it_changes():
    """fp16 takes the widest row where bf16 takes another."""
    from tools.gpu_day import tune

    row = [64, 32, 64, 32, 128, 8, 2]
    assert tune.shapes_of("state", "sm_90", {"state": [32, 64, 64, 4, 2]}) == list(verify.HEADS)
    assert tune.shapes_of("out-64", "sm_90", {"out": {"64": row}}) == [(64, 128)]
    assert tune.shapes_of("out-128", "sm_90", {"out": {"128": row}}) == [(64, 128), (128, 256)]
    assert tune.shapes_of("out-1024", "sm_90", {"out": {"1024": row}}) == [(128, 256), (256, 512)]


def test_each_process_compiles_its_share_and_all_of_them_everything():
    from tools.gpu_day.fla_tuning import share

    for count in (5, 12):
        shares = [share(range(48), n, count) for n in range(count)]
        assert sorted(x for one in shares for x in one) == list(range(48))
        assert all(share(range(6), n, count) for n in range(count))


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


def test_a_damaged_record_stops_its_own_step_alone(tmp_path, capsys):
    tmp_path.joinpath("tune.json").write_bytes(b'{"parts": {')
    assert command.main(["--dry-run", "--only", "machine", "--out", str(tmp_path)]) == 0
    tmp_path.joinpath("machine.json").write_text('{"parts": {}, "configuration": {"rehearsal": false}}')
    text = page.write_page(tmp_path, False).read_text(encoding="utf-8")  # a record without date and host
    assert "cannot read" in text
    assert "tune.json" in text


def test_both_attempts_stay(tmp_path):
    """A part that is tried again loses nothing of what it had found; the page says how often it was tried."""
    book = Notebook(tmp_path, "ops", True)
    book.begin("kernels")
    book.note("kernels", {"rows": [1]})
    book.fail("kernels", "it hung")
    book.begin("kernels")
    book.fail("kernels", "it died")
    made = attempts(book.parts()["kernels"])
    assert [(one["state"], one["why"], one.get("found")) for one in made] == [
        ("failed", "it hung", {"rows": [1]}),
        ("failed", "it died", None),
    ]
    assert page._found(book.parts()["kernels"]) == [{"rows": [1]}]
    book.begin("kernels")
    book.finish("kernels", {"rows": [2]})
    assert page._found(book.parts()["kernels"])[-1] == {"rows": [2]}
    assert page._state(book.parts()["kernels"]) == "done, attempt 3"


@pytest.mark.parametrize("name", ["card", "torch", "commit", "sources"])
def test_another_place_is_refused(name, tmp_path, monkeypatch, capsys):
    """Before anything is measured; where it is the same, the day goes on."""
    book = Notebook(tmp_path, "machine", True)
    book.begin("card")
    Day(tmp_path, True, 60, ["machine"], print).require_same_place()
    here = identity.current()
    monkeypatch.setattr(identity, "current", lambda: {**here, name: "another"})
    with pytest.raises(SystemExit):
        command.main(["--rehearse", "--only", "machine", "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert f"{name} was {here[name]} and is another. Numbers of both may not stand in one record" in said
    assert book.open() == "card"


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


def test_a_bare_checkout_is_enough(tmp_path):
    """Nothing of ours is installed: the checkout's own sources are found."""
    code = "import sys; sys.path = [p for p in sys.path if not p.endswith('/src')]; import runpy; "
    code += "runpy.run_module('tools.gpu_day', run_name='__main__')"
    words = [sys.executable, "-c", code, "--dry-run", "--out", str(tmp_path / "day")]
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "architectures, of 800 s: nine" in done.stdout


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path)])
    assert "finds no GPU here; --rehearse runs everything" in capsys.readouterr().err


def test_the_plan_alone(tmp_path, capsys):
    assert command.main(["--dry-run", "--minutes", "10", "--out", str(tmp_path / "day")]) == 0
    said = capsys.readouterr().out
    assert "800 s  quality architectures (rank 4)" in said
    assert "all that is not done would take about" in said
    assert not (tmp_path / "day").exists()


def test_the_plan_of_quality_alone_says_what_it_takes(tmp_path, capsys):
    words = ["--dry-run", "--only", "quality", "--out", str(tmp_path / "day"), "--minutes"]
    assert command.main([*words, "15"]) == 0
    assert "about 13.8 minutes in all" in capsys.readouterr().out
    assert command.main([*words, "6"]) == 0
    said = capsys.readouterr().out
    assert "330 s  architectures, of 800 s" in said
    assert "about 6.0 minutes in all" in said


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


class TestTargets:
    """A line for each, from the records alone."""

    def steps(self, factor):
        """Everything is this many times what is wanted."""

        def some(x):
            return {"median": x, "low": x, "high": x}

        def row(name, length, times):
            return {"name": name, "mode": "forward + backward", "length": length, "times_ours": some(times)}

        sizes = {"key_dim": 256, "value_dim": 512}
        times = [512, 4096, 131072]
        return {
            "verify": {"heads": {"cases": 9, "right": 9, "wrong": []}},
            "ops": {
                "kernels": {"rows": [{"kernel": "OUT o", **sizes, "of_products": some(0.6 * factor)}]},
                "256-512": {
                    "rows": [
                        row(name, n, 0.1 if n == 512 else factor)
                        for name in ("SDPA, H·K wide", "SDPA, H·V wide")
                        for n in times
                    ]
                },
                "fla-256-512": {"rows": [row("flash-linear-attention, chunk", 2048, 3 * factor)]},
                "fla-64-64": {"rows": [row("flash-linear-attention, fused", 2048, factor)]},
                "fla-128-128": {"rows": [row("flash-linear-attention, fused", 2048, factor)]},
            },
            "decode": {
                "steps": {
                    "steps": [
                        {"batch": 1, **sizes, "of_bandwidth": some(0.1)},
                        {"batch": 8, **sizes, "of_bandwidth": some(0.8 * factor)},
                    ]
                }
            },
            "train": {
                label: {
                    "rows": [
                        {"kind": "RetNet", "length": 8192, "seconds": [1.0, 1.0], "peak_bytes": 100},
                        {
                            "kind": "Transformer + FlashAttention",
                            "length": 8192,
                            "seconds": [factor, factor],
                            "peak_bytes": 100 * factor,
                        },
                    ]
                }
                for label in ("1.3B", "350M")
            },
        }

    @pytest.mark.parametrize(("factor", "met"), [(1.1, "yes"), (0.9, "no")])
    def test_met_or_not(self, factor, met):
        rows = targets.summarise(self.steps(factor)).tables[0].rows
        assert [row[-1] for row in rows] == ["yes", *[met] * (len(rows) - 1)]
        assert len(rows) == 12

    @pytest.mark.parametrize("step", ["verify", "ops", "decode", "train"])
    def test_what_was_not_measured_is_neither(self, step):
        steps = self.steps(1.1)
        del steps[step]
        shown = targets.summarise(steps)
        open_ = [row for row in shown.tables[0].rows if row[-1] == "not known"]
        assert {row[2] for row in open_} == {"not measured"}
        assert f"{len(open_)} were not measured" in shown.findings[0]
        assert targets.summarise({}).findings[0].startswith("0 of 12 targets are met, 0 are not, 12")

    def test_a_wrong_kernel_comes_first(self):
        steps = self.steps(1.1)
        steps["verify"]["heads"]["wrong"] = [{}]
        shown = targets.summarise(steps)
        assert shown.tables[0].rows[0][2:] == ("1 of 9", "heads 1", "no")
        assert "no speed of it counts" in shown.findings[1]


def test_what_a_peer_is_not_measured_at_is_said():
    """FlashAttention, forward + backward at 131,072 tokens: a second a call."""
    from retnet.bench.implementations import for_device, implementations_on
    from retnet.bench.ops import _not_measured
    from retnet.bench.ops_summary import _not_measured as sentences
    from tools.gpu_day.ops import LENGTHS, SHAPES

    shape = SHAPES["256-512"]
    bench = for_device(torch.device("cuda"), shapes=(shape,), lengths=LENGTHS)
    peers = {shape: implementations_on(torch.device("cpu"), shape)}
    said = "\n".join(sentences({"not_measured": _not_measured(bench, peers)}, tuple(shape)))
    assert re.search(r"SDPA, H·V wide, forward \+ backward, T 131,072: a call takes [\d,]+ Gflop", said)
    assert "retnet, reference, forward and forward + backward, T 2,048, 4,096" in said
    assert 4096 in LENGTHS
