"""The measure `recall`: its tasks ask for what was told, a job learns and is repeatable, and what is said of results."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from retnet.mixers import MIXERS
from retnet.settings import UserError, build, dump, load
from retnet.studies.recall import RecallJob, RecallMeasure, RecallRow, RecallTask
from retnet.studies.recall_tasks import Vocabulary, needles, pairs
from retnet.studies.study import Study, load_study
from retnet.studies.study_files import find_study, shipped_studies

FEW = Vocabulary(keys=8, values=6, fillers=5)
TASK = RecallTask(
    FEW, pairs=(2,), asked_pairs=(2, 4), lengths=(8,), asked_lengths=(8, 16), needles=1, questions=64
)
TINY = RecallMeasure(
    "recall",
    rows=(RecallRow("A"), RecallRow("B", {"mixer": {"name": "softmax", "num_heads": 2}})),
    model={"d_model": 32, "num_layers": 1, "mixer": {"name": "retention", "num_heads": 2, "decay": "none"}},
    task=TASK,
    steps=120,
    tokens=256,
    learning_rates=(1e-2,),
    seeds=1,
    device="cpu",
)


def told(row):
    """Key → value of all pairs in a row: keys whose successor is a value."""
    values = range(FEW.keys, FEW.keys + FEW.values)
    return {k: v for k, v in pairwise(row.tolist()) if k < FEW.keys and v in values}


@pytest.mark.parametrize(
    "asked",
    [
        pairs(FEW, 50, 5, torch.Generator().manual_seed(0)),
        needles(FEW, 200, 9, 3, torch.Generator().manual_seed(1)),  # the shortest: needles alone
        needles(FEW, 200, 14, 3, torch.Generator().manual_seed(2)),
    ],
    ids=["pairs", "needles alone", "needles among fillers"],
)
def test_every_question_was_answered_before(asked):
    count = asked.answers.shape[1]
    for row, answers in zip(asked.tokens, asked.answers, strict=True):
        known, questions = told(row[:-count]), row[-count:].tolist()
        assert sorted(known) == sorted(questions)  # all keys differ, each is asked for once
        assert [known[question] for question in questions] == answers.tolist()


def test_a_needle_lies_anywhere_and_the_rest_is_hay():
    asked = needles(FEW, 500, 8, 1, torch.Generator().manual_seed(0))
    body = asked.tokens[:, :-1]
    places = (body < FEW.keys).int().argmax(1)
    assert set(places.tolist()) == set(range(6))
    assert ((body >= FEW.keys + FEW.values).sum(1) == 5).all()


def test_a_job_learns_and_does_the_same_again(tmp_path):
    job, said = TINY.jobs(tmp_path, {}, ())["b.lr-0.01.seed-0"], []
    found = job.run(tmp_path, said.append)
    assert found["pairs"]["2"] > 0.6  # a third is a guess among two values, a sixth among all
    assert found["curve"][0] > 2 * found["curve"][-1]
    assert 0 <= min(said) <= max(said) <= 1
    short = replace(job, train=replace(job.train, steps=3))
    assert short.run(tmp_path, said.append)["curve"] == short.run(tmp_path, said.append)["curve"]


def test_tables_and_sentences_say_what_was_found():
    study = replace(TINY, seeds=2, task=TASK)
    state = {"parameters": 9000, "state_bytes": 2048, "state_tokens": 12, "nats": 1.0}
    accuracy = {"a": (0.95, 0.2), "b": (1.0, 0.8)}
    results = {
        f"{row}.lr-0.01.seed-{seed}": {
            **state,
            "pairs": {"2": near, "4": far},
            "lengths": {"8": near, "16": far},
        }
        for row, (near, far) in accuracy.items()
        for seed in range(2)
    }
    del results["b.lr-0.01.seed-1"]
    summary = study.summarise(results)
    assert all({len(row) for row in table.rows} == {len(table.columns)} for table in summary.tables)
    assert summary.tables[0].rows[0] == ("A", "9 k", "2", "2", "95.0 ± 0.0", "20.0 ± 0.0")
    assert summary.tables[0].rows[1][3:] == ("1", "100.0", "80.0")
    assert summary.findings[0] == (
        "Associative recall, 2 pairs: right in at least 90% are B, A. At 4: B 80%, A 20%."
    )
    assert [len(panel.lines) for panel in summary.figures[0].panels] == [2, 2]
    assert study.summarise({}).tables[0].rows[0] == ("A", "–", "–", "0", "–", "–")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rows": []}, "rows is empty"),
        ({"rows": [{"label": "A"}, {"label": "a"}]}, "names of their own.*'a'"),
        ({"task": {"pairs": [200]}}, "200 pairs need as many different keys, and vocabulary.keys is 128"),
        ({"task": {"lengths": [8], "needles": 3}}, "take 9 tokens, but a length is 8"),
        ({"task": {"asked_lengths": []}}, "asked_lengths is empty"),
        ({"tokens": 90}, "tokens is 90, and one row has 128"),
        ({"rows": [{"label": "A", "model": {"mixer": {"name": "retentoin"}}}]}, "row 'A'.*retention"),
    ],
)
def test_mistakes_end_in_a_sentence(fields, says):
    with pytest.raises(UserError, match=says):
        build(RecallMeasure, {"name": "recall", "rows": [{"label": "A"}], **fields}).check()


def test_shipped_scales_compare_all_mixers_and_a_hybrid(tmp_path):
    assert set(shipped_studies()["recall"]) == {"laptop", "small"}
    for scale in shipped_studies()["recall"]:
        study = load_study(find_study("recall", scale))
        study.measure.check()
        models = [job.model for job in study.measure.jobs(tmp_path, {}, ()).values()]
        assert {name for model in models for name in (m.name for m in model.mixers_by_layer)} == set(MIXERS)
        assert sum(not model.is_uniform for model in models) == len(study.measure.learning_rates)
        written = tmp_path / f"{scale}.toml"
        written.write_text(dump(study), encoding="utf-8")
        assert load(Study, written) == study
        job = next(iter(study.measure.jobs(tmp_path, {}, ()).values()))
        written.write_text(dump(job), encoding="utf-8")
        assert load(RecallJob, written) == job
