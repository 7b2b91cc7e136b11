"""Several processes train what one does, whatever their number when the run began, and end together."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from retnet.convert import read
from retnet.data import Batches, prepare
from retnet.engine import find_checkpoint, open_run
from retnet.mixers import MIXERS
from retnet.model import LanguageModel
from retnet.model.checkpoint import load_model, model_files, verify, write_checkpoint
from retnet.model.checkpoint_layout import KINDS, is_sharded
from retnet.model.sharded import SavedTensors
from retnet.settings import UserError, load
from retnet.train.config import ParallelConfig, RunConfig
from retnet.train.distributed import Ranks, one_voice
from retnet.train.progress import TrainingProgress
from retnet.train.start import change_of_mesh
from retnet.train.trainer import train
from tests.train.ranks import STOP, base, cases, meshes, note_batches

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def launch(*words, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=cwd, text=True, **pipes) as process:
        try:
            said = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # and with it the processes that it started
            raise
    return subprocess.CompletedProcess(command, process.returncode, *said)


def measured(run: Path) -> dict[tuple[int, str], float]:
    """(step, what) → loss, norm of the gradient, validation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kinds = ("loss", "gradient_norm", "validation_loss")
    return {(line["step"], kind): line[kind] for line in lines for kind in kinds if kind in line}


def assert_same(got: Path, want: Path, tolerance: float = 1e-5) -> None:
    got, want = measured(got), measured(want)
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert math.isclose(got[key], value, rel_tol=tolerance), (key, got[key], value)


class Stopping(TrainingProgress):
    """Sends this process a signal after a step, as a person might."""

    def step(self, step: int, *measured: float | None) -> None:
        if step == STOP:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def alone(config_file, tmp_path_factory) -> Path:
    """The cases, trained by this one process, and the plain one stopped after some steps."""
    home = tmp_path_factory.mktemp("alone")
    run = base(config_file)
    for name, case in cases(run).items():
        train(case, home / name)
    assert train(run, home / "stopped", progress=Stopping(Console(quiet=True))).step == STOP
    return home


