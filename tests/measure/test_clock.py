import time

import pytest

from retnet.measure import limits
from retnet.measure.clock import (
    Budget,
    Contender,
    Sample,
    Spread,
    Target,
    interleave,
    median_seconds,
    rounds_made,
    spread,
    times_faster,
)


def test_a_spread_is_median_least_greatest():
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert spread(x / 2 for x in (2, 4)) == Spread(1.5, 1.0, 2.0)


def test_spreads_in_other_units_and_as_text():
    seen = Spread(0.0012345, 0.001, 1.5).times(1e3)
    assert seen == Spread(pytest.approx(1.2345), 1.0, 1500.0)
    assert (seen.written(), seen.written(0), str(seen)) == (
        "1.23 (1.00..1,500.00)",
        "1 (1..1,500)",
        "1.23 (1..1.5e+03)",
    )


def test_ratios_are_formed_inside_rounds():
    """The machine halves its speed in round 2; the ratio does not notice, that of the medians would."""
    ours = [Sample(s, {}) for s in (1.0, 2.0, 2.0)]
    peer = [Sample(s, {}) for s in (3.0, 6.0, 3.0)]
    assert times_faster(ours, peer) == Spread(3.0, 1.5, 3.0)


@pytest.mark.parametrize(
    ("bounds", "met", "wanted"),
    [
        ({"least": 0.8}, True, "≥ 0.8"),
        ({"least": 0.81}, False, "≥ 0.81"),
        ({"most": 0.8}, True, "≤ 0.8"),
        ({"most": 0.79}, False, "≤ 0.79"),
        ({"least": 0.95, "most": 1.05}, False, "≥ 0.95 and ≤ 1.05"),
    ],
)
def test_targets_judge_the_median(bounds, met, wanted):
    target = Target("x", Spread(0.8, 0.1, 2.0), **bounds)
    assert (target.met, target.wanted) == (met, wanted)
    assert target.record() == {
        "what": "x",
        "wanted": wanted,
        "seen": {"median": 0.8, "low": 0.1, "high": 2.0},
        "met": met,
    }


def test_rounds_are_interleaved_and_limits_stand_on_both_sides():
    calls, rates = [], iter(range(100))

    def contender(name):
        return Contender(name, lambda: calls.append(name) or float(len(calls)))

    def limit():
        calls.append("limit")
        return next(rates)

    samples = interleave([contender("a"), contender("b")], {"x": limit}, 2, lambda *_: None)
    first, second = ["limit", "a", "limit", "b", "limit"], ["limit", "b", "limit", "a", "limit"]
    assert calls == ["a", "b", *first, *second]
    assert samples == {
        "a": [Sample(4.0, {"x": 0.5}), Sample(11.0, {"x": 4.5})],
        "b": [Sample(6.0, {"x": 1.5}), Sample(9.0, {"x": 3.5})],
    }


def test_each_contender_stands_at_every_place():
    order = []
    contenders = [Contender(name, lambda name=name: order.append(name) or 1.0) for name in "abc"]
    interleave(contenders, {}, 6, lambda *_: None)
    rounds = ["".join(order[i : i + 3]) for i in range(3, 21, 3)]
    assert rounds == ["abc", "cba", "bca", "acb", "cab", "bac"]


def test_rounds_end_with_the_time_but_not_before_there_is_a_median(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def measure():
        clock[0] += 10
        return 1.0

    def rounds(until):
        clock[0] = 0.0
        samples = interleave([Contender("a", measure)], {}, 9, lambda *_: None, until)
        return rounds_made({"part": samples, "none": {}})["part"]

    assert [rounds(until) for until in (0, 49, 50, 60, 1e9)] == [
        3,
        3,
        4,
        5,
        9,
    ]  # the first ten seconds are warming up


def test_progress_goes_from_nothing_to_all():
    said = []
    interleave([Contender(name, lambda: 1.0) for name in "ab"], {}, 2, lambda *words: said.append(words))
    assert said[0] == ("warming up: a", 0.0)
    assert said[3] == ("round 1 of 2: b", pytest.approx(0.5))
    assert [part for _, part in said] == pytest.approx([n / 6 for n in range(6)])


def test_a_budget_is_shared_out(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    budget = Budget(10)
    assert budget.deadline(0.25) == 1150
    clock[0] = 1100.0
    assert (budget.deadline(0.5), budget.deadline()) == (1350, 1600)
    assert Budget(2, within=budget).deadline() == 1220
    assert Budget(20, within=budget).deadline() == 1600
    clock[0] = 2000.0
    assert budget.deadline() == 2000
    assert Budget(None).deadline(0.1) == float("inf")


def test_median_seconds_counts_calls_and_keeps_its_budget(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def run():
        calls.append(1)
        clock[0] += len(calls)  # 1, 2, 3 … seconds

    assert median_seconds(run, 5, warmup=2, budget=100) == 5  # of 3, 4, 5, 6, 7
    assert len(calls) == 7
    calls.clear()
    assert median_seconds(run, 50, warmup=0, budget=7) == 2.5  # of 1, 2, 3, 4: 6 seconds are within, 10 not
    calls.clear()
    assert median_seconds(run, 2, warmup=0, budget=0) == 1.5
    calls.clear()
    assert median_seconds(run, 9, warmup=0, budget=0) == 2


def test_limits_are_rates_per_second(monkeypatch):
    clock = [0.0]

    def tick():
        clock[0] += 0.25  # between any two looks at the clock
        return clock[0]

    monkeypatch.setattr(time, "perf_counter", tick)
    bandwidth = limits.memory_bandwidth(megabytes=1)
    assert bandwidth["read"]() == 2**20 / 0.25
    assert bandwidth["update"]() == 2 * 2**20 / 0.25
    other = limits.memory_bandwidth(megabytes=1, read_bytes=4001)
    assert (other["read"](), other["update"]()) == (4000 / 0.25, 2 * 2**20 / 0.25)
    assert {limit() for limit in limits.matrix_products(size=8).values()} == {2 * 8**3 / 0.25}
