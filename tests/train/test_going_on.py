"""Going on with a run: the same data, settings that may change and those that may not, checkpoints that are whole."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from retnet.convert import convert
from retnet.data import Tokenizer
from retnet.data.split import DIVISION
from retnet.engine import open_run
from retnet.evals.corpus import Corpus
from retnet.model.checkpoint import model_files, write_checkpoint
from retnet.model.runs import find_checkpoint
from retnet.settings import UserError, load
from retnet.train.config import RunConfig
from retnet.train.trainer import train
from tests.train.runs import Fails, equal, tiny, weights


def other_text(config_file, tmp_path) -> RunConfig:
    other = tmp_path / "other"
    shutil.copytree(load(RunConfig, config_file).data.corpus, other)
    (other / "03.txt").write_text("another text " * 50)
    run = tiny(config_file)
    return replace(run, data=replace(run.data, corpus=str(other)))


class TestSameData:
    """A run goes on with the tokens that it began with, and what is not the same is named."""

    def begun(self, run, path):
        """A run that made a step, and has no checkpoint yet."""
        with pytest.raises(RuntimeError, match="a bug"):
            train(run, path, progress=Fails(1))
        assert not list((path / "checkpoints").iterdir())

    @pytest.mark.parametrize("saved", [False, True])
    def test_another_corpus(self, saved, config_file, tmp_path):
        run = tiny(config_file)
        train(run, tmp_path / "run") if saved else self.begun(run, tmp_path / "run")
        other = other_text(config_file, tmp_path)
        before = (tmp_path / "run/data.json").read_text()
        with pytest.raises(
            UserError, match=r"^the corpus has changed since \S+run was begun, so the run cannot"
        ):
            train(other, tmp_path / "run", begin="resume")
        assert (tmp_path / "run/data.json").read_text() == before
        assert train(run, tmp_path / "run", begin="resume").finished

    def test_another_tokenizer(self, config_file, tmp_path):
        Tokenizer.train(["a b c"], 257).save(tmp_path / "tokenizer.json")
        run = tiny(config_file)
        run = replace(run, data=replace(run.data, tokenizer=str(tmp_path / "tokenizer.json")))
        self.begun(run, tmp_path / "run")
        Tokenizer.load("bytes").save(tmp_path / "tokenizer.json")
        with pytest.raises(UserError, match=r"^the tokenizer has changed since"):
            train(run, tmp_path / "run", begin="resume")

    def test_another_validation_text(self, config_file, tmp_path):
        (tmp_path / "v.txt").write_text("some words " * 50)
        run = tiny(config_file)
        run = replace(run, data=replace(run.data, validation=str(tmp_path / "v.txt")))
        self.begun(run, tmp_path / "run")
        (tmp_path / "v.txt").write_text("other words " * 50)
        with pytest.raises(UserError, match=r"^the validation text has changed since"):
            train(run, tmp_path / "run", begin="resume")

    def test_a_run_of_an_older_version_is_known_by_its_checkpoint(self, config_file, tmp_path):
        run = tiny(config_file)
        train(run, tmp_path / "run")
        said = (tmp_path / "run/data.json").read_text()
        (tmp_path / "run/data.json").unlink()
        with pytest.raises(UserError, match=r"^the corpus, or the rule .*, has changed since"):
            train(other_text(config_file, tmp_path), tmp_path / "run", begin="resume")
        assert train(run, tmp_path / "run", begin="resume").finished
        assert (tmp_path / "run/data.json").read_text() == said

    def test_text_that_lies_otherwise_is_where_eval_finds_it(self, config_file, tmp_path):
        """The same text in files of another kind, and the old ones gone: config.toml and data.json both know."""
        text = "some words " * 50
        (tmp_path / "v.txt").write_text(text)
        run = tiny(config_file)
        run = replace(run, data=replace(run.data, validation=str(tmp_path / "v.txt")))
        train(run, tmp_path / "run")
        (tmp_path / "v.jsonl").write_text(json.dumps({"text": text}) + "\n")
        (tmp_path / "v.txt").unlink()
        moved = replace(run, data=replace(run.data, validation=str(tmp_path / "v.jsonl")))
        assert train(moved, tmp_path / "run", begin="resume").finished
        corpus = Corpus([str(tmp_path / "run")])
        assert "".join(piece.text for piece in corpus.texts(pytest.fail)) == text

    def test_a_rule_of_division_that_changed_is_not_blamed_on_the_files(self, config_file, tmp_path):
        run = tiny(config_file)
        train(run, tmp_path / "run")
        record = tmp_path / "run/data.json"
        noted = json.loads(record.read_text())
        assert noted["division"] == DIVISION
        for division in (DIVISION + 1, None):  # of another version, of one that did not note it
            sides = ("train", "validation", "train_text", "validation_text")
            other = noted | dict.fromkeys(sides, "0" * 64) | {"division": division}
            record.write_text(json.dumps({name: x for name, x in other.items() if x is not None}))
            with pytest.raises(
                UserError, match=r"^the corpus, or the rule by which this version divides it, has"
            ):
                train(run, tmp_path / "run", begin="resume")
            with pytest.raises(
                UserError, match=r"its text, or the rule by which this version divides it, has"
            ):
                Corpus([str(tmp_path / "run")])

    def test_a_damaged_record(self, config_file, tmp_path):
        train(tiny(config_file), tmp_path / "run")
        (tmp_path / "run/data.json").write_text('{"train": 3}')
        with pytest.raises(UserError, match=r"cannot read \S+data.json: .*; restore it, or remove it"):
            train(tiny(config_file), tmp_path / "run", begin="resume")


class TestGoingOn:
    def test_a_finished_run_is_made_longer_and_says_so(self, config_file, tmp_path):
        constant = {"schedule": "constant", "checkpoint_every": 4}
        train(tiny(config_file, steps=4, **constant), tmp_path / "run")
        outcome = train(tiny(config_file, steps=8, **constant), tmp_path / "run", begin="resume")
        assert (outcome.step, outcome.finished) == (8, True)
        train(tiny(config_file, steps=8, **constant), tmp_path / "whole")
        assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))  # the schedule knows no length
        assert load(RunConfig, tmp_path / "run/config.toml").train.steps == 8
        (line,) = map(json.loads, (tmp_path / "run/changes.jsonl").read_text().splitlines())
        assert (line["step"], line["changes"]) == (4, ["train.steps: 4 → 8"])

    def test_a_call_that_cannot_go_on_changes_nothing(self, config_file, tmp_path):
        run = tiny(config_file)
        train(run, tmp_path / "run")
        other = tmp_path / "other.txt"
        other.write_text("another text " * 500)
        changed = replace(run, data=replace(run.data, corpus=str(other)), train=replace(run.train, steps=9))
        with pytest.raises(UserError, match="the corpus has changed since"):
            train(changed, tmp_path / "run", begin="resume")
        assert load(RunConfig, tmp_path / "run/config.toml").train.steps == 4
        assert not (tmp_path / "run/changes.jsonl").exists()

    def test_a_run_cannot_be_made_shorter_than_it_is(self, config_file, tmp_path):
        train(tiny(config_file), tmp_path / "run")
        with pytest.raises(UserError, match=r"has made 4 steps already; train.steps 3 is less"):
            train(tiny(config_file, steps=3), tmp_path / "run", begin="resume")

    def test_what_is_learned_cannot_change(self, config_file, tmp_path):
        train(tiny(config_file), tmp_path / "run")
        with pytest.raises(
            UserError, match=r"train.learning_rate: 0.01 → 0.5.*; --init \S+ begins it with these weights"
        ):
            train(tiny(config_file, learning_rate=0.5, steps=9), tmp_path / "run", begin="resume")
        assert load(RunConfig, tmp_path / "run/config.toml").train.steps == 4

    def test_the_same_corpus_by_another_path(self, config_file, tmp_path):
        run = tiny(config_file)
        train(run, tmp_path / "run")
        other = tmp_path / "linked"
        other.symlink_to(run.data.corpus)
        run = replace(run, data=replace(run.data, corpus=str(other), cache=str(tmp_path / "cache")))
        assert train(run, tmp_path / "run", begin="resume").finished

    def test_metrics_that_a_crash_damaged(self, config_file, tmp_path, caplog):
        """What is whole is kept, a line that was cut goes without a word, and anything else is said."""
        train(tiny(config_file), tmp_path / "run")
        file = tmp_path / "run/metrics.jsonl"
        whole = file.read_bytes()
        for damage, said in ((b'{"step": 4, "lo', False), (b"\xff\xfe\x00 NULs\n[3]\n", True)):
            file.write_bytes(whole + damage)
            assert train(tiny(config_file), tmp_path / "run", begin="resume").finished
            assert file.read_bytes() == whole
            assert ("metrics.jsonl had 2 lines that are no metrics; they are left out" in caplog.text) == said

    def test_a_copy_that_somebody_keeps_beside_the_checkpoints(self, config_file, tmp_path):
        constant = {"schedule": "constant"}
        train(tiny(config_file, **constant), tmp_path / "run")
        home = tmp_path / "run" / "checkpoints"
        shutil.copytree(home / "step-00000004", home / "step-00000004.bak")
        shutil.copytree(home / "step-00000004", home / "step-mine")
        assert train(tiny(config_file, steps=6, **constant), tmp_path / "run", begin="resume").step == 6
        assert (home / "step-00000004.bak").is_dir()


class TestWhole:
    def test_a_damaged_newest_checkpoint_names_the_one_to_go_on_from(self, config_file, tmp_path):
        run = tiny(config_file, steps=6, keep=5)
        train(run, tmp_path / "run")
        want = weights(tmp_path / "run")
        newest = tmp_path / "run/checkpoints/step-00000006/optimizer.safetensors"
        newest.write_bytes(newest.read_bytes()[:-9])
        with pytest.raises(
            UserError, match=r"step-00000004 is whole: --resume --checkpoint step-00000004 goes on"
        ):
            train(run, tmp_path / "run", begin="resume")
        assert train(run, tmp_path / "run", begin="resume", checkpoint="step-00000004").finished
        assert equal(weights(tmp_path / "run"), want)
        assert (tmp_path / "run/checkpoints/aside/step-00000006").is_dir()
        with pytest.raises(UserError, match="no checkpoint 'step-00000005'"):
            train(run, tmp_path / "run", begin="resume", checkpoint="step-00000005")

    @pytest.mark.parametrize("where", ["weight", "memory"])
    def test_what_is_not_finite_is_never_saved(self, where, config_file, tmp_path, monkeypatch):
        plain = torch.optim.AdamW.step

        def broken(self, *args, **options):
            plain(self, *args, **options)
            parameter = self.param_groups[0]["params"][1]
            target = parameter if where == "weight" else self.state[parameter]["exp_avg_sq"]
            if self.state[parameter]["step"] == 3:
                target.data.view(-1)[5] = float("nan")

        monkeypatch.setattr(torch.optim.AdamW, "step", broken)
        name = r"blocks.0\S+weight" + ("" if where == "weight" else "/exp_avg_sq")
        with pytest.raises(UserError, match=rf"{name} is not finite after step 3, so nothing was saved"):
            train(tiny(config_file, checkpoint_every=1), tmp_path / "run")
        assert (tmp_path / "run/checkpoints/last").read_text() == "step-00000002\n"

    def test_weights_that_broke_are_named_instead_of_documents(self, config_file, tmp_path, monkeypatch):
        plain = torch.optim.AdamW.step

        def broken(self, *args, **options):
            plain(self, *args, **options)
            parameter = self.param_groups[0]["params"][1]
            if self.state[parameter]["step"] == 2:
                parameter.data.view(-1)[5] = float("inf")

        monkeypatch.setattr(torch.optim.AdamW, "step", broken)
        with pytest.raises(
            UserError, match=r"at step 3, since blocks.0\S+weight is not finite after step 2"
        ) as told:
            train(tiny(config_file, checkpoint_every=9, eval_every=0), tmp_path / "run")
        assert "documents" not in str(told.value)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_checkpoint_that_somebody_made_of_such_numbers_is_not_opened(
        self, value, config_file, tmp_path
    ):
        run = tiny(config_file)
        train(run, tmp_path / "run")
        model = open_run(tmp_path / "run").model
        with torch.no_grad():
            model.blocks[0].mixer_norm.weight[3] = value
        path = find_checkpoint(tmp_path / "run")[0]
        kept = [name for name in os.listdir(path) if name not in ("manifest.json", *model_files(model))]
        kept_files = {
            name: partial(lambda name, to: shutil.copy(tmp_path / "kept" / name, to), name) for name in kept
        }
        shutil.copytree(path, tmp_path / "kept")
        write_checkpoint(path, {**model_files(model), **kept_files})
        for opening in (
            lambda: open_run(tmp_path / "run"),
            lambda: train(replace(run, train=replace(run.train, steps=6)), tmp_path / "run", begin="resume"),
            lambda: convert(tmp_path / "run", tmp_path / "folder"),
            lambda: train(tiny(config_file, start_from=str(tmp_path / "run")), tmp_path / "new"),
        ):
            with pytest.raises(
                UserError, match=r"blocks.0.mixer_norm.weight has (numbers that are not finite|1 values)"
            ):
                opening()