@pytest.fixture(scope="module")
def shared(config_file, alone, tmp_path_factory) -> Path:
    """All that two processes do in `ranks.py`."""
    home = tmp_path_factory.mktemp("shared")
    for name in ("from one", "from one by heads"):
        shutil.copytree(alone / "stopped", home / name)
    words = ["--standalone", "--nproc-per-node=2", "-m", "tests.train.ranks", config_file, home]
    done = launch(*words, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return home


def test_the_same_losses_norms_and_validation(shared, alone):
    assert_same(shared / "plain", alone / "plain")


def test_the_same_first_weights(shared, config_file):
    """Without learning, the weights of a checkpoint are those the seed gave."""
    config = load(RunConfig, shared / "still/config.toml")
    torch.manual_seed(config.train.seed)
    fresh = LanguageModel(config.model)
    got = load_model(shared / "still/checkpoints/step-00000001")
    assert all(torch.equal(got.state_dict()[name], want) for name, want in fresh.state_dict().items())


def test_weights_of_other_runs(shared):
    """Of several processes, and of one in a narrower type; what was read of them is noted as one process notes it."""
    for source in ("plain", "narrow"):
        want = read(shared / source)
        got = read(shared / f"from {source}").tensors
        assert got.keys() == want.tensors.keys()
        assert all(torch.equal(got[name], x.float()) for name, x in want.tensors.items())
        assert json.loads((shared / f"from {source}/origin.json").read_text())["sha256"] == want.hashes


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer(name, shared, alone):
    assert_same(shared / f"mixer {name}", alone / f"mixer {name}")


def test_recomputed_blocks(shared, alone):
    assert_same(shared / "recomputed", alone / "recomputed")
    assert_same(shared / "bf16 recomputed", alone / "bf16 recomputed", tolerance=1e-4)


def test_settings_of_learning(shared, alone):
    """Momentum and average lie in parts; both, and what was validated with the average, are those of one process."""
    name = "muon, ramp, average"
    assert_same(shared / name, alone / name, tolerance=1e-4)  # Muon's products are bf16
    for kind in KINDS:
        got, want = (
            SavedTensors(home / name / "checkpoints/step-00000003", kind) for home in (shared, alone)
        )
        assert got.shapes == want.shapes
        for tensor, x in want.whole().items():
            assert torch.allclose(got.whole()[tensor], x, rtol=1e-3, atol=1e-4), (kind, tensor)


def test_other_meshes(shared, alone, config_file):
    """Losses of one process; bf16 rounds a weight's gradient stretch by stretch, and Muon's products."""
    for name, (like, config) in meshes(base(config_file)).items():
        rounding = {"bf16 in stretches": 5e-3, "bf16 by heads": 5e-3, "replicated": 1e-4}.get(name, 1e-5)
        assert_same(shared / name, alone / like, tolerance=rounding)
        mesh = json.loads((shared / name / "env.json").read_text())["mesh"]
        assert mesh == vars(config.parallel.of(2))


def test_each_writes_its_part_and_they_are_read_as_one(shared, alone, tmp_path):
    """Names, types and shapes in checkpoints do not tell how many processes there were; nor does what reads them."""
    for step in ("step-00000003", "step-00000006"):
        got, want = (home / "plain/checkpoints" / step for home in (shared, alone))
        verify(got)
        assert (is_sharded(got), is_sharded(want)) == (True, False)
        assert not (got / "model.safetensors").exists()
        sizes = [sum(file.stat().st_size for file in got.glob(f"shard-0000{n}-*")) for n in (1, 2)]
        assert 0.8 < sizes[0] / sizes[1] < 1.25
        for kind in ("model", "optimizer"):
            ours, theirs = SavedTensors(got, kind).whole(), load_file(want / f"{kind}.safetensors")
            assert ours.keys() == theirs.keys()
            for name, x in theirs.items():
                assert (ours[name].shape, ours[name].dtype) == (x.shape, x.dtype)
                assert torch.allclose(ours[name], x, rtol=1e-4, atol=1e-6), name
    for kind in KINDS:  # cut by heads too
        homes = (shared / "average by heads", alone / "average")
        ours, theirs = (SavedTensors(find_checkpoint(home, "last")[0], kind).whole() for home in homes)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], x, rtol=1e-3, atol=1e-4) for name, x in theirs.items()), kind
    found = read(shared / "plain")  # as `convert` and --init do
    assert found.hashes.keys() >= {"shard-00001-model-00001-of-00003.safetensors"}
    write_checkpoint(tmp_path / "one", model_files(found.model()))
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "model.toml",
    ]
    lines = [json.loads(line) for line in (shared / "plain/metrics.jsonl").read_text().splitlines()]
    saved = [line for line in lines if "checkpoint_step" in line]
    assert [line["checkpoint_step"] for line in saved] == [3, 6]
    assert all(0 < line["checkpoint_stall_s"] <= line["checkpoint_write_s"] for line in saved)
    processes = [json.loads((home / "plain/env.json").read_text())["processes"] for home in (shared, alone)]
    assert processes == [2, 1]
    tokens = torch.arange(20)[None]
    logits = [open_run(home / "plain").model(tokens) for home in (shared, alone)]
    assert torch.allclose(*logits, atol=1e-4)


def test_a_signal_to_one_stops_all_after_the_same_step(shared):
    for name in ("stopped", "stopped and continued"):
        assert (shared / name / f"checkpoints/step-{STOP:08d}").is_dir()
    assert (shared / "stopped/checkpoints/last").read_text() == f"step-{STOP:08d}\n"
    assert max(step for step, _ in measured(shared / "stopped")) == STOP


def test_the_first_of_them_plans_for_all(shared):
    assert json.loads((shared / "planned/plan.json").read_text())["steps"] == 5
    assert max(step for step, _ in measured(shared / "planned")) == 5
    assert load(RunConfig, shared / "planned/config.toml").train.steps == 5


