import json
import tomllib
from dataclasses import replace

import pytest
import torch

from retnet.measure.memory import GIB
from retnet.paper import TRAINED, TRAINING_COST
from retnet.settings import UserError, build, config_path, dump
from retnet.studies import training
from retnet.studies.training import TrainingJob, TrainingMeasure, need
from retnet.studies.training_summary import FLASH, OURS, PLAIN, summarise

CPU = torch.device("cpu")
MODEL = {"vocab_size": 32, "d_model": 32, "num_layers": 1, "mixer": {"name": "retention", "num_heads": 2}}
STEPS = {
    "sizes": [{"label": "tiny", "model": MODEL}],
    "lengths": [16, 64], "tokens": 128, "head_width": 16, "rounds": 2, "device": "cpu",
}  # fmt: skip


def measure(**settings):
    return build(TrainingMeasure, {"name": "training", "steps": STEPS | settings})


def shipped(scale):
    path = config_path(f"studies/training-cost/{scale}")
    return build(TrainingMeasure, tomllib.loads(path.read_text(encoding="utf-8"))["measure"])


def speed(**seconds):
    rows = [
        {"kind": kind, "length": length, "seconds": [s, 2 * s]}
        for kind, by_length in (("Transformer", "plain"), (FLASH, "flash"), (OURS, "ours"))
        for length, s in seconds.get(by_length, {}).items()
    ]
    return {"device": "cpu", "parameters": {FLASH: 5, OURS: 5}, "rows": rows, "skipped": []}


def test_jobs_leave_all_that_the_summary_reads(tmp_path):
    study, results, told = measure(), {}, []
    jobs = study.jobs(tmp_path, {}, ())
    assert len(jobs) == study.count() == 1 + 3 * 2
    for name in ("speed-tiny", "memory-tiny-transformer-64", "memory-tiny-flash-64", "memory-tiny-retnet-64"):
        results[name] = json.loads(json.dumps(jobs[name].run(tmp_path, told.append)))
    assert 0 <= min(told) <= max(told) <= 1
    assert {(r["kind"], r["length"]) for r in results["speed-tiny"]["rows"]} == {
        (kind, length) for kind in TRAINED for length in (16, 64)
    }
    fixed, _ = need(study.steps, study.steps.sizes[0], "retnet", 64, CPU)
    assert results["memory-tiny-retnet-64"]["peak_bytes"] > fixed / 2
    summary = study.summarise(results)
    assert all(len(row) == len(table.columns) for table in summary.tables for row in table.rows)
    assert [figure.name for figure in summary.figures] == ["training-cost-tiny"]
    assert all(line.y for panel in summary.figures[0].panels for line in panel.lines)


@pytest.mark.slow
def test_memory_beside_the_time(tmp_path):
    """One job a size, which says what its steps took; compiled, and with blocks computed again."""
    study = measure(memory="step", activation_checkpointing=True)
    jobs = study.jobs(tmp_path, {}, ())
    assert list(jobs) == ["speed-tiny"]
    assert study.count() == 1
    found = json.loads(json.dumps(jobs["speed-tiny"].run(tmp_path, lambda _: None)))
    weights = 4 * found["parameters"][OURS]
    assert all(row["peak_bytes"] >= 3 * weights for row in found["rows"])  # weights and two moments, at least
    summary = study.summarise({"speed-tiny": found})
    assert all(cell != "–" for row in summary.tables[0].rows for cell in row)
    assert any(note.startswith("Activation checkpointing") for note in summary.tables[0].notes)


@pytest.mark.slow
def test_models_for_which_there_is_no_room_together_are_measured_in_turn(tmp_path, monkeypatch):
    study = measure(memory="step", lengths=[64])
    size = study.steps.sizes[0]
    most = max(sum(need(study.steps, size, kind, 64, CPU)) for kind in training.KINDS)
    monkeypatch.setattr(training, "free_memory", lambda device: (most + 1) / training.SHARE)
    found = study.jobs(tmp_path, {}, ())["speed-tiny"].run(tmp_path, lambda _: None)
    assert not found["interleaved"]
    assert {row["kind"] for row in found["rows"]} == set(TRAINED)
    notes = study.summarise({"speed-tiny": found}).tables[0].notes
    assert any("one after the other" in note for note in notes)


def test_needs_grow_as_the_models_do():
    """Equal tokens a step: only plain attention needs more of longer sequences, by its scores."""
    study = shipped("laptop")
    size = study.steps.sizes[-1]
    grown = {
        kind: need(study.steps, size, kind, 8192, CPU)[1] - need(study.steps, size, kind, 1024, CPU)[1]
        for kind in training.KINDS
    }
    heads, layers = size.model.d_model // study.steps.head_width, size.model.num_layers
    scores = 4 * heads * study.steps.tokens * (8192 - 1024)
    backward = 2  # matrices of scores that the backward pass of a layer makes besides
    assert grown["transformer"] == pytest.approx((layers + backward) * scores, rel=0.1)
    assert grown["flash"] == 0
    assert abs(grown["retnet"]) < 0.1 * need(study.steps, size, "retnet", 1024, CPU)[1]


