"""`retnet linearize`: stages that are runs, resumed exactly; what is transferred; what each stage learns."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from rich.console import Console

from retnet.convert import Found, write
from retnet.data import Batch, DataConfig, Tokenizer
from retnet.engine import open_run
from retnet.mixers import SoftmaxConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.model.checkpoint import weights
from retnet.ops import log_decays
from retnet.settings import UserError, dump, merge
from retnet.train import linearize as linearize_module
from retnet.train.config import DistillConfig, ParallelConfig, RunConfig, TrainConfig
from retnet.train.distillation import LogitDistillation, MixerAlignment, objective
from retnet.train.distributed import ALONE
from retnet.train.linearize import Linearization, LinearizeConfig, linearize
from retnet.train.objective import POSITIONS, ByPosition, Objective, Repetition
from retnet.train.progress import TrainingProgress
from retnet.train.run_dir import RunDirectory
from retnet.train.student import student_config, transfer
from retnet.train.trainer import train
from tests.helpers.forks import shared
from tests.helpers.ranks import launch

SOFTMAX = SoftmaxConfig(num_heads=4, kv_heads=2, bias=True, qk_norm=True)
TEACHER = ModelConfig(
    vocab_size=257, d_model=32, num_layers=2, mixer=SOFTMAX, norm="rmsnorm", ffn="swiglu", ffn_dim=48
)


def found(config=TEACHER):
    torch.manual_seed(1)
    tensors = weights(LanguageModel(config))
    return Found("run", config, {name: x + 0.1 * torch.rand_like(x) for name, x in tensors.items()}, {})


def batch():
    tokens = torch.randint(257, (2, 12))
    targets = tokens.roll(-1, 1)
    targets[0, 5] = -100
    return tokens, targets, torch.tensor([0, 7, 12, 24], dtype=torch.int32)


def made(mixer, teacher, text, keep=None):
    """A student of a teacher, fitted on some text."""
    return transfer(teacher, student_config(TEACHER, mixer, keep), Batch(*text, None), torch.device("cpu"))


@pytest.mark.parametrize("mixer", ["retention", "gated_retention"])
def test_a_student_has_its_teachers_weights(mixer):
    teacher = found()
    student = made(mixer, teacher, batch(), keep=2)
    assert [kind.name for kind in student.config.mixers_by_layer] == [mixer, "softmax"]
    model = student.model()  # all weights are there, and fit
    same = [name for name, x in weights(model).items() if torch.equal(x, teacher.tensors.get(name, x[:0]))]
    assert {"embedding.weight", "blocks.0.ffn.fc1.weight", "blocks.1.mixer.q_bias", "norm.weight"} <= set(
        same
    )
    changed = (
        "q_proj.weight",
        "k_proj.weight",
        "v_proj.weight",
        "out_proj.weight",
        "q_bias",
        "k_bias",
        "v_bias",
    )
    changed = {f"blocks.0.mixer.{name}" for name in (*changed, "q_norm.weight", "k_norm.weight")}
    assert set(teacher.tensors) - set(same) == changed
    values = student.tensors["blocks.0.mixer.v_proj.weight"].view(4, 8, 32)
    assert torch.equal(values[0], values[1])  # those that a group shared
    assert torch.equal(
        values.view(2, 2, 8, 32)[:, 0].flatten(0, 1), teacher.tensors["blocks.0.mixer.v_proj.weight"]
    )


@pytest.mark.parametrize("mixer", ["retention", "gated_retention"])
def test_a_student_begins_with_heads_as_large_as_its_teachers_that_do_not_point_away(mixer):
    """On the text it is fitted on, each document by itself; gates begin as 1, and decays as constants."""
    teacher, text = found(), batch()
    student, taught = made(mixer, teacher, text).model().blocks[0].mixer, teacher.model().blocks[0].mixer
    sizes = student.out_proj.weight / teacher.tensors["blocks.0.mixer.out_proj.weight"]
    student.out_proj = torch.nn.Identity()
    x = teacher.model().blocks[0].mixer_norm(teacher.model().embedding(text[0].view(1, -1)))
    sums = 0  # of squares of the teacher's heads and the student's, and of their products
    for begin, end in itertools.pairwise(text[2].tolist()):
        y = x[:, begin:end]
        wanted = taught._causal(*taught.project(y, taught.positions(y)))
        own = student(y).view_as(wanted)
        sums = sums + torch.stack([wanted * wanted, own * own, own * wanted]).sum((1, 2, 4))
    size = sizes.view(32, 4, 8).mean((0, 2))
    assert torch.allclose(size.square() * sums[1], sums[0], rtol=1e-4)
    assert (size * sums[2] >= 0).all()
    if mixer == "gated_retention":
        gate = torch.nn.functional.silu(student.gate_proj(x))
        gamma = student.decay_proj(x).sigmoid().pow(1 / 16)
        assert (gate - 1).abs().mean() < 0.3
        assert (gamma[0].mean(0) - log_decays("experiments", 4).exp()).abs().max() < 5e-3


@pytest.mark.parametrize(
    ("teacher", "keep", "says"),
    [
        (
            replace(TEACHER, layers=("softmax", "linear")),
            None,
            "softmax of one kind, and they are: linear, softmax",
        ),
        (TEACHER, 3, "every:3 layers cannot stay softmax among 2; allowed: every:2 to every:2"),
        (TEACHER, 1, "every:1 layers"),
    ],
)
def test_what_cannot_be_a_teacher(teacher, keep, says):
    with pytest.raises(UserError, match=says):
        student_config(teacher, "retention", keep)


def test_alignment_is_zero_for_the_teachers_own_answers_and_one_for_silence():
    teacher = found().model()
    config = student_config(TEACHER, "retention", None)
    silent = LanguageModel(config)
    for block in silent.blocks:
        torch.nn.init.zeros_(block.mixer.out_proj.weight)
    tokens, targets, bounds = batch()
    loss = MixerAlignment(silent, teacher)(tokens, targets, bounds)
    assert loss.item() == pytest.approx(23)  # tokens that count
    again = MixerAlignment(silent, teacher)
    assert "teacher" not in dict(again.named_modules())
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in silent.parameters())
    copy = found().model()
    same = MixerAlignment(silent, teacher)
    same.model = copy  # answers as the teacher does, in all layers
    assert same(tokens, targets, bounds).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="nothing to learn"):
        MixerAlignment(copy, teacher)
    with pytest.raises(UserError, match="needs a teacher of 1 layers of width 32"):
        MixerAlignment(LanguageModel(replace(config, num_layers=1)), teacher)


def test_distillation_is_the_divergence_from_the_teacher():
    teacher, student = found().model(), LanguageModel(student_config(TEACHER, "retention", None))
    tokens, targets, bounds = batch()
    told = LogitDistillation(student, teacher)
    with torch.no_grad():
        p = teacher(tokens.view(1, -1), cu_seqlens=bounds)[0].softmax(-1)
        q = student(tokens.view(1, -1), cu_seqlens=bounds)[0].softmax(-1)
    nats = (p * (p / q).log()).sum(-1)[targets.flatten() != -100].sum()
    assert told(tokens, targets, bounds).item() == pytest.approx(nats.item(), rel=1e-4)
    assert told.eval()(tokens, targets, bounds).item() == Objective(student)(tokens, targets, bounds).item()


def test_what_a_run_with_a_teacher_cannot_do(tmp_path):
    with pytest.raises(UserError, match="z_loss is not for runs with"):
        RunConfig(train=TrainConfig(z_loss=1e-4), distill=DistillConfig("x"))

    for axis in ("tp", "cp"):
        says = rf"parallel\.{axis} is 2, and \[distill\] shares a teacher by parallel\.shard and"
        with pytest.raises(UserError, match=says):
            RunConfig(parallel=ParallelConfig(**{axis: 2}), distill=DistillConfig("x"))


def test_a_teacher_of_other_tokens_is_refused_and_one_that_changed(tmp_path):
    teacher, own = found(), Tokenizer.load("bytes")
    config = RunConfig(distill=DistillConfig(str(tmp_path / "teacher")))
    write(teacher, tmp_path / "teacher", "run", source="x", tokenizer=own)
    student, run = LanguageModel(student_config(TEACHER, "retention", None)), RunDirectory(tmp_path)
    chosen = partial(objective, config, run, student, device=torch.device("cpu"), ranks=ALONE)
    for _ in range(2):  # begun, and gone on with
        assert isinstance(chosen(own), LogitDistillation)
    with pytest.raises(UserError, match="as many tokens as the model, but other ones"):
        chosen(Tokenizer.train(["abc"], 257))
    shutil.rmtree(tmp_path / "teacher")
    other = {name: x + 1 for name, x in teacher.tensors.items()}
    write(replace(teacher, tensors=other), tmp_path / "teacher", "run", source="x", tokenizer=own)
    with pytest.raises(UserError, match=r"teacher has changed since .* was begun with it; restore it"):
        chosen(own)


def test_quality_by_position_and_of_repetitions():
    model = found().model()
    tokens, targets, bounds = batch()
    by_position = ByPosition(model)(tokens, targets, bounds)
    assert by_position.sum().item() == pytest.approx(
        Objective(model)(tokens, targets, bounds).item() + 23, rel=1e-5
    )
    assert by_position[: len(POSITIONS) + 1].nonzero().tolist() == [[0]]  # no document has 16 tokens
    long = torch.randint(257, (1, 70))
    counts = ByPosition(model)(long, long, torch.tensor([0, 3, 70]))[len(POSITIONS) + 1 :]
    assert counts[:4].tolist() == [3 + 16, 48, 3, 0]

    class Copies(torch.nn.Module):
        """Knows what it has read six tokens ago, but for one."""

        def forward(self, tokens, cu_seqlens):
            assert cu_seqlens.tolist() == [0, 12, 24]
            wanted = torch.nn.functional.one_hot(tokens.roll(5, 1), 257)
            wanted[0, 7] = 0
            return wanted.float()

    assert Repetition(Copies())(1 + tokens % 256, targets, bounds).tolist() == [11, 12]


def test_before_the_first_stage_settings_may_change_and_after_it_neither_they_nor_the_teacher(tmp_path):
    teacher = replace(found(), hashes={"model.safetensors": "1"})
    wrong, right = (
        Linearization("x", LinearizeConfig(), {"data": {"corpus": name}}) for name in ("typo", "mine")
    )
    folder = tmp_path / "dest"
    folder.mkdir()
    for config in (wrong, right):
        linearize_module._begin(config, folder)
    write(teacher, folder / "0-transfer", "run", source="x")
    linearize_module._begin(right, folder)
    linearize_module._check_teacher("x", teacher, folder)
    with pytest.raises(UserError, match="begun with other settings"):
        linearize_module._begin(wrong, folder)
    with pytest.raises(UserError, match=r"x has changed since .*dest was begun with it"):
        linearize_module._check_teacher("x", replace(teacher, hashes={"model.safetensors": "2"}), folder)
    large = replace(teacher, tokenizer={"tokenizer.json": b""}, kind="llama")
    Tokenizer.train([str(list(range(200)))] * 9, 300).save(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="the tokenizer has 300 tokens but the model 257"):
        linearize_module._keep_tokenizer(str(tmp_path), large, tmp_path)


class Interrupted(TrainingProgress):
    """Ends the process's work, as Ctrl-C twice would, in a step of the stage of so many steps."""

    def __init__(self, steps, at):
        super().__init__(Console(quiet=True))
        self.place = (steps, at)

    def step(self, step, loss, rate, left=None):
        if (self._steps, step) == self.place:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A folder with a trained teacher, and settings for its students."""
    home = tmp_path_factory.mktemp("taught")
    for name, numbers in (("corpus", range(3000)), ("validation", range(3000, 3100))):
        lines = [f"{n} and {n + 1} make {2 * n + 1}." for n in numbers]
        (home / f"{name}.txt").write_text("\n".join(lines))
    corpus = {"corpus": [str(home / "corpus.txt")], "validation": str(home / "validation.txt")}
    corpus["cache"] = str(home / "cache")
    sizes = {"seq_len": 32, "batch_size": 8, "device": "cpu", "eval_every": 0, "eval_tokens": 2000}
    learned = TrainConfig(**sizes, steps=100, learning_rate=1e-2, warmup_steps=10)
    data = DataConfig(**{**corpus, "corpus": tuple(corpus["corpus"])})
    run = RunConfig(model=replace(TEACHER, vocab_size=None), data=data, train=learned)
    train(run, home / "teacher")
    return home, {"data": corpus, "train": sizes}


@pytest.mark.slow
def test_stages_are_runs_that_go_on_where_they_were_stopped(taught, tmp_path):
    home, settings = taught
    how = LinearizeConfig(align_steps=20, distil_steps=30, longer_steps=5, scratch=True, align_rate=1e-2)
    settings = merge(settings, {"train": {"checkpoint_every": 8}})
    config = Linearization(str(home / "teacher"), how, settings)
    with pytest.raises(KeyboardInterrupt):
        linearize(config, tmp_path / "cut", Interrupted(30, 20))
    whole, cut = linearize(config, tmp_path / "whole"), linearize(config, tmp_path / "cut")
    stages = {stage.name: stage for stage in whole.stages}
    assert list(stages) == ["teacher", "0-transfer", "1-align", "2-distil", "3-longer", "scratch"]
    assert [stage[2:] for stage in cut.stages] == [stage[2:] for stage in whole.stages]
    assert all(stage.by_position.keys() == {0, 16} and 0 <= stage.recall <= 1 for stage in whole.stages)
    loss = {name: stage.quality.loss for name, stage in stages.items()}
    assert loss["0-transfer"] > loss["1-align"] > loss["2-distil"]
    assert loss["2-distil"] < loss["scratch"]
    assert stages["scratch"].tokens == stages["3-longer"].tokens == 55 * 256
    assert open_run(whole.student).model.config.mixer.name == "retention"
    others = [
        f"--{section}.{name}={value}"
        for section in ("data", "train")
        for name, value in settings[section].items()
        if name != "corpus"
    ]
    chosen = [
        f"--{name.replace('_', '-')}={getattr(how, name)}" for name in vars(how) if name.endswith("_steps")
    ]
    words = ["linearize", home / "teacher", tmp_path / "whole", "--data", home / "corpus.txt", "--scratch"]
    again = shared().run([*words, *chosen, "--align-rate=0.01", *others], tmp_path)
    assert again.returncode == 0, again.stderr
    assert re.search(r"memory: about [\d.]+ .iB for the teacher, and [\d.]+ .iB to train", again.stderr)
    assert re.search(r"memory in 3-longer, without the teacher: about [\d.]+ .iB", again.stderr)
    assert "2-distil: 30 steps\nfinished before: 30 steps" in again.stderr
    for stage in whole.stages:
        assert f"{stage.name}\t" in again.stdout
        assert f"\t{stage.quality.bits_per_byte:.4f}\t{stage.recall:.1%}\n" in again.stdout
    assert f"next: retnet generate {whole.student}" in again.stdout
    with pytest.raises(UserError, match=r"begun with other settings: how\.align_steps: 20 → 21"):
        linearize(replace(config, how=replace(how, align_steps=21)), tmp_path / "whole")


def losses(folder):
    """(stage, step) → loss."""
    lines = [
        (name, json.loads(line))
        for name in ("1-align", "2-distil")
        for line in (folder / name / "metrics.jsonl").read_text().splitlines()
    ]
    return {(name, line["step"]): line["loss"] for name, line in lines if "loss" in line}


@pytest.mark.slow
def test_two_processes_make_the_stages_that_one_makes(taught, tmp_path):
    """Each with a part of teacher and student; stopped and gone on with, by themselves or after one process."""
    home, settings = taught
    how = LinearizeConfig("gated_retention", "every:2", align_steps=4, distil_steps=6)
    fine = {"batch_size": 4, "accumulate": 2, "log_every": 1, "checkpoint_every": 2, "eval_tokens": 300}
    config = Linearization(str(home / "teacher"), how, merge(settings, {"train": fine}))
    (tmp_path / "config.toml").write_text(dump(config))
    one = linearize(config, tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        linearize(config, tmp_path / "begun by one", Interrupted(6, 3))
    ranks = launch("tests.train.linearized", 2, tmp_path)
    want = losses(tmp_path / "one")
    assert len(want) == 10
    for name in ("two", "begun by one"):
        got = losses(tmp_path / name)
        assert got.keys() == want.keys()
        assert got == pytest.approx(want, rel=1e-5)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "two")
    for found in ranks:
        assert found["stopped"] == found["two"]
        for stages in found.values():
            for got, stage in zip(stages, one.stages, strict=True):
                assert got == pytest.approx([stage.parameters, *stage.quality, stage.recall], rel=1e-5)