def test_continued_by_another_number_of_processes(shared, alone, config_file, tmp_path, monkeypatch):
    """With the same losses, and no document twice or left out."""
    assert_same(shared / "stopped and continued", alone / "plain")  # 2 → 2
    assert_same(shared / "from one", alone / "plain")  # 1 → 2
    assert_same(shared / "from one by heads", alone / "plain")
    shutil.copytree(shared / "stopped", tmp_path / "run")
    run, after = base(config_file), []
    with monkeypatch.context() as patch:
        note_batches(after.append, patch.setattr)
        assert train(run, tmp_path / "run", begin="resume").finished
    assert_same(tmp_path / "run", alone / "plain")  # 2 → 1
    batches = Batches(prepare(run.data).train, seq_len=32, batch_size=2, seed=run.train.seed)
    want = [[place, list(batches.batch(place).documents)] for place in range(run.train.passes_before(6))]
    of_two = [json.loads((shared / f"stopped.{rank}.batches").read_text()) for rank in (0, 1)]
    assert sorted([*of_two[0], *of_two[1], *after]) == want  # 2 → 1
    of_two = [json.loads((shared / f"from one.{rank}.batches").read_text()) for rank in (0, 1)]
    assert sorted(of_two[0] + of_two[1]) == want[run.train.passes_before(STOP) :]  # 1 → 2
    launches = [json.loads(line) for line in (tmp_path / "run/launches.jsonl").read_text().splitlines()]
    assert [(line["step"], line["processes"], line["mesh"]["shard"]) for line in launches] == [
        (0, 2, 2),
        (STOP, 1, 1),
    ]
    said = change_of_mesh(tmp_path / "run", ParallelConfig(shard=2))
    assert said.startswith("one process trained it before, now shard 2")
    assert not change_of_mesh(tmp_path / "run", ParallelConfig(shard=1))


def test_mistakes_are_told_to_all(shared, config_file):
    def told(name: str) -> str:
        first, second = ((shared / f"{name}.{rank}.error").read_text() for rank in (0, 1))
        assert first == second
        return first

    assert "train.accumulate is 3, and 2 processes cannot share" in told("uneven")
    assert "--train.accumulate 6 --train.batch_size 1 makes the same step" in told("uneven")
    assert "cp 4 makes 4 processes, and there are 2; set --parallel.cp 2" in told("unfit")
    assert "no corpus 'nowhere'" in told("nowhere")
    assert not (shared / "uneven").exists()
    assert told("no metrics") == "no line can be written"  # of the first alone
    full = "cannot write the checkpoint of step 4: process 1: No space left on device; step-00000002 is whole"
    assert told("full").startswith(full)
    assert not list((shared / "full/checkpoints").glob(".*"))
    assert "shard-00002-model-00003-of-00003.safetensors was changed after it was written" in told("damaged")
    assert "step-00000002 is whole: --resume --checkpoint step-00000002 goes on from there" in told("damaged")
    # the second pass of the last rank is pass 1 + 2 of the run, in its second step
    batch = Batches(prepare(base(config_file).data).train, seq_len=32, batch_size=2, seed=0).batch(3)
    documents = sorted({d for d in batch.documents if d >= 0})
    assert f"the loss became nan at step 2, in documents {documents};" in told("broken")


def test_the_documented_command(config_file, tmp_path):
    """Two processes, but one voice, with what is right and with what is wrong."""
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    line = re.search(r"^torchrun (.*)$", page, re.M)[1]
    words = shlex.split(line.replace("--nproc-per-node=8", "--nproc-per-node=2"))
    words[words.index("paper/200m")] = str(config_file)
    done = launch(*words, "--train.steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits/byte held out") == 1
    assert len(re.findall(r"training [\d.]+ M parameters", done.stderr)) == 1
    assert "2 processes, each with 1 of the 2 passes of a step" in done.stderr
    done = launch("--max-restarts=2", *words, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("retnet: error: runs/200m already holds a run; --resume continues it") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_one_voice(rank, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    with pytest.raises(SystemExit if rank else UserError), one_voice():
        raise UserError("once")


class TestDevices:
    """What is chosen on a machine with two GPUs, which this one need not be."""

    @pytest.fixture(autouse=True)
    def _gpus(self, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        monkeypatch.setattr("torch.cuda.set_device", lambda index: None)
        monkeypatch.setattr("retnet.host.choose_device", torch.device)

    @pytest.mark.parametrize("name", ["auto", "cuda"])
    def test_each_has_its_own(self, name, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert Ranks(5, 8).device(name) == torch.device("cuda:1")
        assert Ranks(5, 8).device("cpu") == torch.device("cpu")

    def test_too_few(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(UserError, match="process 2 of this machine has no GPU, since there are 2"):
            Ranks(2, 8).device("auto")

    def test_one_for_all(self, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "0")
        with pytest.raises(UserError, match="'cuda:1' is one GPU for 8 processes; set it to 'cuda'"):
            Ranks(0, 8).device("cuda:1")


def test_one_process_does_not_import_what_it_does_not_use():
    code = "import sys, retnet.train.trainer; assert 'torch.distributed.fsdp' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
