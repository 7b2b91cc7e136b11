"""What `retnet train --dry-run` says is what processes then hold and receive; what does not fit is answered by what does."""

import itertools
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from retnet.cli.train import command
from retnet.data import Tokenizer
from retnet.measure.fitting import changes, nearest_fit
from retnet.measure.footprint import footprint
from retnet.mixers import H3Config
from retnet.model import ModelConfig
from retnet.settings import UserError
from retnet.train.config import ParallelConfig, RunConfig, TrainConfig
from tests.train.test_distributed import launch

ROOT = Path(__file__).parents[2]
MODULE = ["-m", "tests.measure.footprints"]
RUN = RunConfig(
    model=ModelConfig(vocab_size=1000, d_model=64, num_layers=4),
    train=TrainConfig(seq_len=128, batch_size=8, accumulate=8, precision="fp32"),
)


@pytest.fixture
def texts(tmp_path) -> Path:
    """A configuration of a run on texts of its own."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(30):
        (corpus / f"{i}.txt").write_text(f"{i} " + "The quick brown fox jumps over the lazy dog. " * 60)
    path = tmp_path / "run.toml"
    path.write_text(
        f'[data]\ncorpus = "{corpus}"\nvalidation_fraction = 0.3\ncache = "{tmp_path}/cache"\n'
        '[model]\nd_model = 32\nnum_layers = 2\n[train]\nprecision = "fp32"\nseq_len = 64\nbatch_size = 2\naccumulate = 2\n'
    )
    return path


def assert_held(found: dict) -> None:
    for name, case in found.items():
        assert case["held"] == pytest.approx(case["expected"], rel=0.15), (name, case)


@pytest.mark.slow
def test_memory_of_a_process(texts, tmp_path):
    subprocess.run([sys.executable, *MODULE, texts, tmp_path], cwd=ROOT, check=True, timeout=600)
    assert_held(json.loads((tmp_path / "0.json").read_text()))


@pytest.mark.slow
def test_memory_and_bytes_received_of_two_processes(texts, tmp_path):
    done = launch("--standalone", "--nproc-per-node=2", *MODULE, texts, tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, case in found.items():
            got, want = case["received"], case["to be received"]
            assert got.keys() == want.keys(), (name, case)
            for kind in want:  # FSDP fills parts up to one length
                exact = kind in ("activations", "states", "sums")
                assert got[kind] == pytest.approx(want[kind], rel=0 if exact else 0.02), (name, kind, case)
        assert_held({name: found[name] for name in ("weights", "heads")})


def test_what_axes_divide():
    """Weights by all processes but replicas, activations and logits by stretches."""
    one, four = footprint(RUN, 1), footprint(RUN, 4)
    replicas = footprint(replace(RUN, parallel=ParallelConfig(replicate=2)), 4)
    stretches = footprint(replace(RUN, parallel=ParallelConfig(cp=2)), 4)
    assert one.memory.weights == 4 * one.parameters == 2 * replicas.memory.weights
    assert four.memory.weights == stretches.memory.weights == one.memory.weights // 4
    assert four.memory.activations == one.memory.activations == 2 * stretches.memory.activations
    assert one.memory.logits == 3 * 4 * 8 * 128 * 1000 == 2 * stretches.memory.logits
    assert one.traffic == (0, 0, 0, 0, 0, 0)
    # two passes a process, weights twice in each; then gradients
    assert four.traffic.weights == 2 * four.traffic.gradients == 2 * 2 * 4 * one.parameters * 3 // 4
    assert replicas.traffic.replicas == 2 * 4 * one.parameters // 2
    # four passes, forwards and backwards; a state [H,K,V] of each of the four layers
    assert stretches.traffic.states == 4 * 2 * 4 * 4 * (4 * 16 * 32)
    heads = footprint(replace(RUN, parallel=ParallelConfig(tp=2)), 4)
    # all but norms: two of each block, one at the end
    assert heads.memory.weights == 4 * (one.parameters + 9 * 2 * 64) // 2 // 2
    assert one.memory.activations // 2 < heads.memory.activations < one.memory.activations
    assert heads.memory.logits == 2 * 4 * 8 * 128 * 1000 // 2
    # four passes; two all-reduces a block both ways, embedding, head, and three numbers a token
    assert heads.traffic.activations == 4 * 8 * 128 * 4 * (64 * (2 * 2 * 4 + 2) + 3)
    assert one.hours(one.flops / 7200) == pytest.approx(2)


def test_recomputed_blocks_keep_less_and_cost_more():
    lean = footprint(replace(RUN, train=replace(RUN.train, activation_checkpointing=True)), 1)
    full = footprint(RUN, 1)
    assert lean.memory.activations < full.memory.activations / 3
    assert lean.memory.peak < full.memory.peak
    assert 1.25 < lean.flops / full.flops < 4 / 3


class TestNearestFit:
    def test_makes_the_same_steps_in_less_memory(self):
        for part in (0.9, 0.7, 0.4, 0.2):
            limit = part * footprint(RUN, 2).memory.peak
            run, processes = nearest_fit(RUN, 2, limit)
            assert footprint(run, processes).memory.peak <= limit
            assert run.train.tokens_per_step == RUN.train.tokens_per_step
            assert run.model == RUN.model

    def test_prefers_another_mesh_then_smaller_passes(self):
        held = replace(RUN, parallel=ParallelConfig(replicate=2), train=replace(RUN.train, batch_size=1))
        run, processes = nearest_fit(held, 2, footprint(held, 2).memory.peak - 1)
        assert (changes(held, run), processes) == ("--parallel.replicate 1", 2)
        run, processes = nearest_fit(RUN, 2, footprint(RUN, 2).memory.peak - 1)
        assert (changes(RUN, run), processes) == ("--train.batch_size 4 --train.accumulate 16", 2)

    def test_cuts_no_mixer_that_needs_whole_sequences(self):
        whole = replace(RUN, model=replace(RUN.model, mixer=H3Config()))
        with pytest.raises(UserError, match=r"parallel\.cp is 2, but the mixer 'h3' needs whole sequences"):
            footprint(replace(whole, parallel=ParallelConfig(cp=2)), 2)
        whole = replace(whole, train=replace(whole.train, batch_size=1, accumulate=2))
        cut = replace(RUN, train=whole.train)
        for run, stretches in (
            (cut, 2),
            (whole, None),
        ):  # of two passes, four processes can share by cutting only
            shared = replace(run, train=replace(run.train, activation_checkpointing=True))
            found = nearest_fit(run, 2, footprint(shared, 2).memory.peak - 1)
            assert (found and found[0].parallel.cp) == stretches

    def test_keeps_a_shard_that_is_set_in_step_with_the_others(self):
        held = replace(RUN, parallel=ParallelConfig(replicate=2, shard=1))
        run, processes = nearest_fit(held, 2, footprint(held, 2).memory.peak - 1)
        assert (changes(held, run), processes) == ("--parallel.replicate 1 --parallel.shard 2", 2)

    def test_none_where_nothing_fits(self):
        few = replace(RUN, train=replace(RUN.train, batch_size=2, accumulate=2))
        assert nearest_fit(few, 1, 1000.0) is None


def invoke(*words):
    done = CliRunner().invoke(command, list(map(str, words)))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def taken(said, words):
    """Words of the command line with those that a dry run advises in place of their own."""
    advised = shlex.split(said.splitlines()[-1].partition(" with ")[2])
    assert advised
    pairs = [*zip(words[::2], words[1::2], strict=True), *zip(advised[::2], advised[1::2], strict=True)]
    return [word for pair in dict(pairs).items() for word in pair]


@pytest.mark.parametrize("memory", [0.128, 0.1])
def test_advice_is_taken_where_shard_is_set(memory, texts):
    words = ["--parallel.shard", 2, "--gpus", 2, "--train.batch_size", 1, "--train.accumulate", 8]
    words += ["--model.vocab_size", 100_000, "--memory", memory]
    said = invoke(texts, "--dry-run", *words)
    again = taken(said, words)
    assert "--parallel.shard" in said.splitlines()[-1]
    assert "\nfits: " in invoke(texts, "--dry-run", *again)


def test_vocabulary_is_that_of_the_tokenizer_that_is_there(texts, tmp_path):
    file = tmp_path / "tokenizer.json"
    words = ["--dry-run", "--memory", 1, "--data.tokenizer", file]
    assert "counted with 257, that of bytes" in invoke(texts, *words)
    Tokenizer.train(["a b c the quick brown fox"], 260).save(file)
    assert f"counted with 260, that of {file}" in invoke(texts, *words)
    assert "counted with" not in invoke(texts, "--dry-run", "--memory", 1, "--data.tokenizer", "bpe:300")


def test_precision_and_memory_are_those_of_the_run(texts, monkeypatch):
    """A plan for this machine asks it; one for another takes its GPUs to have bf16."""
    monkeypatch.setattr("retnet.host.memory_of", lambda device: 3_000_000_000)
    monkeypatch.setattr("retnet.host.matrix_rate", lambda device, precision: 80e9)
    for precision in ("fp32", "bf16"):
        monkeypatch.setattr("retnet.host.choose_precision", lambda asked, device, said=precision: said)
        said = invoke(texts, "--dry-run", "--train.precision", "auto", "--train.device", "cpu")
        assert f" parameters in {precision} on" in said
        assert " of 3 GB" in said
        assert "40% of 0.08 Tflop/s on each of 1" in said
    said = invoke(texts, "--dry-run", "--gpus", 2)  # which share the cores
    assert "40% of 0.04 Tflop/s on each of 2" in said
    elsewhere = ("--dry-run", "--memory", 2, "--train.precision", "auto")
    assert "40% of 989 Tflop/s on each of 1" in invoke(texts, *elsewhere)
    assert " in bf16 on" in invoke(texts, *elsewhere)
    assert " in fp32 on" in invoke(texts, *elsewhere, "--train.device", "cpu")
    with pytest.raises(UserError, match=r"'cuda:99' cannot be used here.*another machine takes its --memory"):
        invoke(texts, "--dry-run", "--train.device", "cuda:99")


def test_dry_run_says_what_fits_and_does_nothing(texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    said = invoke(texts, "--dry-run", "--gpus", 2, "--memory", 80)
    assert "fp32 on 2 processes: replicate 1 × shard 2 × tp 1 × cp 1" in said
    assert "counted with 257, that of bytes" in said
    assert " of 80 GB" in said
    said = invoke(texts, "--dry-run", "--memory", 0.002, "--train.batch_size", 8, "--model.vocab_size", 2000)
    assert ", and each process has 0.002" in said
    flat = ["--train.batch_size", 8, "--model.vocab_size", 2000]
    assert "\nfits: " in invoke(texts, "--dry-run", "--memory", 0.002, *taken(said, flat))
    assert sorted(tmp_path.rglob("*")) == before


def test_mistakes_are_those_of_the_run(texts):
    with pytest.raises(UserError, match=r"train\.accumulate is 2, and 3 processes cannot share"):
        invoke(texts, "--dry-run", "--gpus", 3)
    with pytest.raises(UserError, match="--gpus, --memory is for --dry-run, which is not given"):
        invoke(texts, "--gpus", 3, "--memory", 2)
    for option in ("--resume", "--resume-or-start", "--verify", "--profile"):
        with pytest.raises(UserError, match=f"{option} is of a run, and --dry-run begins none; leave it out"):
            invoke(texts, "--dry-run", option)
    with pytest.raises(UserError, match="--checkpoint, --verify is of a run"):
        invoke(texts, "--dry-run", "--verify", "--checkpoint", "best")


def test_documented_clusters_can_share_their_runs():
    """What docs/scaling.md starts with torchrun, by hand, by Slurm and by Kubernetes, fits as it stands there."""
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    lines = [shlex.split(line) for line in re.findall(r"^.*torchrun --.* -m retnet train .*$", page, re.M)]
    (manifest,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    _, job = yaml.safe_load_all(manifest)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    lines.append([str(word) for word in container["command"]])
    assert len(lines) >= 6
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    for words in lines:
        options = dict(word.removeprefix("--").split("=") for word in words if re.match("--n[a-z-]+=", word))
        processes = int(options.get("nnodes", 1)) * int(options["nproc-per-node"])
        train = words[words.index("train") + 1 :]
        mesh = [w for pair in itertools.pairwise(train) if pair[0].startswith("--parallel") for w in pair]
        said = invoke(train[0], "--dry-run", "--gpus", processes, "--memory", 80, *mesh)
        assert f" on {processes} processes: " in said
        assert "\nfits: " in said, (words, said)
