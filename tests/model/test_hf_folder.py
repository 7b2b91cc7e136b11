"""Hugging Face folders: written completely, and opened as the same model."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from retnet.data import Tokenizer
from retnet.mixers import MIXERS
from retnet.model import LanguageModel, ModelConfig, checkpoint
from retnet.settings import UserError
from tests.helpers.fast import few_fast
from tests.helpers.lazily import hf, transformers
from tests.model.hf_helpers import DIALECTS, V, causal_lm, flip, logits, open_folder, same, tokens


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("size", few_fast(["5GB", 4000], 4000))
def test_a_written_folder_opens_as_the_same_model(dialect, size, tmp_path):
    model, ids = causal_lm(dialect), tokens(2, 9)
    hf.write_folder(model, tmp_path / "m", max_shard_size=size)
    assert (tmp_path / "m/model.safetensors.index.json").exists() == (size == 4000)
    for kind in (hf.RetNetForCausalLM, transformers.AutoModelForCausalLM):
        found = kind.from_pretrained(tmp_path / "m")
        assert type(found) is hf.RetNetForCausalLM
        assert not found.training
        assert found.dtype == torch.float64
        assert same(logits(found, ids), logits(model, ids))
        assert (found.lm_head.weight is found.model.embedding.weight) == DIALECTS[dialect].tie_embeddings
    base = transformers.AutoModel.from_pretrained(tmp_path / "m")
    assert type(base) is hf.RetNetModel
    with torch.no_grad():
        want = model.to_language_model().features(ids)
        assert same(base(ids).last_hidden_state, want)


def test_weight_names(single, tmp_path):
    names = load_file(single / "model.safetensors").keys()
    assert names == {f"model.{name}" for name in checkpoint.weights(causal_lm().to_language_model())}
    hf.write_folder(causal_lm("fla"), tmp_path / "untied")
    names = load_file(tmp_path / "untied/model.safetensors").keys()
    assert {"lm_head.weight", "model.embedding.weight", "model.blocks.1.ffn.gate.weight"} < names


@pytest.mark.parametrize(
    "dtype", few_fast([torch.bfloat16, torch.float16, torch.float32, torch.float64], torch.bfloat16)
)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_constants_are_exact_in_every_type(dialect, dtype, tmp_path):
    """Weights are made on the meta device and cast; γ and angles are what they are in a model made at once."""
    hf.write_folder(causal_lm(dialect), tmp_path / "m")
    found = open_folder(tmp_path / "m", dtype=dtype)
    made = LanguageModel(DIALECTS[dialect]).to(dtype)
    assert {p.dtype for p in found.parameters()} == {dtype}
    constants = dict(found.model.named_buffers())
    assert constants.keys() == dict(made.named_buffers()).keys()
    for name, want in made.named_buffers():
        assert constants[name].dtype == want.dtype
        assert torch.equal(constants[name], want), name
    ids = tokens(1, 8)
    with torch.no_grad():
        assert same(found(ids).logits, causal_lm(dialect).to_language_model().to(dtype)(ids))
        state = found(ids).past_key_values.states
    assert state[0].kv.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("name", MIXERS)
def test_any_mixer_in_bf16_keeps_what_it_keeps(name, tmp_path):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=V, d_model=16, num_layers=2, mixer=MIXERS[name].Config())
    model = LanguageModel(config).eval()
    hf.write_folder(hf.RetNetForCausalLM.from_language_model(model), tmp_path / "m")
    found, want = open_folder(tmp_path / "m", dtype=torch.bfloat16), model.to(torch.bfloat16)
    got = dict((*found.model.named_parameters(), *found.model.named_buffers()))
    for name, x in (*want.named_parameters(), *want.named_buffers()):
        if name != "head.weight":
            assert got[name].dtype == x.dtype, name
            assert torch.equal(got[name], x), name


def test_the_same_tensors_not_copies():
    model = LanguageModel(DIALECTS["fla"]).train()
    theirs = hf.RetNetForCausalLM.from_language_model(model)
    back = theirs.to_language_model()
    assert theirs.training
    assert back.training
    for name, parameter in model.named_parameters():
        assert dict(back.named_parameters())[name] is parameter
    assert theirs.lm_head.weight is model.head.weight


def test_save_pretrained_writes_a_manifest_and_replaces_what_stood_there(tmp_path):
    first, second, ids = causal_lm(), causal_lm("fla"), tokens(1, 5)
    first.save_pretrained(tmp_path)
    checkpoint.verify(tmp_path)
    second.save_pretrained(tmp_path, max_shard_size=4000)
    checkpoint.verify(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()  # transformers would open it before the shards
    assert same(logits(open_folder(tmp_path), ids), logits(second, ids))
    second.model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        base = hf.RetNetModel.from_pretrained(tmp_path / "base")
        assert same(base(ids).last_hidden_state, second.model(ids).last_hidden_state)
    with pytest.raises(UserError, match=r"lm_head.weight is missing"):
        open_folder(tmp_path / "base")
    with pytest.raises(UserError, match=r"call model.push_to_hub\(repo_id\)"):
        second.save_pretrained(tmp_path, push_to_hub=True)


def test_a_folder_without_a_manifest_opens_too(tmp_path):
    model = causal_lm("fla")
    transformers.PreTrainedModel.save_pretrained(model, tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    assert same(logits(open_folder(tmp_path), tokens(1, 5)), logits(model, tokens(1, 5)))


def test_variants_and_subfolders(tmp_path):
    model, ids = causal_lm(), tokens(1, 5)
    model.save_pretrained(tmp_path / "in/side", variant="fp64")
    found = open_folder(tmp_path / "in", subfolder="side", variant="fp64")
    assert same(logits(found, ids), logits(model, ids))
    with pytest.raises(UserError, match=r"has no model.safetensors"):
        open_folder(tmp_path / "in/side")
    flip(tmp_path / "in/side/model.fp64.safetensors")
    with pytest.raises(UserError, match="was changed"):
        open_folder(tmp_path / "in", subfolder="side", variant="fp64")


def test_the_base_of_adapters_is_checked(single, tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "adapter").mkdir()
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(single),
        "target_modules": ["q_proj"],
        "r": 2,
    }
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    flip(single / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors was changed"):
        open_folder(tmp_path / "adapter")


def test_provenance_and_every_file_are_in_the_manifest(tmp_path):
    hf.write_folder(causal_lm(), tmp_path / "m", provenance={"source": {"sha256": "abc"}})
    listed = json.loads((tmp_path / "m/manifest.json").read_text())["files"]
    assert listed.keys() | {"manifest.json"} == {file.name for file in (tmp_path / "m").iterdir()}
    assert json.loads((tmp_path / "m/provenance.json").read_text()) == {"source": {"sha256": "abc"}}
    model = open_folder(tmp_path / "m")
    model.save_pretrained(tmp_path / "m")  # other weights may come from elsewhere
    assert not (tmp_path / "m/provenance.json").exists()


def test_an_interrupted_write_leaves_no_folder(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "flush", fail)
        with pytest.raises(UserError, match=r"cannot write .*m: disk full"):
            hf.write_folder(causal_lm(), tmp_path / "m")
    assert not (tmp_path / "m").exists()
    hf.write_folder(causal_lm(), tmp_path / "m")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    with pytest.raises(UserError, match=r"m exists; choose another name"):
        hf.write_folder(causal_lm(), tmp_path / "m")


# ---- tokenizers


TEXTS = ["", "a", "Grüße, 世界! 🙂\r\n\t", "<|bos|> is text", "  two  spaces ", "don't 1234 \x00\x7f\ufeff"]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokenizers_give_our_ids(kind, tmp_path):
    ours = Tokenizer.load("bytes") if kind == "bytes" else Tokenizer.train(TEXTS * 20, 300)
    model = causal_lm()
    model.resize_token_embeddings(ours.vocab_size)
    hf.write_folder(model, tmp_path / "m", tokenizer=ours)
    for theirs in (hf.hf_tokenizer(ours), transformers.AutoTokenizer.from_pretrained(tmp_path / "m")):
        assert len(theirs) == ours.vocab_size
        assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == ours.bos_id
        for text in TEXTS:
            ids = ours.encode(text)
            assert theirs(text, add_special_tokens=False).input_ids == ids
            assert theirs(text).input_ids == [ours.bos_id, *ids]
            assert theirs.decode([ours.bos_id, *ids], skip_special_tokens=True) == ours.decode(ids)
        batch = theirs(TEXTS, padding=True, return_tensors="pt")
        assert set(batch) == {"input_ids", "attention_mask"}
        assert batch.attention_mask[0].tolist() == [0] * (batch.input_ids.shape[1] - 1) + [1]
    found = open_folder(tmp_path / "m")
    for config in (found.config, found.generation_config):
        assert config.bos_token_id == config.eos_token_id == config.pad_token_id == ours.bos_id
    assert Tokenizer.load(tmp_path / "m").fingerprint == ours.fingerprint


def test_resized_embeddings_are_saved(tmp_path):
    model = causal_lm("fla")
    model.resize_token_embeddings(V + 6)
    model.save_pretrained(tmp_path)
    found = open_folder(tmp_path)
    assert found.config.vocab_size == V + 6
    assert same(logits(found, tokens(1, 4)), logits(model, tokens(1, 4)))


# ---- trust_remote_code


@pytest.mark.slow
def test_a_folder_opens_without_importing_us_first(single, tmp_path):
    code = f"""
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
path = {str(single)!r}
try:
    AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)
except ValueError as error:
    assert "retentive_network" in str(error) or "trust_remote_code" in str(error), error
else:
    raise SystemExit("opened without the code")
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
assert type(model).__module__ == "retnet.model.hf.modeling", type(model).__module__
model.save_pretrained({str(tmp_path / "again")!r})
print(model(torch.arange(5)[None]).logits.double().sum().item())
"""
    home = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=home, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    want = float(logits(open_folder(single), torch.arange(5)[None]).sum())
    assert float(done.stdout.split()[-1]) == pytest.approx(want, abs=1e-9)
    assert (tmp_path / "again/retentive_network.py").read_text() == (
        single / "retentive_network.py"
    ).read_text()
    checkpoint.verify(tmp_path / "again")
