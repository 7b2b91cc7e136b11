"""The measure `linearization`: its order of work, what its runs are made of, and what is said of results."""

import pytest

from retnet.settings import UserError, build, dump, load
from retnet.studies.linearization import LinearizationMeasure
from retnet.studies.study import Study, load_study
from retnet.studies.study_files import find_study
from retnet.tables import MISSING

SHIPPED = load_study(find_study("linearization", "laptop"), {"measure.settings.train.accumulate": 2})


def stages(teacher, aligned, distilled, scratch):
    bits = {
        "teacher": teacher,
        "0-transfer": 9.0,
        "1-align": aligned,
        "2-distil": distilled,
        "scratch": scratch,
    }
    return {"stages": {name: {"bits_per_byte": x} for name, x in bits.items()}}


def test_students_wait_for_the_teacher_and_share_its_data(tmp_path):
    measure = SHIPPED.measure
    assert list(measure.jobs(tmp_path, {}, [])) == ["teacher"]
    jobs = measure.jobs(tmp_path, {"teacher": {}}, [])
    assert len(jobs) == measure.count() == 7
    teacher = jobs["teacher"].run_config
    for name, job in jobs.items():
        if name == "teacher":
            continue
        made = job.linearization
        assert made.teacher == str(tmp_path / "jobs/teacher/run")
        share = float(name.split("share-")[1].split(".seed")[0])
        assert made.how.align_steps + made.how.distil_steps == round(teacher.train.steps * share)
        assert made.settings["data"]["corpus"] == teacher.data.corpus
        runs = [*made.stages(tmp_path).values(), made.scratch(tmp_path, teacher.model)]
        assert {run.train.tokens_per_step for run in runs} == {teacher.train.tokens_per_step}
        assert {run.train.warmup_steps * 20 <= max(run.train.steps, 20) for run in runs} == {True}
    (tmp_path / "study.toml").write_text(dump(SHIPPED), encoding="utf-8")
    assert load(Study, tmp_path / "study.toml") == SHIPPED
    (tmp_path / "job.toml").write_text(dump(job), encoding="utf-8")
    assert load(type(job), tmp_path / "job.toml") == job


def test_the_gap_that_is_closed():
    results = {
        "retnet.share-0.05.seed-0": stages(1.0, 3.0, 2.0, 2.0),
        "retnet.share-0.2.seed-0": stages(1.0, 2.0, 1.2, 2.0),
    }
    summary = SHIPPED.measure.summarise(results)
    table = {row[:2]: row[2:] for row in summary.tables[0].rows}
    assert table["RetNet", "20%"] == ("1", "1.000", "9.000", "2.000", "1.200", "2.000", "80 %")
    assert table["RetNet", "10%"][0] == "0"
    assert summary.findings[0].endswith(
        "closes 0% of the gap between scratch and teacher: less than the 80% that are wanted."
    )
    assert summary.findings[1].endswith(
        "closes 80% of the gap between scratch and teacher: at least the 80% that are wanted."
    )
    names = [line.name for line in summary.figures[0].panels[0].lines]
    assert names == ["RetNet, scratch", "RetNet, aligned", "RetNet, distilled", "teacher"]
    summary = SHIPPED.measure.summarise({"retnet.share-0.2.seed-0": stages(2.0, 2.0, 1.9, 1.8)})
    assert {row[:2]: row[-1] for row in summary.tables[0].rows}["RetNet", "20%"] == MISSING
    assert summary.findings[0].endswith("scratch is as good as the teacher, so there is no gap.")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rows": []}, "rows is empty"),
        ({"rows": [{"label": "A", "how": {"keep_softmax": "4"}}]}, "row 'A': keep_softmax is '4'"),
        (
            {"rows": [{"label": "A", "how": {"keep_softmax": "every:99"}}]},
            "row 'A': every:99 layers cannot stay",
        ),
        ({"rows": [{"label": "teacher"}]}, "names of their own"),
        ({"config": "variants/retention"}, "row 'A': the teacher's layers must be softmax"),
    ],
)
def test_mistakes_end_in_a_sentence(fields, says):
    given = {"name": "linearization", "rows": [{"label": "A"}], "config": "variants/softmax", **fields}
    with pytest.raises(UserError, match=says):
        build(LinearizationMeasure, given).check()
