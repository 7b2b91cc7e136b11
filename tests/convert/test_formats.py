"""From every kind to every kind: the same logits, the hash of the source, the tokenizer, whole or not at all."""

import json
from dataclasses import replace

import pytest
import tokenizers
import torch

from retnet.convert import READERS, WRITERS, Found, convert, formats, native, read, recognise, write
from retnet.data import Tokenizer
from retnet.engine import open_run
from retnet.io import sha256
from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.model.checkpoint import load_model, model_files, verify, write_checkpoint
from retnet.settings import UserError
from tests.helpers.checkpoints import (
    FLA,
    GOLDEN,
    TORCHSCALE,
    fla_weights,
    golden,
    save_folder,
    save_torchscale,
    torchscale_weights,
)
from tests.helpers.parity import relative

SOURCES = ["torchscale-gelu", "torchscale-fairseq-swish", "syncdoth", "fla"]


def logits(model, tokens):
    with torch.inference_mode():
        out = model(tokens)
    return getattr(out, "logits", out)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with one checkpoint, trained on bytes."""
    home = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    mixer = RetentionConfig(num_heads=2, head_norm_affine=True, decay="experiments")
    model = LanguageModel(ModelConfig(vocab_size=257, d_model=16, num_layers=2, mixer=mixer))
    files = {**model_files(model), "tokenizer.json": Tokenizer.load("bytes").save}
    write_checkpoint(home / "checkpoints" / "step-00000010", files)
    (home / "checkpoints" / "best").write_text("step-00000010\n")
    return home


@pytest.mark.parametrize("name", SOURCES)
def test_golden_checkpoints_through_hugging_face_and_runs(name, tmp_path):
    from retnet.model.hf import RetNetForCausalLM

    tokens, want = golden(name)
    limit = 1e-5 if name == "fla" else 5e-5
    found = convert(GOLDEN / name, tmp_path / "hf")
    theirs = RetNetForCausalLM.from_pretrained(tmp_path / "hf")
    assert relative(logits(theirs, tokens), want) <= limit
    convert(tmp_path / "hf", tmp_path / "run", to="run")
    assert relative(logits(load_model(tmp_path / "run"), tokens), want) <= limit
    convert(tmp_path / "run", tmp_path / "again")
    again = read(tmp_path / "again")
    assert (again.kind, again.config) == ("hf", found.config)
    assert all(torch.equal(again.tensors[key], x) for key, x in found.tensors.items())
    for folder in (tmp_path / "hf", tmp_path / "run"):  # what says which model it is
        whole = read(folder)
        (folder / "model.safetensors").write_bytes(b"")
        assert read(folder, weights=False) == replace(whole, tensors={})
    assert read(GOLDEN / name, weights=False).config == found.config


@pytest.mark.parametrize("name", SOURCES[:3])
def test_the_clamp_survives_hugging_face(name, tmp_path):
    from retnet.model.hf import RetNetForCausalLM

    tokens, want = golden(name)
    convert(GOLDEN / name, tmp_path / "hf", clamp=True)
    assert relative(logits(RetNetForCausalLM.from_pretrained(tmp_path / "hf"), tokens), want) <= 1e-6


@pytest.mark.parametrize("to", ["hf", "fla", "run"])
def test_provenance_and_manifest(to, tmp_path):
    convert(GOLDEN / "fla", tmp_path / "out", to=to)
    verify(tmp_path / "out")
    listed = json.loads((tmp_path / "out/manifest.json").read_text())["files"].keys()
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*listed, "manifest.json"}
    origin = json.loads((tmp_path / "out/provenance.json").read_text())
    assert (origin["kind"], origin["source"]) == ("fla", "fla")
    assert origin["sha256"] == {
        name: sha256(GOLDEN / "fla" / name) for name in ("config.json", "model.safetensors")
    }
    assert str(tmp_path) not in (tmp_path / "out/provenance.json").read_text()


def test_a_run_becomes_a_hugging_face_folder_with_its_tokenizer(run, tmp_path):
    from transformers import AutoTokenizer

    from retnet.model.hf import RetNetForCausalLM

    convert(run, tmp_path / "hf")
    tokens = torch.randint(257, (2, 19))
    model = RetNetForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(model, tokens), logits(open_run(run).model, tokens))
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("día")["input_ids"] == [256, *"día".encode()]
    assert model.config.bos_token_id == model.generation_config.eos_token_id == 256
    convert(tmp_path / "hf", tmp_path / "run", to="run", tokenizer=Tokenizer.load(tmp_path / "hf"))
    again = open_run(tmp_path / "run")
    assert torch.equal(logits(again.model, tokens), logits(model, tokens))
    assert again.tokenizer.encode("día") == list("día".encode())


def test_a_run_becomes_a_run(run, tmp_path):
    convert(run, tmp_path / "a", to="run", dtype="bfloat16")
    one, other = open_run(run), open_run(tmp_path / "a")
    assert one.tokenizer.fingerprint == other.tokenizer.fingerprint
    assert torch.equal(other.model.embedding.weight, one.model.embedding.weight.bfloat16())


def test_a_tokenizer_that_is_given(tmp_path):
    weights = torchscale_weights(TORCHSCALE | {"vocab_size": 257})
    source = save_torchscale(tmp_path / "a", weights, TORCHSCALE | {"vocab_size": 257})
    convert(source, tmp_path / "hf", tokenizer=Tokenizer.load("bytes"))
    found = read(tmp_path / "hf")
    assert found.tokens == {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    assert Tokenizer.load(tmp_path / "hf").fingerprint == Tokenizer.load("bytes").fingerprint


def test_texts_end_in_transformers_where_they_end_here(tmp_path):
    """At all ends that the tokenizer names, not only where the next text begins."""
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, **{str(i): i for i in range(1, 254)}}, "[UNK]")
    )
    words.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    words.save(str(tmp_path / "words.json"))
    weights = torchscale_weights(TORCHSCALE | {"vocab_size": 257})
    source = save_torchscale(tmp_path / "a", weights, TORCHSCALE | {"vocab_size": 257})
    ours = Tokenizer.load(tmp_path / "words.json")
    convert(source, tmp_path / "run", to="run", tokenizer=ours)
    convert(tmp_path / "run", tmp_path / "hf")
    ends = json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"]
    assert ends == list(ours.end_ids) == [254, 255, 256]


def test_tokenizers_of_other_folders_go_along(tmp_path):
    folder = save_folder(tmp_path / "a", fla_weights(FLA), FLA)
    Tokenizer.load("bytes").save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|bos|>"}')
    for to in WRITERS.keys() - {"syncdoth"}:  # which cannot express such a model
        convert(folder, tmp_path / to, to=to)
        names = {"tokenizer.json"} if to == "run" else {"tokenizer.json", "tokenizer_config.json"}
        for name in names:
            assert (tmp_path / to / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_types_of_weights(name, tmp_path):
    dtype = getattr(torch, name)
    convert(GOLDEN / "fla", tmp_path / "a", to="fla", dtype=name)
    found = read(tmp_path / "a")
    assert {x.dtype for x in found.tensors.values()} == {dtype}
    assert json.loads((tmp_path / "a/config.json").read_text())["dtype"] == name
    want = read(GOLDEN / "fla").tensors
    assert all(torch.equal(found.tensors[key], want[key].to(dtype)) for key in want)


def test_the_type_of_the_source_is_kept(tmp_path):
    weights = {name: x.double() for name, x in torchscale_weights(TORCHSCALE).items()}
    convert(save_torchscale(tmp_path / "a", weights, TORCHSCALE), tmp_path / "b", to="run")
    assert read(tmp_path / "b").dtype == torch.float64
    weights["layer_norm.weight"] = weights["layer_norm.weight"].float()  # mixed: nothing is lost
    assert read(save_torchscale(tmp_path / "c", weights, TORCHSCALE)).dtype == torch.float64


def test_weights_too_large_for_a_type_are_named(tmp_path):
    weights = torchscale_weights(TORCHSCALE)
    weights["layers.0.ffn.fc1.weight"][0, 0] = 1e5
    source = save_torchscale(tmp_path / "a", weights, TORCHSCALE)
    with pytest.raises(UserError, match=r"too large for float16: blocks.0.ffn.fc1.weight; take bfloat16"):
        convert(source, tmp_path / "b", dtype="float16")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("to", ["hf", "fla", "run"])
def test_half_written_output_never_looks_complete(to, tmp_path, monkeypatch):
    def full(data, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats, "_put", full)
    with pytest.raises(UserError, match=r"cannot write .*out: No space left on device"):
        convert(GOLDEN / "fla", tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    convert(GOLDEN / "fla", tmp_path / "out", to=to)  # what was left is in nobody's way
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_a_model_and_nothing_else(tmp_path):
    convert(GOLDEN / "fla", tmp_path / "out", to="fla")
    with pytest.raises(UserError, match=r"exists and is not empty"):
        convert(GOLDEN / "torchscale-gelu", tmp_path / "out")
    convert(GOLDEN / "torchscale-gelu", tmp_path / "out", force=True)
    assert read(tmp_path / "out").config.vocab_size == 97
    assert read(tmp_path / "out").kind == "hf"


def test_kinds_are_recognised(run, tmp_path):
    convert(GOLDEN / "fla", tmp_path / "hf")
    assert recognise(GOLDEN / "torchscale-gelu") == "torchscale"
    assert recognise(GOLDEN / "torchscale-gelu/checkpoint.pt") == "torchscale"
    assert recognise(GOLDEN / "fla") == "fla"
    trained = save_folder(tmp_path / "trained", fla_weights(FLA), FLA)
    torch.save({}, trained / "optimizer.pt")  # as a trainer leaves it
    assert recognise(trained) == "fla"
    assert recognise(tmp_path / "hf") == "hf"
    assert recognise(run) == recognise(run / "checkpoints/step-00000010") == "run"


def test_what_is_not_recognised_says_what_was_looked_for(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    for source in ("empty", "notes.txt"):
        with pytest.raises(UserError, match=r"is no checkpoint known here. Looked for: ") as error:
            recognise(tmp_path / source)
        assert all(f"{kind}: " in str(error.value) for kind in READERS)
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        read(tmp_path / "nowhere", "fla")
    both = save_torchscale(tmp_path / "both", torchscale_weights(TORCHSCALE), TORCHSCALE).parent
    (both / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"looks like torchscale and run; say which with --from"):
        recognise(both)
    assert read(both, "torchscale").kind == "torchscale"


def test_combinations_that_make_no_sense(run, tmp_path):
    with pytest.raises(UserError, match=r"unknown kind 'fle'; did you mean 'fla'"):
        read(GOLDEN / "fla", "fle")
    with pytest.raises(UserError, match=r"--config gives torchscale's arguments, but .* is of kind 'fla'"):
        read(GOLDEN / "fla", config=tmp_path / "x.json")
    with pytest.raises(UserError, match=r"is a file, but kind 'fla' is a folder"):
        read(GOLDEN / "torchscale-gelu/config.json", "fla")
    with pytest.raises(
        UserError, match=r"looks like fla, and kind 'syncdoth' is a folder whose .* decoder_embed_dim"
    ):
        read(GOLDEN / "fla", "syncdoth")
    with pytest.raises(UserError, match=r"unknown kind 'onnx'"):
        convert(GOLDEN / "fla", tmp_path / "a", to="onnx")
    with pytest.raises(UserError, match=r"unknown dtype 'int8'"):
        convert(GOLDEN / "fla", tmp_path / "a", dtype="int8")
    with pytest.raises(UserError, match=r"flash-linear-attention cannot express this model"):
        convert(run, tmp_path / "a", to="fla")


def test_a_run_that_was_changed_is_refused(run, tmp_path):
    convert(run, tmp_path / "a", to="run")
    (tmp_path / "a/model.toml").write_text((tmp_path / "a/model.toml").read_text() + "\n")
    with pytest.raises(UserError, match=r"model.toml has \d+ bytes instead of"):
        convert(tmp_path / "a", tmp_path / "b")


def test_quantised_folders_are_refused(tmp_path):
    convert(GOLDEN / "fla", tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    (tmp_path / "a/config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "int8"}})
    )
    (tmp_path / "a/manifest.json").unlink()
    with pytest.raises(UserError, match=r"holds quantised weights; convert the model they were made from"):
        read(tmp_path / "a")


def test_the_same_conversion_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        convert(GOLDEN / "torchscale-gelu", tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_a_model_in_memory_is_written_too(tmp_path):
    found = read(GOLDEN / "fla")
    doubled = replace(found, tensors={name: 2 * x for name, x in found.tensors.items()})
    assert write(doubled, tmp_path / "a", "run", source="memory") == tmp_path / "a"
    assert isinstance(read(tmp_path / "a"), Found)
    assert torch.equal(load_model(tmp_path / "a").norm.weight, 2 * found.tensors["norm.weight"])


def test_without_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need transformers: pip install 'retnet\[hf\]'"):
        convert(GOLDEN / "fla", tmp_path / "a")
    convert(GOLDEN / "fla", tmp_path / "a", to="run")
