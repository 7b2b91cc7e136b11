import json
import mmap
import tomllib
from dataclasses import replace

import pytest

from retnet.measure.memory import GIB
from retnet.model.cost import cost
from retnet.settings import UserError, build, config_path, dump
from retnet.studies import decoding
from retnet.studies.decoding import DecodingJob, DecodingMeasure
from retnet.studies.decoding_summary import OURS, PEER, summarise

MODEL = {"vocab_size": 32, "d_model": 32, "num_layers": 1, "mixer": {"name": "retention", "num_heads": 2}}
GRID = {
    "model": MODEL, "head_width": 16, "lengths": [16, 8192], "batches": [1, 2], "batch": 1,
    "rounds": 2, "seconds": 1e-9, "budget_gib": 0.003, "device": "cpu",
}  # fmt: skip


def measure(**settings):
    return build(DecodingMeasure, {"name": "decoding", "grid": GRID | settings})


def made_up():
    """A step of RetNet takes 1 ms a sequence; the Transformer's as long, and a µs a token and sequence."""
    rows = []
    for length in (1024, 8192, 32768):
        for batch in (1, 2, 4):
            for name, one in ((OURS, 1e-3), (PEER, 1e-3 + 1e-6 * length)):
                if name == OURS or batch * length <= 32768:
                    drift = (1.0, 1.1, 5.0)  # of the machine, the same for both
                    seconds = [batch * one * f for f in drift]
                    rows.append({"model": name, "length": length, "batch": batch, "seconds": seconds})
    speed = {"device": "cpu", "parameters": {OURS: 10, PEER: 10}, "rows": rows}
    memories = {
        name: {
            "batch": 1,
            "weight_bytes": 1000,
            "rows": [
                {"length": n, "state_bytes": 500 if name == OURS else n, "held_bytes": 2000}
                for n in (1024, 8192, 32768)
            ],
        }
        for name in (OURS, PEER)
    }
    return speed, memories


def test_jobs_leave_all_that_the_summary_reads(tmp_path):
    study, results, told = measure(), {}, []
    jobs = study.jobs(tmp_path, {}, ())
    assert list(jobs) == ["speed", "memory-retnet", "memory-transformer"]
    assert len(jobs) == study.count()
    for name, job in jobs.items():
        results[name] = json.loads(json.dumps(job.run(tmp_path, told.append)))
    assert 0 <= min(told) <= max(told) <= 1
    cells = {(r["model"], r["length"], r["batch"]) for r in results["speed"]["rows"]}
    assert (PEER, 8192, 1) in cells  # 2.1 MB of keys and values
    assert (PEER, 8192, 2) not in cells  # 4.2 MB are beyond the budget
    assert (OURS, 8192, 2) in cells
    state = results["memory-transformer"]["rows"][-1]["state_bytes"]
    assert state == 2 * 8192 * 32 * 4 + 8
    held = results["memory-transformer"]["rows"][-1]["held_bytes"]
    assert (
        held >= state - 4 * mmap.PAGESIZE
    )  # keys and values begin and end in pages that may be resident before
    weights = results["memory-retnet"]["weight_bytes"]
    assert weights == 4 * cost(study.grid.model).total
    summary = study.summarise(results)
    assert all(len(row) == len(table.columns) for table in summary.tables for row in table.rows)
    assert [f.name for f in summary.figures] == [
        "memory-over-length",
        "throughput-over-length",
        "latency-over-batch",
    ]


def test_ratios_are_formed_inside_rounds():
    """The machine was five times slower in the last round, for both: the ratio is the same in all."""
    table = summarise(*made_up(), batch=1, budget_gib=1).tables[0]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["8,192"][0] == f"{9192 / 1500:.3g}"
    assert rows["8,192"][2] == "9.19 (9.19..9.19)"  # (1 ms + 8.192 ms) ÷ 1 ms, batch 1
    assert rows["8,192"][1] == "9.19 (9.19..9.19), batches 4 and 4"
    assert (
        rows["32,768"][1] == "33.8 (33.8..33.8), batches 4 and 1"
    )  # a token each: 4 in 4 ms against 1 in 33.8 ms
    assert rows["32,768"][3] == "–"
    assert rows["paper, 6.7B at 8k"][:2] == ("3.4", "8.4")


def test_findings_stand_beside_the_papers():
    findings = summarise(*made_up(), batch=1, budget_gib=1).findings
    assert findings[0].startswith("At 8,192 tokens RetNet has 6.13 times less memory")
    assert findings[0].endswith("(the paper, 6.7B: 3.4, 8.4, 15.6).")
    assert any(
        "RetNet: a step takes 1 (1..1) times as long at 32,768 tokens as at 1,024" in f for f in findings
    )


def test_what_is_missing_leaves_the_rest():
    speed, memories = made_up()
    assert [t.title for t in summarise(None, {}, 1, 1).tables] == []
    assert summarise(None, {}, 1, 1).findings == ("Nothing that could be compared has been measured.",)
    alone = summarise(None, {OURS: memories[OURS]}, 1, 1)
    assert [f.name for f in alone.figures] == ["memory-over-length"]
    fast = summarise(speed, {PEER: memories[PEER]}, 1, 1)
    assert fast.tables[0].rows[0][1] == "–"
    assert len(fast.figures) == 3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch": 3}, "batch is 3"),
        ({"lengths": [4, 2]}, "that rise"),
        ({"batches": []}, "at least one"),
        ({"rounds": 0}, "rounds"),
        ({"budget": 3}, "budget_gib"),
        ({"model": MODEL | {"mixer": {"name": "softmax"}}}, "'softmax'"),
        ({"model": {k: v for k, v in MODEL.items() if k != "vocab_size"}}, "vocab_size"),
    ],
)
def test_mistakes_end_in_a_sentence(settings, says):
    with pytest.raises(UserError, match=says):
        measure(**settings)


def test_what_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(UserError, match="budget_gib is 1e-05"):
        measure(budget_gib=1e-5).check()
    monkeypatch.setattr(decoding, "free_memory", lambda device: GIB)
    measure().check()
    with pytest.raises(UserError, match="1 GiB are free on cpu"):
        measure(budget_gib=1.0).check()


@pytest.mark.parametrize("scale", ["laptop", "small", "paper"])
def test_shipped_scales_load(scale, tmp_path):
    data = tomllib.loads(config_path(f"studies/inference-cost/{scale}").read_text(encoding="utf-8"))
    study = build(DecodingMeasure, data["measure"])
    assert build(DecodingMeasure, tomllib.loads(dump(study))) == study
    assert 8192 in study.grid.lengths
    job = study.jobs(tmp_path, {}, ())["memory-retnet"]
    assert build(DecodingJob, tomllib.loads(dump(job))) == job


def test_a_size_beyond_this_machine_is_refused_with_its_numbers(monkeypatch):
    monkeypatch.setattr(decoding, "free_memory", lambda device: 16 * GIB)
    path = config_path("studies/inference-cost/paper")
    study = build(DecodingMeasure, tomllib.loads(path.read_text(encoding="utf-8"))["measure"])
    with pytest.raises(UserError, match=r"16 GiB are free .* smaller --scale"):
        replace(study, grid=replace(study.grid, device="cpu")).check()
