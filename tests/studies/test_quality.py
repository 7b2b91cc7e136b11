"""The measure `quality`: its plan of work, what it says of results, and the shipped studies."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from retnet import paper
from retnet.measure import footprint
from retnet.measure.memory import kept_for_backward
from retnet.model import LanguageModel
from retnet.settings import UserError, dump, load
from retnet.studies import estimate
from retnet.studies.quality import QualityMeasure, Variant
from retnet.studies.study import Study, load_study
from retnet.studies.study_files import find_study, shipped_studies
from retnet.train.config import RunConfig
from tests.helpers.fast import few_fast

OUT = Path("out")
ROWS = (Variant("A net", "smoke"), Variant("B net", "smoke"))


def quality(**fields):
    return QualityMeasure("quality", **{"rows": ROWS, "learning_rates": (1e-3, 1e-2), "seeds": 3, **fields})


def result(perplexity, seed=0, rate=1e-3, parameters=1_000_000):
    """What a job leaves behind, in short."""
    return {
        "learning_rate": rate,
        "seed": seed,
        "tokens": 4000,
        "parameters": parameters,
        "sets": {
            "in-domain": {
                "nats_per_token": perplexity / 100,
                "perplexity": perplexity,
                "bits_per_byte": perplexity / 50,
            }
        },
        "curve": {"steps": [1, 2], "loss": [5.0, perplexity / 100]},
    }


def everything(values):
    """Results of a study whose rows have these perplexities at (rate, seed)."""
    return {
        f"{row}.lr-{rate:g}.seed-{seed}": result(value, seed, rate)
        for row, numbers in values.items()
        for (rate, seed), value in numbers.items()
    }


def test_first_the_grid_then_the_seeds_of_the_best_rate():
    study = quality()
    first = study.jobs(OUT, {}, [])
    assert list(first) == [
        f"{row}.lr-{rate}.seed-0" for rate in ("0.001", "0.01") for row in ("a-net", "b-net")
    ]
    tuned = everything({"a-net": {(1e-3, 0): 30.0, (1e-2, 0): 20.0}})
    then = study.jobs(OUT, tuned, [])
    assert set(then) - set(first) == {"a-net.lr-0.01.seed-1", "a-net.lr-0.01.seed-2"}
    assert study.count() == 8


def test_a_failed_rate_does_not_hold_up_the_seeds():
    study = quality()
    results = everything({"a-net": {(1e-3, 0): 30.0}})
    then = study.jobs(OUT, results, ["a-net.lr-0.01.seed-0", "b-net.lr-0.001.seed-0", "b-net.lr-0.01.seed-0"])
    assert {name for name in then if name.startswith("a-net")} >= {
        "a-net.lr-0.001.seed-1",
        "a-net.lr-0.001.seed-2",
    }
    assert not any(name.endswith("seed-1") for name in then if name.startswith("b-net"))


def test_all_rows_are_trained_alike():
    rows = (
        Variant("A", "smoke"),
        Variant("B", "smoke", {"model": {"mixer": {"name": "softmax", "num_heads": 2}}}),
    )
    study = quality(rows=rows, settings={"train": {"steps": 7}, "data": {"tokenizer": "bpe:300"}})
    configs = [job.run_config for job in study.jobs(OUT, {}, []).values()]
    assert {c.model.mixer.name for c in configs} == {"retention", "softmax"}
    assert len({(c.data, c.train.steps, c.train.seed) for c in configs}) == 1
    assert {c.train.learning_rate for c in configs} == {1e-3, 1e-2}
    assert (configs[0].data.tokenizer, configs[0].data.cache) == ("bpe:300", "out/data")


def test_means_spreads_and_the_published_order():
    rows = (
        Variant("RetNet", "smoke", paper="RetNet"),
        Variant("H3", "smoke", paper="H3"),
        Variant("Other", "smoke"),
    )
    study = quality(rows=rows, published="architectures")
    best = {(1e-3, 1): 21.0, (1e-3, 2): 22.0}
    results = everything(
        {
            "retnet": {(1e-3, 0): 20.0, (1e-2, 0): 25.0, **best},
            "h3": {(1e-3, 0): 18.0, (1e-2, 0): 19.0, (1e-3, 1): 17.0, (1e-3, 2): 16.0},
            "other": {(1e-3, 0): 40.0},
        }
    )
    summary = study.summarise(results)
    table = {row[0]: row for row in summary.tables[0].rows}
    assert table["RetNet"][1:5] == ("1.00 M", "0.001", "3", "21.00 ± 1.00")
    assert table["RetNet"][5] == f"{paper.ARCHITECTURES['RetNet'][0]:.2f}"
    assert table["Other"][2:5] == ("0.001", "1", "40.00")  # one rate is missing: it may have failed
    assert table["Other"][5:] == ("–", "–")
    tuning = {row[0]: row[1:] for row in summary.tables[3].rows}
    assert tuning["RetNet"] == ("20.00 *", "25.00")
    said = " ".join(summary.findings)
    assert "best first: H3, RetNet, Other" in said
    assert "of 1 pairs" in said
    assert "1 in the reverse (RetNet before H3)" in said
    assert "H3 was best at the lowest learning rate" in said
    for table in summary.tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}


@pytest.mark.parametrize(
    ("here", "judged"), [((10, 11, 12), "1 stand in the same order"), ((10, 25, 30), "separate 1")]
)
def test_overlapping_seeds_separate_nothing(here, judged):
    rows = (Variant("RetNet", "smoke", paper="RetNet"), Variant("H3", "smoke", paper="H3"))
    study = quality(rows=rows, published="architectures", learning_rates=(1e-3,))
    values = {"retnet": here, "h3": (20, 21, 22)}
    results = everything({row: {(1e-3, s): x for s, x in enumerate(xs)} for row, xs in values.items()})
    assert judged in " ".join(study.summarise(results).findings)


def test_an_empty_study_has_a_summary():
    summary = quality(published="ablations", against="parameters").summarise({})
    assert summary.tables[0].rows[0] == ("A net", "–", "–", "0", "–", "–", "–")
    assert all(not panel.lines for figure in summary.figures for panel in figure.panels)


def test_rows_of_one_family_are_one_line_over_parameters():
    rows = (Variant("Net 1M", "smoke"), Variant("Net 2M", "smoke"))
    study = quality(rows=rows, learning_rates=(1e-3,), seeds=1, against="parameters")
    results = {
        "net-1m.lr-0.001.seed-0": result(30.0, parameters=1_000_000),
        "net-2m.lr-0.001.seed-0": result(20.0, parameters=2_000_000),
    }
    (line,) = study.summarise(results).figures[1].panels[0].lines
    assert (line.name, line.x, line.y) == ("Net", (1e6, 2e6), (30.0, 20.0))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rows": ()}, "rows is empty"),
        ({"learning_rates": ()}, "learning_rates is empty"),
        ({"learning_rates": (0.0,)}, "learning_rates has an item that is 0.0; it must be above 0"),
        ({"seeds": 0}, "seeds is 0"),
        ({"rows": (Variant("A net", "smoke"), Variant("A−net", "smoke"))}, "'a-net'"),
        ({"sets": {"in-domain": "stdlib"}}, "names of their own"),
    ],
)
def test_impossible_settings_are_refused(fields, said):
    with pytest.raises(UserError, match=said):
        quality(**fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"settings": {"train": {"step": 3}}},
            "row 'A net'.*unknown setting 'train.step'.*did you mean 'steps'",
        ),
        ({"rows": (Variant("A", "smokey"),)}, "row 'A': no configuration 'smokey'"),
        ({"settings": {"train": {"steps": 5, "warmup_steps": 5}}}, "A net: train.warmup_steps is 5"),
        ({"sets": {"plays": "nowhere.txt"}}, "nowhere.txt"),
    ],
)
def test_what_cannot_run_is_said_before_anything_runs(fields, said):
    with pytest.raises(UserError, match=said):
        quality(**fields).check()


@pytest.mark.parametrize("name", few_fast(["architectures", "ablations", "scaling"], "ablations", "scaling"))
def test_shipped_studies_are_whole(name, tmp_path, monkeypatch):
    # counting it takes a minute; tested below
    monkeypatch.setattr(footprint, "kept_bytes", lambda *_: (1, 1, 1))
    extra = {"gpu"} if name == "architectures" else set()
    assert set(shipped_studies()[name]) == {"laptop", "small", "paper"} | extra
    for scale in shipped_studies()[name]:
        study = load_study(find_study(name, scale))
        plans = study.measure.plans()
        assert len(plans) == len(study.measure.rows)
        assert sum(plan.runs for plan in plans) == study.measure.count()
        if name == "architectures":
            assert all(abs(plan.parameters / plans[0].parameters - 1) < 0.02 for plan in plans)
        rates = study.measure.learning_rates
        accumulate = [job.run_config.train.accumulate for job in study.measure.jobs(OUT, {}, []).values()]
        assert len(accumulate) == len(plans) * len(rates)
        assert all(
            n % study.processes == 0 for n in accumulate
        )  # each process takes as many passes of a step
        written = tmp_path / f"{scale}.toml"
        written.write_text(dump(study), encoding="utf-8")
        assert load(Study, written) == study


def test_plans_count_what_a_model_keeps():
    config = load(RunConfig, "configs/smoke.toml")
    plan = estimate.plan("smoke", config, runs=3)
    assert plan.tokens == config.train.steps * config.train.tokens_per_step
    assert plan.model_bytes == 16 * plan.parameters
    double = load(RunConfig, "configs/smoke.toml", {"train.batch_size": 2 * config.train.batch_size})
    assert estimate.plan("smoke", double, runs=3).pass_bytes == 2 * plan.pass_bytes
    lean = load(RunConfig, "configs/smoke.toml", {"train.activation_checkpointing": True})
    assert estimate.plan("smoke", lean, runs=3).pass_bytes < plan.pass_bytes
    assert plan.hours(plan.flops / 3600) == pytest.approx(3.0)
    learned = load(RunConfig, "configs/smoke.toml", {"data.tokenizer": "bpe:1257"})
    grown = estimate.plan("smoke", learned, runs=3).parameters - plan.parameters
    assert grown == 1000 * config.model.d_model  # embedding and head are tied


def test_what_all_blocks_share_is_counted_once():
    model = load(RunConfig, "configs/smoke.toml").model
    model = replace(model, vocab_size=257, num_layers=5)
    each, shared, _ = footprint.kept_bytes(replace(model, num_layers=1), 128)
    with torch.device("meta"):
        whole, x = LanguageModel(model), torch.empty(1, 128, model.d_model, requires_grad=True)

    def blocks():
        y, positions = x, whole.blocks[0].mixer.positions(x)
        for block in whole.blocks:
            y = block(y, None, positions)
        return y

    assert kept_for_backward(blocks, whole.parameters()) == 5 * each + shared
    assert shared == 2 * 4 * 128 * whole.blocks[0].mixer.key_dim // 2  # cos and sin


def test_a_budget_that_cannot_be_met_is_refused(monkeypatch):
    plan = estimate.plan("smoke", load(RunConfig, "configs/smoke.toml"), runs=1)
    monkeypatch.setattr(estimate, "rate", lambda: plan.flops / 3600 / estimate.UTILISATION)  # one hour
    assert estimate.require([plan], 1.0, 1, 1) == pytest.approx(1.0)
    with pytest.raises(UserError, match="about 1 hours of training would be needed here"):
        estimate.require([plan], 0.1, 1, 1)
    monkeypatch.setattr(estimate, "total_memory", lambda: 1000)
    with pytest.raises(UserError, match="smoke needs about 0 GiB"):
        estimate.require([plan], 1.0, 1, 1)
