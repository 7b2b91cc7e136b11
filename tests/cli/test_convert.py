"""`retnet convert` as a user meets it."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from retnet.cli import cli
from retnet.convert import read
from retnet.data import Tokenizer
from retnet.model import LanguageModel, ModelConfig
from retnet.model.checkpoint import model_files, write_checkpoint
from retnet.settings import UserError
from tests.helpers.checkpoints import (
    FLA,
    GOLDEN,
    TORCHSCALE,
    fla_weights,
    save_folder,
    save_torchscale,
    torchscale_weights,
)


def call(*args):
    """Output of `retnet convert`, which must succeed."""
    result = CliRunner().invoke(cli, ["convert", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*args):
    """The sentence with which `retnet convert` refuses."""
    with pytest.raises(UserError) as error:
        CliRunner().invoke(cli, ["convert", *map(str, args)], catch_exceptions=False, standalone_mode=False)
    return str(error.value)


def test_a_checkpoint_of_torchscale(tmp_path):
    out = call(
        GOLDEN / "torchscale-fairseq-swish/checkpoint.pt", tmp_path / "out", "--to", "run"
    ).splitlines()
    assert out[0].startswith("found    torchscale: ")
    assert "3 layers of width 64, 80 tokens, 168,448 parameters, float32" in out[1]
    assert "4 heads of 16 (values 32), decay paper, rotation interleaved inclusive, gated" in out[2]
    assert "swiglu 112; embedding tied scaled normalised" in out[3]
    assert out[4].startswith("clamp    ")
    assert "changes the logits by 1.4e-04 (relative) on 256 random tokens; --clamp keeps it" in out[4]
    assert out[5] == f"written  {tmp_path / 'out'}, 0.7 MB, float32"
    assert f"model = load_model({str(tmp_path / 'out')!r})" in out[7]
    assert "--tokenizer" in out[8]


def test_the_clamp_and_a_sample(tmp_path):
    source = save_torchscale(
        tmp_path / "a",
        torchscale_weights({**TORCHSCALE, "vocab_size": 300}),
        TORCHSCALE | {"vocab_size": 300},
    )
    (tmp_path / "ids.json").write_text(json.dumps([1, 2, 3] * 400))
    (tmp_path / "text.txt").write_text("It was a dark and stormy night.")
    out = call(source, tmp_path / "b", "--to", "run", "--clamp", "--sample", tmp_path / "ids.json")
    assert f"on 512 tokens of {tmp_path / 'ids.json'}" in out
    assert read(tmp_path / "b").config.mixer.score_norm == "torchscale"
    assert "generate" not in out.partition("next ")[2]
    out = call(
        source, tmp_path / "c", "--to", "run", "--tokenizer", "bytes", "--sample", tmp_path / "text.txt"
    )
    assert f"on 32 tokens of {tmp_path / 'text.txt'}" in out
    assert f"next     retnet generate {tmp_path / 'c'} --prompt" in out
    assert "so --tokenizer must say" in refused(source, tmp_path / "d", "--sample", tmp_path / "text.txt")
    assert "cannot read --sample" in refused(source, tmp_path / "d", "--sample", tmp_path / "nowhere")
    for ids in ([], [1, 300], {"a": 1}, ["a"], [[1]]):
        (tmp_path / "ids.json").write_text(json.dumps(ids))
        message = refused(source, tmp_path / "d", "--sample", tmp_path / "ids.json")
        assert "must be text, or a JSON list of token ids from 0 to 299" in message
    assert not (tmp_path / "d").exists()


def test_a_folder_of_syncdoth_and_back(tmp_path):
    out = call(GOLDEN / "syncdoth", tmp_path / "a", "--to", "run").splitlines()
    assert out[0].startswith("found    syncdoth: ")
    assert "5 heads of 8 (values 14), decay experiments, rotation interleaved inclusive, gated" in out[2]
    assert out[4].startswith("clamp    ")
    out = call(tmp_path / "a", tmp_path / "b", "--to", "syncdoth")
    assert "with modeling_retnet.py of github.com/syncdoth/RetNet:" in out
    one, other = load_file(tmp_path / "b/model.safetensors"), load_file(GOLDEN / "syncdoth/model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], x, rtol=1e-5, atol=1e-7) for name, x in other.items())


def test_what_was_converted_generates(tmp_path):
    source = save_folder(tmp_path / "a", fla_weights({**FLA, "vocab_size": 257}), {**FLA, "vocab_size": 257})
    call(source, tmp_path / "b", "--to", "run", "--tokenizer", "bytes", "--dtype", "bfloat16")
    words = ["generate", str(tmp_path / "b"), "--prompt", "x", "--max-tokens", "5", "--json"]
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert json.loads(result.stdout)["prompt"] == "x"


def test_a_tokenizer_of_a_folder_becomes_that_of_the_run(tmp_path):
    config = {**FLA, "vocab_size": 257}
    source = save_folder(tmp_path / "a", fla_weights(config), config)
    Tokenizer.load("bytes").save(source / "tokenizer.json")
    out = call(source, tmp_path / "b", "--to", "run")
    assert f"next     retnet generate {tmp_path / 'b'}" in out
    assert Tokenizer.load(tmp_path / "b").fingerprint == Tokenizer.load("bytes").fingerprint
    (source / "tokenizer.json").write_text("{}")
    assert "or give another with --tokenizer" in refused(source, tmp_path / "c", "--to", "run")


def test_a_tokenizer_that_belongs_to_another_model(tmp_path):
    message = refused(GOLDEN / "fla", tmp_path / "a", "--tokenizer", "bytes")
    assert message == "the tokenizer bytes has 257 tokens but the model 100; they do not belong together"


def test_a_run_and_back(tmp_path):
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=257, d_model=16, num_layers=1))
    write_checkpoint(tmp_path / "a", {**model_files(model), "tokenizer.json": Tokenizer.load("bytes").save})
    out = call(tmp_path / "a", tmp_path / "b")
    assert "Writing" not in out
    assert f"RetNetForCausalLM.from_pretrained({str(tmp_path / 'b')!r})" in out
    call(tmp_path / "b", tmp_path / "c", "--to", "run")
    assert (tmp_path / "c/model.safetensors").read_bytes() == (tmp_path / "a/model.safetensors").read_bytes()
    assert "import fla" in call(GOLDEN / "fla", tmp_path / "d", "--to", "fla")
    for flag in (["--clamp"], ["--sample", "x"]):
        assert "are for checkpoints of kind torchscale and syncdoth; this one is of kind 'run'" in refused(
            tmp_path / "a", tmp_path / "e", *flag
        )


def test_a_destination_that_is_taken_is_found_before_reading(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    assert "exists and is not empty" in refused(tmp_path / "nowhere", tmp_path / "full")
    assert "there is no" in refused(tmp_path / "nowhere", tmp_path / "new")


def test_notes_are_shown(tmp_path):
    args = {**TORCHSCALE, "chunkwise_recurrent": True}
    out = call(
        save_torchscale(tmp_path / "a", torchscale_weights(TORCHSCALE), args), tmp_path / "b", "--to", "run"
    )
    assert "         its arguments choose torchscale's chunkwise form" in out


@pytest.mark.slow
def test_a_mistake_ends_in_one_line_and_status_2(forks, tmp_path):
    shutil.copytree(GOLDEN / "fla", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "use_short_conv": True}))
    done = forks.run(["convert", "model", "out"], tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(
        "retnet: error: model cannot be run here, because its configuration has use_short_conv"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
