"""A mixer is one class and one row: a tenth, added while the program runs, is trained, tested and studied like the nine."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from retnet.cli import cli
from retnet.engine import open_run
from retnet.mixers import MIXERS, MixerConfig
from retnet.mixers.packing import SequenceMixer
from retnet.nn import Linear
from retnet.settings import UserError, load
from retnet.studies.complexity import ComplexityMeasure, Learning, Using
from retnet.train.config import RunConfig
from tests.helpers.contract import (
    assert_gradients_are_finite,
    assert_half_weights_stay_near,
    assert_learns,
    assert_mixer_holds,
    assert_survives_meta,
)


@dataclass(frozen=True)
class MeanConfig(MixerConfig):
    """A mean that fades: each token counts `fading` times as much as the one after it."""

    name: Literal["mean"] = "mean"
    fading: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.fading <= 1:
            raise UserError(f"fading is {self.fading}; allowed: above 0, up to 1")


class MeanState(NamedTuple):
    total: Tensor  # [B,D]
    weight: Tensor  # [B]


class Mean(SequenceMixer):
    """The fading mean of all tokens so far, projected, token by token."""

    Config: ClassVar[type[MeanConfig]] = MeanConfig

    def __init__(self, d_model, config):
        super().__init__(d_model, config)
        self.fading = config.fading
        self.in_proj = Linear(d_model, d_model)
        self.out_proj = Linear(d_model, d_model)

    def init_state(self, batch, *, device=None, dtype=None):
        weight = self.out_proj.weight
        wide = torch.promote_types(dtype or weight.dtype, torch.float32)
        total = torch.zeros(batch, len(weight), device=device or weight.device, dtype=wide)
        return MeanState(total, total.new_zeros(batch))

    def mixing_flops(self, length):
        return 4 * len(self.out_proj.weight)

    def _extend(self, x, state):
        (total, weight), means = state, []
        for token in self.in_proj(x).to(total.dtype).unbind(1):
            total, weight = self.fading * total + token, self.fading * weight + 1
            means.append(total / weight[:, None])
        return self.out_proj(torch.stack(means, dim=1).to(x.dtype)), MeanState(total, weight)


CONFIG = """
[model]
d_model = 32
num_layers = 2
mixer = { name = "mean", fading = 0.5 }

[train]
steps = 3
seq_len = 64
batch_size = 2
warmup_steps = 1
eval_every = 0
"""


@pytest.fixture(autouse=True)
def _tenth(monkeypatch):
    monkeypatch.setitem(MIXERS, "mean", Mean)


@pytest.mark.slow
def test_it_holds_the_contract():
    torch.manual_seed(0)
    assert_mixer_holds(Mean(16, MeanConfig()).double(), 16)
    assert_half_weights_stay_near(Mean, MeanConfig(), 32, 2e-2)
    assert_survives_meta(Mean, MeanConfig(), 16)
    assert_gradients_are_finite(Mean, MeanConfig(), 16, length=300)
    assert_learns(MeanConfig())


def test_it_has_its_row_in_a_study(tmp_path):
    lengths = (4, 8, 16, 32, 64)
    study = ComplexityMeasure(
        "complexity",
        mixers=("retention", "mean"),
        using=Using(d_model=16, num_heads=2, batch=2, lengths=lengths, rounds=2, seconds=1e-9),
        learning=Learning(d_model=16, lengths=lengths, rows=2, rounds=2),
        device="cpu",
    )
    jobs = study.jobs(tmp_path, {}, ())
    summary = study.summarise({"mean": jobs["mean"].run(tmp_path, lambda done: None)})
    row = next(row for row in summary.tables[0].rows if row[0] == "mean")
    cells = dict(zip(summary.tables[0].columns, row, strict=True))
    assert cells["paper's row"] == "–"
    assert cells["along time"] == "token by token"
    assert cells["theory"] == "1.00"
    assert "0.00" in cells["state: exponent"]


@pytest.mark.slow
def test_it_is_trained_and_written_with(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "text.txt").write_text("A mean forgets nothing and nothing stands out. " * 90, encoding="utf-8")
    (corpus / "more.txt").write_text("Nothing stands out in a mean. " * 60, encoding="utf-8")
    run = tmp_path / "run"
    toml = tmp_path / "mean.toml"
    toml.write_text(CONFIG, encoding="utf-8")
    words = [toml, "--run-dir", run, "--data.corpus", corpus, "--data.cache", tmp_path / "cache"]
    cli.main(["train", *map(str, words)], standalone_mode=False)
    config = load(RunConfig, run / "config.toml")
    assert config.model.mixer == MeanConfig(fading=0.5)
    assert (run / "metrics.jsonl").read_text(encoding="utf-8")
    opened = open_run(run)
    assert isinstance(opened.model.blocks[0].mixer, Mean)
    cli.main(["generate", str(run), "--prompt", "A mean", "--max-tokens", "4"], standalone_mode=False)
    with pytest.raises(UserError, match=r"fading is 2\.0; allowed: above 0, up to 1"):
        cli.main(["train", *map(str, words), "--model.mixer.fading", "2"], standalone_mode=False)
