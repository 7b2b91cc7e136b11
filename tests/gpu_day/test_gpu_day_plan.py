"""What a GPU day holds, in which time, and in which order."""

from importlib import import_module

import pytest

from tests.helpers.gpu_day import part
from tools.gpu_day import __main__ as command
from tools.gpu_day import plan
from tools.gpu_day.plan import DAY, PAGE, PARTS, START, STEPS, choose, expected, processes
from tools.gpu_day.runner import Day

pytest.importorskip("triton")


class TestPlan:
    def test_step_by_step_where_all_fits_and_else_what_matters_most_first(self):
        parts = [part("verify", "a", 50, 2), part("verify", "b", 30, 1), part("ops", "c", 40, 1)]
        everything = 50 + 30 + 40 + 2 * START + PAGE
        assert choose(parts, set(), everything) == [parts[1], parts[0], parts[2]]
        assert choose(parts, set(), everything - 1) == parts[1:]
        assert choose(parts, set(), 30 + START + PAGE) == [parts[1]]
        assert choose(parts, {("verify", "b")}, 40 + START + PAGE) == [parts[2]]
        assert choose(parts, set(), 10) == []

    def test_more_than_a_day_comes_behind_it(self):
        parts = [part("verify", "a", 50, 5), part("ops", "b", 40, 3), part("quality", "c", 500, 4, least=100)]
        chosen = choose(parts, set(), 300)
        assert [p.name for p in chosen] == ["b", "c"]  # which takes what is left
        assert chosen[1].seconds == 300 - 40 - 2 * START - PAGE
        assert [p.name for p in choose(parts, set(), 5000)] == ["b", "c", "a"]

    def test_what_can_go_on_later_takes_what_is_left(self):
        parts = [part("ops", "a", 20, 2), part("quality", "b", 500, 3, least=100)]
        first, some = choose(parts, set(), 130 + 2 * START + PAGE)
        assert (first, some.key, some.seconds) == (parts[0], parts[1].key, 110)
        assert expected([first, some]) == 130 + 2 * START + PAGE
        assert choose(parts, set(), 5000)[1] == parts[1]
        assert choose(parts, set(), 119 + 2 * START + PAGE) == parts[:1]

    def test_in_a_short_call_nothing_costs_a_lower_rank_its_time(self):
        parts = [part("verify", "a", 50, 2), part("ops", "b", 300, 2), part("train", "c", 60, 1)]
        chosen = choose(parts, set(), 200)
        assert [p.name for p in chosen] == ["c", "a"]
        ranks = [p.rank for p in choose(PARTS, set(), 600)]
        assert ranks == sorted(ranks)
        assert ranks[-1] == 3

    def test_a_day_goes_through_its_steps_in_their_order(self):
        """A process a step; when one takes much longer than expected, what matters most is done first from then on."""
        chosen = choose(PARTS, set(), 1500)
        assert [together[0].step for together in processes(chosen)] == list(STEPS)
        done = {p.key for p in chosen if p.step in ("machine", "verify", "tune")}
        ranks = [p.rank for p in choose(PARTS, done, 450)]
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
    def test_five_minutes_hold_the_first_rank_and_25_a_whole_day(self, with_fla):
        parts = [p for p in PARTS if with_fla or not p.needs]
        assert {p.key for p in parts if p.rank == 1} <= {p.key for p in choose(parts, set(), 5 * 60)}
        day = choose(parts, set(), 60 * command.MINUTES)
        assert {p for p in parts if p.rank <= DAY} <= set(day)  # and none of them is cut short
        assert plan.find("quality", "architectures").seconds <= 15 * 60

    def test_a_day_in_calls_of_ten_minutes_and_less(self):
        """The second completes the first six steps, the third is for quality."""
        first = {p.key for p in choose(PARTS, set(), 9 * 60)}
        assert {("ops", "fla-256-512"), ("verify", "shapes"), ("tune", "state")} <= first
        second = first | {p.key for p in choose(PARTS, first, 6 * 60)}
        assert {p for p in PARTS if p.rank <= DAY and p.key not in second} == {
            plan.find("quality", "architectures")
        }
        assert ("quality", "architectures") in {p.key for p in choose(PARTS, second, 12 * 60)}

    def test_what_is_not_installed_takes_no_time(self, tmp_path, monkeypatch):
        monkeypatch.setattr(plan, "find_spec", lambda name: None)
        assert not [p for p in Day(tmp_path, False, 60, list(STEPS), print).parts if p.needs]
        monkeypatch.setattr(plan, "find_spec", lambda name: object())
        day = Day(tmp_path, False, 1500, list(STEPS), print)
        asked = ["fla-256-512", "fla-128-256", "fla-64-128"]  # at squares it is more than a day has to hold
        assert [p.name for p in day.chosen() if p.needs] == asked

    @pytest.mark.parametrize("step", STEPS)
    def test_every_part_has_its_function(self, step):
        module = import_module(f"tools.gpu_day.{step}")
        assert set(module.PARTS) == {p.name for p in PARTS if p.step == step}
        module.summarise({})


def test_the_plan_alone(tmp_path, capsys):
    assert command.main(["--dry-run", "--minutes", "10", "--out", str(tmp_path / "day")]) == 0
    said = capsys.readouterr().out
    assert "650 s  quality architectures (rank 4)" in said
    assert "all that is not done would take about" in said
    assert not (tmp_path / "day").exists()


def test_the_plan_of_quality_alone_says_what_it_takes(tmp_path, capsys):
    words = ["--dry-run", "--only", "quality", "--out", str(tmp_path / "day"), "--minutes"]
    assert command.main([*words, "15"]) == 0
    assert "228 s  second-seed, of 325 s" in capsys.readouterr().out
    assert command.main([*words, "6"]) == 0
    said = capsys.readouterr().out
    assert "338 s  architectures, of 650 s" in said
    assert "about 6.0 minutes in all" in said
