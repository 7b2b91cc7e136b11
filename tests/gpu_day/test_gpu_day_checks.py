"""How cases are checked in processes of their own, and what is counted."""

import itertools
import json
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from tests.helpers.gpu_day import gone
from tools.gpu_day import checks, plan, verify
from tools.gpu_day.notebook import Notebook, attempts
from tools.gpu_day.place import Place, StoppedError

pytest.importorskip("triton")


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
                if case.get("hangs"):
                    return None
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

    @pytest.mark.slow
    def test_the_next_attempt_goes_on_with_what_was_missed(self, place, answers, monkeypatch):
        monkeypatch.setattr(verify, "tiny", lambda case: case)
        monkeypatch.setitem(verify.REHEARSED, "op", 9)
        cases = [verify.base(T=T, takes=1.1 if T == 2 else 0.0) for T in range(1, 5)]
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
        answer = worker.ask(verify.tiny(verify.base()), 0.2 if how == "stopped" else 60.0)
        if how == "stopped":
            assert answer is None
        assert gone(process.pid)
        worker.end()

    @pytest.mark.parametrize(("limit", "missed", "wrong"), [(30.0, [], [2]), (90.0, [2], [])])
    def test_a_case_that_hangs_is_wrong_and_one_that_is_cut_was_not_reached(
        self, place, answers, monkeypatch, limit, missed, wrong
    ):
        """It is known to hang where it had its full time; at the end of its part, nothing is known."""
        monkeypatch.setattr(checks, "REHEARSED_SECONDS", limit)
        cases = [verify.base(T=T, hangs=T == 2) for T in (1, 2)]
        monkeypatch.setattr(checks, "NO_MORE", 0)
        found = checks.Checks(place, cases, place.note).run(time.time() + 5)
        assert [case["T"] for case in found["missed"]] == missed
        assert [one["case"]["T"] for one in found["wrong"]] == wrong
        assert found["cases"] == 1 + len(wrong)
        if wrong:
            assert found["wrong"][0]["faults"] == ["no answer in time: 30 s"]

    def test_a_part_has_time_for_a_case_that_begins_last(self):
        """So one that hangs is named, unless the day ends."""
        for one in [one for one in plan.PARTS if one.step == "verify"]:
            assert one.most() - one.seconds - checks.MARGIN >= checks.CASE_SECONDS

    @pytest.mark.parametrize(("endless", "goes_on"), [(False, True), (True, False)])
    def test_it_goes_on_beyond_its_estimate_with_cases_that_end(
        self, place, answers, monkeypatch, endless, goes_on
    ):
        """Up to what the part may take; one without an end stays at its estimate."""
        ends = []
        empty = {"cases": 0, "right": 0, "refused": [], "wrong": [], "groups": {}, "missed": []}
        monkeypatch.setattr(checks.Checks, "run", lambda self, until: ends.append(until) or empty)
        now = time.time()
        place = replace(place, until=now + 1000, seconds=20.0, ended=now + 400)
        verify.check(place, iter([verify.base()]), endless=endless)
        assert ends[0] == pytest.approx(now + (400 - checks.MARGIN - 150 if goes_on else 20), abs=5)

    def test_no_case_is_counted_twice(self, place, answers, monkeypatch):
        """An attempt that was killed at once hides none before it; where all cases were answered, none is asked again."""
        monkeypatch.setattr(verify, "tiny", lambda case: case)
        cases = [verify.base(T=T) for T in (1, 2)]
        place.note({"cases": 1, "right": 1, "wrong": [], "refused": [], "groups": {}, "missed": cases[1:]})
        for _ in range(2):
            place.notebook.fail("heads", "the call that did it was killed")
            place.notebook.begin("heads")
        verify.check(place, iter(cases))
        assert answers == [2]
        place.notebook.fail("heads", "it took more than its time")
        place.notebook.begin("heads")
        assert verify.check(place, iter(cases))["cases"] == 0
        assert answers == [2]
        made = [one["found"] for one in attempts(place.notebook.parts()["heads"]) if "found" in one]
        assert verify.joined(made)["cases"] == 2


def test_nan_is_wrong():
    found = {"errors": {"out": float("nan")}, "allowed": {"out": 1.0}}
    assert checks.faults(json.loads(json.dumps(found)))
    assert checks.faults({"failed": "it died"}) == ["it died"]
    assert not checks.faults({"refused": "do not fit"})
