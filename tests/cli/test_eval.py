"""`retnet eval` as a user meets it: tables and records of good commands, one sentence for wrong ones."""

import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from retnet.cli import cli
from retnet.data import DataConfig, Tokenizer
from retnet.io import write_text
from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.model.checkpoint import model_files, write_checkpoint
from retnet.settings import UserError, dump
from retnet.train.config import RunConfig
from tests.evals.local_tasks import write_tasks

RETNET = [sys.executable, "-c", "from retnet.cli import main; main()"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a run, a text it did not see, and questions."""
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    tokenizer = Tokenizer.load("bytes")
    config = ModelConfig(vocab_size=257, d_model=16, num_layers=1, mixer=RetentionConfig(num_heads=2))
    model = LanguageModel(config)
    files = {**model_files(model), "tokenizer.json": tokenizer.save}
    write_checkpoint(home / "run" / "checkpoints" / "step-00000010", files)
    write_text(home / "run" / "checkpoints" / "last", "step-00000010\n")
    (home / "corpus").mkdir()
    for i in range(12):
        (home / "corpus" / f"{i}.txt").write_text(
            f"Text {i}: the räin fell in torrents, {i * 77}.\n" * (3 + i)
        )
    data = DataConfig(corpus=str(home / "corpus"), validation_fraction=0.4)
    (home / "run" / "config.toml").write_text(dump(RunConfig(model=config, data=data)))
    (home / "new.jsonl").write_text(
        '{"text": "It was a dark and stormy night."}\n{"text": ""}\n{"text": "x"}\n'
    )
    write_tasks(home / "tasks")
    return home


def call(home, *words):
    """Output of `retnet eval`, which must succeed."""
    result = CliRunner().invoke(cli, ["eval", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*words):
    with pytest.raises(UserError) as error:
        CliRunner().invoke(cli, ["eval", *map(str, words)], catch_exceptions=False)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_perplexity_of_two_models_in_one_table_and_one_record(home, tmp_path):
    run, checkpoint = home / "run", home / "run" / "checkpoints" / "step-00000010"
    out = tmp_path / "record.json"
    options = ["--data", home / "new.jsonl", "--lengths", "16,8,16", "--device", "cpu", "--out", out]
    first, second = call(home, "perplexity", run, checkpoint, *options).split("\n\n")
    head, *rows = [line.split("\t") for line in first.splitlines()]
    assert head[:4] == ["model", "mode", "length", "perplexity per token"]
    assert [row[1:3] for row in rows] == [["windows", "8"], ["windows", "16"], ["carried", "whole"]] * 2
    record = json.loads(out.read_text())
    for model in record["models"]:
        assert model["tokens"] == record["data"]["bytes"] == 32
        assert model["sha256"] == record["models"][1]["sha256"]
        for result in model["results"]:
            assert result["perplexity"]["low"] < result["perplexity"]["value"] < result["perplexity"]["high"]
            assert sum(row["tokens"] for row in result["by_context"]) == 32
    assert record["data"]["documents"] == 2
    assert record["data"]["problems"] == {"empty document": 1}
    assert record["settings"]["lengths"] == [8, 16]
    assert {"retnet", "torch", "python"} <= record["versions"].keys()
    value = record["models"][0]["results"][0]["perplexity"]["value"]
    assert rows[0][3].startswith(f"{value:.4f} (")
    assert second.splitlines()[0].split("\t")[1:] == [
        f"{name}, {mode}" for name in (run, checkpoint) for mode in ("windows, 16", "carried, whole")
    ]


def test_without_data_a_run_is_measured_on_what_it_held_out(home, tmp_path):
    records = []
    for number, data in enumerate(([], ["--data", home / "run"])):
        out = tmp_path / f"{number}.json"
        call(home, "perplexity", home / "run", *data, "--mode", "carried", "--device", "cpu", "--out", out)
        records.append(json.loads(out.read_text()))
    assert 0 < records[0]["data"]["documents"] < 12
    for key in ("data", "models"):
        assert records[0][key] == records[1][key]


def test_tasks_beside_the_paper(home, tmp_path):
    pytest.importorskip("lm_eval")
    out = tmp_path / "tasks.json"
    words = ["tasks", home / "run", "--local", home / "tasks", "--device", "cpu", "--out", out]
    lines = [
        line.split("\t") for line in call(home, *words, "--tasks", "piqa, copa", "--limit", 3).splitlines()
    ]
    assert lines[0] == ["accuracy, %", "PIQA", "COPA", "average"]
    named = {line[0]: line[1:] for line in lines[1:]}
    assert named["paper: RetNet 6.7B, 0-shot"] == ["75.4", "77.0", "76.20"]
    assert named["paper: Transformer 6.7B, 4-shot"] == ["75.0", "71.0", "73.00"]
    record = json.loads(out.read_text())
    assert [result["num_fewshot"] for result in record["results"]] == [0, 4]
    for result in record["results"]:
        tasks = result["tasks"]
        assert {task["questions"] for task in tasks.values()} == {3}
        cells = named[f"{home / 'run'}, {result['num_fewshot']}-shot, acc"]
        assert cells[0].startswith(f"{100 * tasks['piqa']['acc']:.1f} ± ")
        average = (tasks["piqa"]["acc_norm"] + tasks["copa"]["acc"]) / 2
        assert result["average_acc_norm"] == pytest.approx(average)
        assert (
            named[f"{home / 'run'}, {result['num_fewshot']}-shot, acc_norm where given"][2]
            == f"{100 * average:.2f}"
        )
    assert len(record["local_files"]) == 4


@pytest.mark.slow
def test_tasks_in_a_process_of_their_own_without_a_network(home, tmp_path):
    """Nothing but the table goes to stdout, a dead proxy is not missed, and no cache of data stays behind."""
    pytest.importorskip("lm_eval")
    dead = {"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    words = ["eval", "tasks", str(home / "run"), "--local", str(home / "tasks"), "--num-fewshot", "0"]
    done = subprocess.run(
        [*RETNET, *words],
        cwd=tmp_path,
        env={**os.environ, **dead, "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
    assert "average" in done.stdout.splitlines()[0]
    assert not list(tmp_path.rglob("*.arrow"))


def test_mistakes_end_in_one_sentence(home, tmp_path, monkeypatch):
    run = home / "run"
    assert "no data" in fails("perplexity", run / "checkpoints" / "step-00000010")
    assert "no run at" in fails("perplexity", run, tmp_path / "nowhere", "--data", home / "new.jsonl")
    assert "must be whole numbers" in fails("perplexity", run, "--lengths", "many")
    assert "--lengths has 0; it must be at least 1" in fails("perplexity", run, "--lengths", "0,5")
    assert "no corpus" in fails("perplexity", run, "--data", tmp_path / "nowhere")
    assert "cannot write" in fails("perplexity", run, "--out", tmp_path / "no" / "record.json")
    assert "no checkpoint 'step-1'" in fails("perplexity", run, "--checkpoint", "step-1")
    assert "did you mean 'hellaswag'" in fails("tasks", run, "--tasks", "helaswag")
    assert "--num-fewshot is 'few'" in fails("tasks", run, "--num-fewshot", "few")
    assert "--batch-size has 0" in fails("tasks", run, "--batch-size", "0")
    assert "are missing" in fails("tasks", run, "--tasks", "piqa", "--local", tmp_path, "--device", "cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs scipy, which is missing; pip install 'retnet[eval]'" in fails("perplexity", run)
    assert "needs lm_eval" in fails("tasks", run)