def test_weights_gradients_and_moments_are_sixteen_bytes_a_parameter():
    study = measure()
    fixed, _ = need(study.steps, study.steps.sizes[0], "retnet", 16, CPU)
    assert fixed == 16 * (8 * 32**2 + 4 * 32**2 + 32 * 32 + 2 * 3 * 32)


def test_what_does_not_fit_is_left_out_with_its_reason(tmp_path, monkeypatch):
    """So much memory that all but the plain formula at 64 tokens fit."""
    study = measure(tokens=4096, lengths=[16, 1024])
    size = study.steps.sizes[0]
    fixed, step = need(study.steps, size, "transformer", 1024, CPU)
    assert all(2 * fixed + need(study.steps, size, k, 1024, CPU)[1] < step for k in ("flash", "retnet"))
    monkeypatch.setattr(training, "free_memory", lambda device: (fixed + step - 1) / training.SHARE)
    study.check()
    jobs = study.jobs(tmp_path, {}, ())
    left = jobs["memory-tiny-transformer-1024"].run(tmp_path, lambda _: None)
    assert list(left) == ["skipped"]
    assert left["skipped"].startswith("Transformer, tiny, sequences of 1,024: a step, whose scores")
    fast = jobs["speed-tiny"].run(tmp_path, lambda _: None)
    assert len(fast["rows"]) == 5
    assert len(fast["skipped"]) == 1
    summary = study.summarise({"memory-tiny-transformer-1024": left, "speed-tiny": fast})
    notes = [note for note in summary.tables[0].notes if note.startswith("Not tried")]
    assert len(notes) == 2
    assert "tiny: 2 measurements were not tried" in " ".join(summary.findings)


def test_ratios_are_formed_inside_rounds():
    found = speed(plain={64: 4.0}, flash={16: 1.0, 64: 3.0}, ours={16: 2.0, 64: 2.0})
    memories = {("x", PLAIN, 64): {"peak_bytes": 400}, ("x", OURS, 64): {"peak_bytes": 100}}
    summary = summarise(["x"], [16, 64], 128, {"x": found}, memories)
    rows = {row[0]: row[1:] for row in summary.tables[0].rows}
    assert rows["64"][:2] == ("2 (2..2)", "1.5 (1.5..1.5)")
    assert rows["16"][:2] == ("–", "0.5 (0.5..0.5)")
    assert rows["64"][2:5] == ("24", "32", "48")
    assert rows["64"][5:] == ("0.391 KiB", "–", "100 bytes")
    findings = " ".join(summary.findings)
    assert "x: at 64 tokens RetNet trains 2 (2..2) times as fast as the Transformer." in findings
    assert "x: at 64 tokens RetNet takes 0.25 of the memory of the Transformer." in findings


def test_published_numbers_stand_beside():
    summary = summarise(["1.3B"], [8192], 8192, {}, {})
    rows = {row[0]: row for row in summary.tables[-1].rows}
    assert rows["6.7B"][-3:] == ("69.0", "51.4", "48.0")
    assert rows["1.3B"][1:3] == ("6.77", "1.15")
    assert set(rows) == set(TRAINING_COST)
    assert "the paper's RetNet trains 6.77 and 1.15 times as fast" in summary.findings[0]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tokens": 100}, "length 16 does not divide tokens = 100"),
        ({"lengths": []}, "at least one"),
        ({"sizes": []}, "sizes"),
        ({"sizes": STEPS["sizes"] * 2}, "label"),
        ({"rounds": 0}, "rounds is 0"),
        ({"sizes": [{"label": "a", "model": MODEL | {"mixer": {"name": "lstm"}}}]}, "'lstm'"),
        ({"sizes": [{"label": "a", "model": MODEL | {"vocab_size": None}}]}, "vocab_size"),
        ({"sizes": [{"label": "a", "model": MODEL | {"width": 3}}]}, "width"),
    ],
)
def test_mistakes_end_in_a_sentence(settings, says):
    with pytest.raises(UserError, match=says):
        measure(**settings)


def test_sizes_beyond_this_machine_are_refused(monkeypatch):
    monkeypatch.setattr(training, "free_memory", lambda device: 64 * GIB)
    study = shipped("paper")
    with pytest.raises(UserError, match=r"a step of 1\.3B takes about .* smaller --scale"):
        replace(study, steps=replace(study.steps, device="cpu")).check()


@pytest.mark.parametrize("scale", ["laptop", "small", "paper"])
def test_shipped_scales_load(scale, tmp_path):
    study = shipped(scale)
    assert build(TrainingMeasure, tomllib.loads(dump(study))) == study
    assert 8192 in study.steps.lengths
    jobs = study.jobs(tmp_path, {}, ())
    assert build(TrainingJob, tomllib.loads(dump(job := list(jobs.values())[-1]))) == job
    if scale == "paper":
        assert [size.label for size in study.steps.sizes] == list(TRAINING_COST)
        assert all(size.model.mixer.chunk_size == 512 for size in study.steps.sizes)
