"""Training: what a run directory holds, exact resume after real kills, signals, and clear ends."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from retnet import host
from retnet.data import Batches, prepare
from retnet.model import LanguageModel
from retnet.model.checkpoint import load_model, verify
from retnet.settings import UserError, load
from retnet.train.config import RunConfig, TrainConfig
from retnet.train.objective import Objective, evaluate
from retnet.train.progress import TrainingProgress
from retnet.train.run_dir import RunDirectory, changes
from retnet.train.step_meter import MEASURED
from retnet.train.trackers import TensorBoard
from retnet.train.trainer import train


def config(config_file, **train_changes) -> RunConfig:
    run = load(RunConfig, config_file)
    return replace(run, train=replace(run.train, **train_changes))


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    last = (run_dir / "checkpoints" / "last").read_text().strip()
    verify(run_dir / "checkpoints" / last)
    return load_file(run_dir / "checkpoints" / last / "model.safetensors")


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_speed(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def assert_identical(run_dir: Path, other: Path) -> None:
    """Bit-identical weights, the same metrics in the same order, and the same best checkpoint."""
    got, want = final_weights(run_dir), final_weights(other)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert without_speed(metrics(run_dir)) == without_speed(metrics(other))
    assert (run_dir / "checkpoints/best").read_text() == (other / "checkpoints/best").read_text()


@pytest.fixture(scope="session")
def uninterrupted(config_file, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(load(RunConfig, config_file), path)
    return path


@pytest.fixture
def drive(forks, config_file):
    """What becomes of `driver.py`, in a process of its own."""

    def run(run_dir: Path, *words: str) -> subprocess.CompletedProcess:
        return forks.run([config_file, run_dir, *words], run_dir.parent, call="tests.train.driver:main")

    return run


class TestRunDirectory:
    def test_holds_what_was_run(self, uninterrupted, config_file):
        resolved = load(RunConfig, uninterrupted / "config.toml")
        assert resolved.model.vocab_size == 257  # that of the tokenizer, resolved
        assert changes(load(RunConfig, config_file), resolved) == ["model.vocab_size: None → 257"]
        environment = json.loads((uninterrupted / "env.json").read_text())
        assert environment["versions"]["torch"] == torch.__version__
        assert environment["cpu"]
        lines = metrics(uninterrupted)
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
        assert [line["step"] for line in lines if "validation_bits_per_byte" in line] == [4, 8, 12]

    def test_loss_falls(self, uninterrupted):
        losses = [line["loss"] for line in metrics(uninterrupted) if "loss" in line]
        assert losses[0] > 5
        assert losses[-1] < losses[0] - 1

    def test_keeps_the_last_and_the_best(self, uninterrupted):
        home = uninterrupted / "checkpoints"
        steps = sorted(path.name for path in home.iterdir() if path.is_dir())
        best = (home / "best").read_text().strip()
        assert steps == sorted({"step-00000009", "step-00000012", best})
        assert (home / "last").read_text() == "step-00000012\n"
        bits = {
            line["step"]: line["validation_bits_per_byte"]
            for line in metrics(uninterrupted)
            if "validation_loss" in line
        }
        assert best == f"step-{min(bits, key=bits.get):08d}"
        assert not list(home.glob(".*"))

    def test_the_checkpoint_is_the_model_that_was_validated(self, uninterrupted, config_file):
        path = uninterrupted / "checkpoints/step-00000012"
        model = load_model(path)
        run = load(RunConfig, config_file)
        prepared = prepare(run.data)
        text = prepared.validation
        logged = [line for line in metrics(uninterrupted) if "validation_loss" in line][-1]
        got = evaluate(
            Objective(model),
            Batches(text, seq_len=32, batch_size=5, seed=0),  # the same windows in other batches
            bytes_per_token=text.num_bytes / text.num_tokens,
            device=torch.device("cpu"),
            autocast=torch.autocast("cpu", enabled=False),
        )
        assert got.tokens == text.num_tokens - 1
        assert math.isclose(got.loss, logged["validation_loss"], rel_tol=1e-5)
        assert math.isclose(
            got.bits_per_byte, got.loss / math.log(2) * text.num_tokens / text.num_bytes, rel_tol=1e-9
        )


KILLS = {
    "first step": "retnet.train.objective:Objective.forward:1",
    "before the optimiser": "retnet.train.trainer:learning_rate:12",
    "validation": "retnet.train.trainer:evaluate:2",
    "first file of a checkpoint": "retnet.model.checkpoint:flush:1",
    "inside a later checkpoint": "retnet.model.checkpoint:flush:13",
    "before the rename": "retnet.model.checkpoint:Path.rename:2",
    "before the pointers": "retnet.train.run_dir:RunDirectory.point:3",
    "while an old checkpoint is removed": "retnet.train.run_dir:shutil.rmtree:4",
}


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS.keys())
def test_killed_and_resumed_is_bit_identical(kill, uninterrupted, drive, tmp_path):
    run_dir = tmp_path / "run"
    assert drive(run_dir, "--kill", kill).returncode == -9
    done = drive(run_dir, "--resume")
    assert done.returncode == 0, done.stderr
    assert_identical(run_dir, uninterrupted)
    assert not list((run_dir / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_killed_many_times(uninterrupted, drive, tmp_path):
    run_dir = tmp_path / "run"
    for n in (9, 8, 7):
        kill = f"retnet.train.objective:Objective.forward:{n}"
        result = drive(run_dir, "--resume-or-start", "--kill", kill)
        assert result.returncode == -9
    assert drive(run_dir, "--resume").returncode == 0
    assert_identical(run_dir, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_ends_cleanly(name, uninterrupted, drive, tmp_path):
    run_dir = tmp_path / "run"
    stopped = drive(run_dir, "--signal", f"{name}@retnet.train.objective:Objective.forward:8")
    assert stopped.returncode == 0, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert f"{name}: saved at step 4 of 12; --resume continues" in stopped.stderr
    assert (run_dir / "checkpoints/last").read_text() == "step-00000004\n"
    assert drive(run_dir, "--resume").returncode == 0
    got, want = final_weights(run_dir), final_weights(uninterrupted)
    assert all(torch.equal(got[name], want[name]) for name in want)


class TestEnds:
    def test_resuming_a_finished_run_changes_nothing(self, config_file, tmp_path):
        tiny = config(config_file, steps=3)
        train(tiny, tmp_path / "run")
        before = final_weights(tmp_path / "run")
        outcome = train(tiny, tmp_path / "run", begin="resume")
        assert outcome.finished
        assert all(torch.equal(w, before[n]) for n, w in final_weights(tmp_path / "run").items())

    def test_a_directory_in_use_is_not_overwritten(self, uninterrupted, config_file):
        with pytest.raises(UserError, match="already holds a run; --resume continues it"):
            train(load(RunConfig, config_file), uninterrupted)

    def test_other_settings_cannot_resume(self, uninterrupted, config_file):
        with pytest.raises(UserError, match=r"train.learning_rate: 0.01 → 0.5.* another --run-dir"):
            train(config(config_file, learning_rate=0.5), uninterrupted, begin="resume")

    def test_harmless_settings_can(self, config_file, tmp_path):
        train(config(config_file, steps=2), tmp_path / "run")
        assert train(
            config(config_file, steps=2, keep=5, log_every=7), tmp_path / "run", begin="resume"
        ).finished

    def test_a_changed_corpus_cannot_resume(self, config_file, tmp_path):
        run = config(config_file, steps=2)
        corpus = tmp_path / "corpus"
        corpus.mkdir()
        for i in range(12):
            (corpus / f"{i}.txt").write_text("abc " * 40 + str(i))
        run = replace(run, data=replace(run.data, corpus=str(corpus), cache=str(tmp_path / "cache")))
        train(run, tmp_path / "run")
        (corpus / "3.txt").write_text("another text " * 50)
        with pytest.raises(UserError, match="the corpus has changed since"):
            train(run, tmp_path / "run", begin="resume")

    @pytest.mark.parametrize("damage", ["cut", "change", "remove"])
    def test_a_damaged_checkpoint_is_refused(self, damage, config_file, tmp_path):
        run = config(config_file, steps=2)
        train(run, tmp_path / "run")
        path = tmp_path / "run/checkpoints/step-00000002/optimizer.safetensors"
        content = path.read_bytes()
        path.unlink()
        if damage == "cut":
            path.write_bytes(content[:-7])
        elif damage == "change":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=r"optimizer.safetensors (is missing|has|was changed)"):
            train(run, tmp_path / "run", begin="resume")

    def test_nan_loss_names_step_and_documents(self, config_file, tmp_path, monkeypatch):
        calls = iter(range(100))
        plain = Objective.forward

        def broken(self, tokens, targets, cu_seqlens):
            loss = plain(self, tokens, targets, cu_seqlens)
            return loss * float("nan") if next(calls) == 7 else loss  # the second pass of step 4

        monkeypatch.setattr(Objective, "forward", broken)
        run = config(config_file, skip_limit=1, eval_every=0)
        with pytest.raises(
            UserError, match=r"loss became nan at step 4.* in documents \[\d+.*train.learning_rate"
        ) as error:
            train(run, tmp_path / "run")
        batch = Batches(prepare(run.data).train, seq_len=32, batch_size=2, seed=0).batch(7)
        assert str(sorted({d for d in batch.documents if d >= 0})) in str(error.value)
        assert (tmp_path / "run/checkpoints/last").read_text() == "step-00000004\n"
        assert all(w.isfinite().all() for w in final_weights(tmp_path / "run").values())

    def test_a_vocabulary_smaller_than_the_tokenizer(self, config_file, tmp_path):
        run = load(RunConfig, config_file)
        run = replace(run, model=replace(run.model, vocab_size=100))
        with pytest.raises(UserError, match="vocab_size is 100, but the tokenizer has 257"):
            train(run, tmp_path / "run")
        assert not (tmp_path / "run").exists()


class TestEquivalences:
    """Options that must not change what is learned."""

    def weights(self, config_file, path, model_changes=None, **changes):
        run = config(config_file, steps=4, eval_every=0, **changes)
        run = replace(run, model=replace(run.model, dropout=0.0, **(model_changes or {})))
        train(run, path)
        return final_weights(path)

    def test_accumulation_equals_one_large_batch(self, config_file, tmp_path):
        parts = self.weights(config_file, tmp_path / "a", batch_size=2, accumulate=3)
        whole = self.weights(config_file, tmp_path / "b", batch_size=6, accumulate=1)
        for name, want in whole.items():
            assert torch.allclose(parts[name], want, rtol=1e-3, atol=2e-5), name

    def test_activation_checkpointing(self, config_file, tmp_path):
        plain = self.weights(config_file, tmp_path / "a")
        recomputed = self.weights(config_file, tmp_path / "b", activation_checkpointing=True)
        assert all(torch.equal(recomputed[name], want) for name, want in plain.items())

    @pytest.mark.slow
    def test_compiled(self, config_file, tmp_path):
        plain = self.weights(config_file, tmp_path / "a")
        compiled = self.weights(config_file, tmp_path / "b", compile=True)
        for name, want in plain.items():
            assert torch.allclose(compiled[name], want, rtol=1e-3, atol=1e-4), name

    def test_bf16_products_keep_fp32_weights(self, config_file, tmp_path, monkeypatch):
        monkeypatch.setattr(host, "matrix_rate", lambda *_: 1e9)  # seconds, where bf16 is emulated
        weights = self.weights(config_file, tmp_path / "a", precision="bf16")
        assert all(w.dtype == torch.float32 for w in weights.values())
        plain = self.weights(config_file, tmp_path / "b")
        assert any(not torch.equal(weights[name], w) for name, w in plain.items())  # it did something

    def test_tensorboard(self, config_file, tmp_path):
        self.weights(config_file, tmp_path / "a", tensorboard=True)
        assert list((tmp_path / "a/tensorboard").glob("events.*"))

    @pytest.mark.slow
    def test_wandb(self, config_file, tmp_path, monkeypatch):
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        self.weights(config_file, tmp_path / "a", wandb=True)
        (kept,) = (tmp_path / "a/wandb").glob("offline-run-*/run-*.wandb")
        for _ in range(200):  # wandb's own process, which lives as long as this one, writes it soon
            if found := b"validation_bits_per_byte" in kept.read_bytes():
                break
            time.sleep(0.1)
        assert found

    @pytest.mark.parametrize(("end", "code"), [("", 0), ("a signal", 1), ("an error", 1)])
    def test_trackers_are_told_how_a_run_ends(self, end, code, config_file, tmp_path, monkeypatch):
        told = []
        calls = SimpleNamespace(
            log=lambda values, step: told.append(step), finish=lambda exit_code: told.append((exit_code,))
        )
        fake = SimpleNamespace(init=lambda **settings: calls, Error=OSError)
        monkeypatch.setitem(sys.modules, "wandb", fake)

        class Ending(TrainingProgress):
            def step(self, step, *measured):
                if end == "a signal":
                    os.kill(os.getpid(), signal.SIGTERM)
                elif end:
                    raise RuntimeError(end)

        changed = config(config_file, steps=2, log_every=1, wandb=True)
        with pytest.raises(RuntimeError) if end == "an error" else nullcontext():
            train(changed, tmp_path / "a", progress=Ending(Console(quiet=True)))
        assert told[-1] == (code,)
        assert told.count((code,)) == 1
        assert told[-2] == (1 if end else 2)

    def test_tensorboard_has_what_was_measured_before_a_kill(self, config_file, tmp_path):
        run = RunDirectory(tmp_path)
        board = TensorBoard(run, 0)
        board.add(1, {"loss": 2.5})
        (kept,) = (tmp_path / "tensorboard").glob("events.*")
        assert b"loss" in kept.read_bytes()
        board.close(finished=False)


def test_activation_checkpointing_is_felt(config_file):
    """Nothing but the inputs of blocks is kept."""
    from retnet.train.blocks import recompute_blocks

    run = load(RunConfig, config_file)
    saved = {}
    for recompute in (False, True):
        model = LanguageModel(replace(run.model, vocab_size=257, dropout=0.0))
        if recompute:
            recompute_blocks(model)
        kept = saved.setdefault(recompute, [])
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x
        ):
            model(torch.zeros(1, 64, dtype=torch.int64))
    assert sum(saved[True]) < sum(saved[False]) / 2


@pytest.mark.parametrize("name", ["steps", "batch_size", "keep", "eval_tokens", "threads"])
def test_impossible_settings(name):
    with pytest.raises(UserError, match=f"{name} is 0; it must be at least 1"):
        TrainConfig(**{name: 0})
