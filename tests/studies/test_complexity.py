import json
import tomllib
from dataclasses import replace

import pytest

from retnet.mixers import MIXERS
from retnet.paper import COMPLEXITY
from retnet.settings import UserError, build, config_path, dump
from retnet.studies import complexity, complexity_summary
from retnet.studies.complexity import ComplexityJob, ComplexityMeasure, Learning, Using

TINY = ComplexityMeasure(
    "complexity",
    using=Using(d_model=16, num_heads=2, batch=2, lengths=(8, 16, 32, 64, 128), rounds=2, seconds=1e-9),
    learning=Learning(d_model=16, lengths=(8, 16, 32, 64, 128), rows=2, rounds=2),
    device="cpu",
)
LENGTHS = (8192, 16384, 32768, 65536, 131072)


def made_up(using=1e-6, state=100, kept=10, alone=(2e-6, 1e-6)):
    """A result with costs that are functions of the length n, or constants."""

    def of(cost, n):
        return cost(n) if callable(cost) else cost

    return {
        "mixer": "x",
        "device": "cpu",
        "using": {
            "d_model": 8,
            "batch": 1,
            "lengths": LENGTHS,
            "seconds": [[of(using, n) * f for f in (0.5, 1.0, 9.0)] for n in LENGTHS],
            "first": [1e-6] * 3,
            "state_bytes": [of(state, n) for n in LENGTHS],
        },
        "learning": [
            {
                "form": "",
                "d_model": 8,
                "tokens": LENGTHS[-1],
                "lengths": LENGTHS,
                "seconds": [[1e-6] * 3 for _ in LENGTHS],
                "alone": {"length": 8, "rows": 2, "one": [alone[0]] * 3, "many": [alone[1]] * 3},
                "kept_bytes": [of(kept, n) for n in LENGTHS],
            }
        ],
    }


@pytest.mark.slow
def test_a_job_leaves_all_that_the_summary_reads(tmp_path):
    results, told = {}, []
    jobs = TINY.jobs(tmp_path, {}, ())
    assert list(jobs) == list(MIXERS)
    assert len(jobs) == TINY.count()
    for name in ("softmax", "lstm"):
        folder = tmp_path / name
        folder.mkdir()
        results[name] = json.loads(json.dumps(jobs[name].run(folder, told.append)))
    assert 0 <= min(told) <= max(told) <= 1
    assert [form["form"] for form in results["softmax"]["learning"]] == ["math", "flash"]
    summary = TINY.summarise(results)
    assert all(len(row) == len(table.columns) for table in summary.tables for row in table.rows)
    rows = {row[0]: row for row in summary.tables[0].rows}
    assert set(rows) == set(MIXERS)  # those without results stand there empty
    assert rows["retention"][4:8] == ("–", "O(1)", "–", "–")
    assert "1.00 (1.00..1.00)" in rows["softmax"][7]  # the cache, exactly
    lines = [line for figure in summary.figures for panel in figure.panels for line in panel.lines]
    assert all(len(line.x) == len(line.y) == 5 for line in lines)


@pytest.mark.slow
def test_a_half_that_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    job = TINY.jobs(tmp_path, {}, ())["linear"]
    first = job.run(tmp_path, lambda _: None)
    (tmp_path / "part-1.json").unlink()  # as if it had been stopped in the second half

    def again(*arguments):
        raise AssertionError("it was measured again")

    monkeypatch.setattr(complexity, "_using", again)
    second = job.run(tmp_path, lambda _: None)
    assert second["using"] == first["using"]
    assert second["learning"][0]["kept_bytes"] == first["learning"][0]["kept_bytes"]


def test_findings_name_what_is_far_from_theory():
    good = {"softmax": made_up(using=lambda n: 1e-9 * n, state=lambda n: 64 * n, kept=lambda n: n * n)}
    assert "lie within 0.15 of theory" in complexity_summary.summarise(["softmax"], good).findings[0]
    bad = good | {"retention": made_up(using=lambda n: n**0.5)}
    first, *_ = complexity_summary.summarise(["softmax", "retention"], bad).findings
    assert first == "retention: the exponent of decoding time is 0.50 (0.50..0.50), theory says 0."


def test_one_outlier_a_length_moves_no_exponent():
    """Each length has a round nine times too slow: medians do not see it."""
    summary = complexity_summary.summarise(["retention"], {"retention": made_up()})
    assert summary.tables[0].rows[0][6] == "0.00 (0.00..0.00)"


def test_waiting_along_time_is_found():
    summary = complexity_summary.summarise(["lstm"], {"lstm": made_up(alone=(8e-6, 1e-6))})
    assert "lstm (token by token): trained alone, one sequence takes 8 " in summary.findings[-1]


def test_nothing_measured_is_said():
    assert TINY.summarise({}).findings == ("No mixer has been measured.",)


def test_every_mixer_has_its_place_in_the_papers_table():
    assert {mixer.paper_row for mixer in MIXERS.values()} == {*COMPLEXITY, None}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mixers": ["retentoin"]}, "retention"),
        ({"using": {"lengths": [8, 16, 32, 64]}}, "at least 5"),
        ({"using": {"lengths": [8, 16, 64, 32, 128]}}, "rise"),
        ({"using": {"batch": 0}}, "batch"),
        ({"learning": {"lengths": [8, 16, 24, 32, 64]}}, "24 does not divide"),
        ({"learning": {"rows": 1}}, "rows is 1"),
        ({"using": {"rounds": 0}}, "rounds is 0"),
        ({"using": {"heads": 4}}, "num_heads"),
    ],
)
def test_mistakes_end_in_a_sentence(settings, says):
    with pytest.raises(UserError, match=says):
        build(ComplexityMeasure, {"name": "complexity", **settings})


def test_what_no_memory_holds_is_refused(monkeypatch):
    monkeypatch.setattr(complexity, "free_memory", lambda device: 10**9)
    large = replace(TINY, using=Using(lengths=LENGTHS))
    with pytest.raises(UserError, match=r"needs about 3\.0 GiB .* 0\.9 GiB are free on cpu"):
        large.check()
    TINY.check()


@pytest.mark.parametrize("scale", ["laptop", "small", "paper"])
def test_shipped_scales_load(scale, tmp_path):
    data = tomllib.loads(config_path(f"studies/complexity/{scale}").read_text(encoding="utf-8"))
    measure = build(ComplexityMeasure, data["measure"])
    assert build(ComplexityMeasure, tomllib.loads(dump(measure))) == measure
    assert max(measure.using.lengths) >= 65536
    job = measure.jobs(tmp_path, {}, ())["retention"]
    assert build(ComplexityJob, tomllib.loads(dump(job))) == job
