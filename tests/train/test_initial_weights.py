"""Runs that start from weights: of a run, a folder, another model."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from retnet.cli.train import command
from retnet.convert import convert
from retnet.data import Tokenizer
from retnet.model import ModelConfig
from retnet.model.cost import cost
from retnet.settings import UserError, load
from retnet.train.config import RunConfig
from retnet.train.progress import TrainingProgress
from retnet.train.trainer import train
from tests.train.runs import equal, tiny, weights


class TestInit:
    def test_from_a_run_with_another_learning_rate(self, config_file, tmp_path):
        train(tiny(config_file), tmp_path / "old")
        run = tiny(
            config_file, start_from=str(tmp_path / "old"), learning_rate=0.0, weight_decay=0.0, steps=1
        )
        train(run, tmp_path / "new")
        assert equal(
            weights(tmp_path / "new"), weights(tmp_path / "old", "step-00000004")
        )  # its best is its last
        origin = json.loads((tmp_path / "new/origin.json").read_text())
        assert (origin["kind"], origin["source"]) == ("run", str(tmp_path / "old"))
        assert "model.safetensors" in origin["sha256"]

    def test_the_same_tokenizer_needs_no_word(self, config_file, tmp_path, capsys):
        train(tiny(config_file), tmp_path / "old")
        train(
            tiny(config_file, start_from=str(tmp_path / "old")), tmp_path / "new", progress=TrainingProgress()
        )
        assert "tokenizer" not in capsys.readouterr().err

    def test_a_new_run_whose_tokenizer_is_still_to_be_learned(self, config_file, tmp_path):
        run = tiny(config_file, steps=1)
        run = replace(run, data=replace(run.data, tokenizer="bpe:270"))
        train(run, tmp_path / "new")
        assert load(RunConfig, tmp_path / "new/config.toml").model.vocab_size == 270

    def test_from_a_folder_without_a_model_table(self, config_file, tmp_path):
        train(tiny(config_file), tmp_path / "old")
        convert(tmp_path / "old", tmp_path / "folder", to="hf")
        run = replace(tiny(config_file, start_from=str(tmp_path / "folder"), steps=2), model=ModelConfig())
        assert train(run, tmp_path / "new").finished
        assert load(RunConfig, tmp_path / "new/config.toml").model.d_model == 16

    def test_a_dry_run_counts_the_model_of_the_weights_and_writes_nothing(self, config_file, tmp_path):
        train(tiny(config_file, steps=1), tmp_path / "old")
        (tmp_path / "new.toml").write_text("[data]\n")
        before = sorted(tmp_path.rglob("*"))
        words = [tmp_path / "new.toml", "--init", tmp_path / "old", "--dry-run", "--memory", 8]
        words += ["--run-dir", tmp_path / "new"]
        done = CliRunner().invoke(command, list(map(str, words)), catch_exceptions=False)
        model = load(RunConfig, tmp_path / "old/config.toml").model
        assert done.output.startswith(f"{cost(model).total:,} parameters")
        assert sorted(tmp_path.rglob("*")) == before

    def test_resumed_without_the_source(self, config_file, tmp_path):
        train(tiny(config_file), tmp_path / "old")
        train(tiny(config_file, start_from=str(tmp_path / "old")), tmp_path / "new")
        (tmp_path / "old").rename(tmp_path / "gone")
        run = tiny(config_file, steps=6)
        assert train(run, tmp_path / "new", begin="resume").step == 6

    def test_weights_that_a_resumed_run_would_not_read_are_refused(self, config_file, tmp_path):
        train(tiny(config_file), tmp_path / "old")
        other = tiny(config_file, start_from=str(tmp_path / "old"), steps=6)
        with pytest.raises(
            UserError, match=r"old was begun with fresh weights .* --init \S+old would not be read"
        ):
            train(other, tmp_path / "old", begin="resume-or-start")
        train(other, tmp_path / "new")
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "old")
        same = tiny(config_file, start_from=str(link), steps=7)
        assert train(same, tmp_path / "new", begin="resume-or-start").step == 7

    def test_another_model_is_refused_by_name(self, config_file, tmp_path):
        train(tiny(config_file), tmp_path / "old")
        run = tiny(config_file, start_from=str(tmp_path / "old"))
        run = replace(run, model=replace(run.model, d_model=32))
        with pytest.raises(UserError, match=r"holds another model .*: model.d_model 32, there 16"):
            train(run, tmp_path / "new")

    def test_another_vocabulary_is_refused_and_another_tokenizer_is_said(self, config_file, tmp_path, capsys):
        Tokenizer.train(["a b c the quick brown fox"], 257).save(tmp_path / "tokenizer.json")
        old = tiny(config_file)
        old = replace(old, data=replace(old.data, tokenizer=str(tmp_path / "tokenizer.json")))
        train(old, tmp_path / "old")
        run = tiny(config_file, start_from=str(tmp_path / "old"))
        for size in (100, 300):
            other = replace(run, model=replace(run.model, vocab_size=size))
            with pytest.raises(
                UserError, match=rf"holds another model .*: model.vocab_size {size}, there 257"
            ):
                train(other, tmp_path / "new")
        train(run, tmp_path / "new", progress=TrainingProgress())
        said = "the tokenizer that its weights were trained with is used, not data.tokenizer 'bytes'"
        assert said in capsys.readouterr().err
        train(run, tmp_path / "new", begin="resume", progress=TrainingProgress())
        assert said not in capsys.readouterr().err

    def test_nothing_there(self, config_file, tmp_path):
        with pytest.raises(UserError, match=r"there is no"):
            train(tiny(config_file, start_from=str(tmp_path / "nowhere")), tmp_path / "new")
        assert not (tmp_path / "new").exists()
