"""Hugging Face folders: written completely, opened as the same model, and refused where they are not what was written."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from retnet.data import Tokenizer
from retnet.mixers import MIXERS
from retnet.model import LanguageModel, ModelConfig, checkpoint
from retnet.model.hf import RetNetForCausalLM, RetNetModel, hf_tokenizer, write_folder
from retnet.settings import UserError
from tests.helpers.parity import relative
from tests.model.hf_helpers import DIALECTS, V, causal_lm, tokens

open_folder = RetNetForCausalLM.from_pretrained


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def same(got, want):
    """But for the last bit of fp64: a tensor in a mapped file lies at another alignment."""
    return relative(got, want) < 1e-14


@pytest.fixture
def folder(tmp_path):
    write_folder(causal_lm("fla"), tmp_path / "m", max_shard_size=4000)
    return tmp_path / "m"


@pytest.fixture
def single(tmp_path):
    write_folder(causal_lm(), tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("size", ["5GB", 4000])
def test_a_written_folder_opens_as_the_same_model(dialect, size, tmp_path):
    model, ids = causal_lm(dialect), tokens(2, 9)
    write_folder(model, tmp_path / "m", max_shard_size=size)
    assert (tmp_path / "m/model.safetensors.index.json").exists() == (size == 4000)
    for kind in (RetNetForCausalLM, AutoModelForCausalLM):
        found = kind.from_pretrained(tmp_path / "m")
        assert type(found) is RetNetForCausalLM
        assert not found.training
        assert found.dtype == torch.float64
        assert same(logits(found, ids), logits(model, ids))
        assert (found.lm_head.weight is found.model.embedding.weight) == DIALECTS[dialect].tie_embeddings
    base = AutoModel.from_pretrained(tmp_path / "m")
    assert type(base) is RetNetModel
    with torch.no_grad():
        want = model.to_language_model().features(ids)
        assert same(base(ids).last_hidden_state, want)


def test_weight_names(single, tmp_path):
    names = load_file(single / "model.safetensors").keys()
    assert names == {f"model.{name}" for name in checkpoint.weights(causal_lm().to_language_model())}
    write_folder(causal_lm("fla"), tmp_path / "untied")
    names = load_file(tmp_path / "untied/model.safetensors").keys()
    assert {"lm_head.weight", "model.embedding.weight", "model.blocks.1.ffn.gate.weight"} < names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_constants_are_exact_in_every_type(dialect, dtype, tmp_path):
    """Weights are made on the meta device and cast; γ and angles are what they are in a model made at once."""
    write_folder(causal_lm(dialect), tmp_path / "m")
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
    write_folder(RetNetForCausalLM.from_language_model(model), tmp_path / "m")
    found, want = open_folder(tmp_path / "m", dtype=torch.bfloat16), model.to(torch.bfloat16)
    got = dict((*found.model.named_parameters(), *found.model.named_buffers()))
    for name, x in (*want.named_parameters(), *want.named_buffers()):
        if name != "head.weight":
            assert got[name].dtype == x.dtype, name
            assert torch.equal(got[name], x), name


def test_the_same_tensors_not_copies():
    model = LanguageModel(DIALECTS["fla"]).train()
    theirs = RetNetForCausalLM.from_language_model(model)
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
        base = RetNetModel.from_pretrained(tmp_path / "base")
        assert same(base(ids).last_hidden_state, second.model(ids).last_hidden_state)
    with pytest.raises(UserError, match=r"lm_head.weight is missing"):
        open_folder(tmp_path / "base")
    with pytest.raises(UserError, match=r"call model.push_to_hub\(repo_id\)"):
        second.save_pretrained(tmp_path, push_to_hub=True)


def test_a_folder_without_a_manifest_opens_too(tmp_path):
    model = causal_lm("fla")
    PreTrainedModel.save_pretrained(model, tmp_path)
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
    write_folder(causal_lm(), tmp_path / "m", provenance={"source": {"sha256": "abc"}})
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
            write_folder(causal_lm(), tmp_path / "m")
    assert not (tmp_path / "m").exists()
    write_folder(causal_lm(), tmp_path / "m")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    with pytest.raises(UserError, match=r"m exists; choose another name"):
        write_folder(causal_lm(), tmp_path / "m")


# ---- tokenizers


TEXTS = ["", "a", "Grüße, 世界! 🙂\r\n\t", "<|bos|> is text", "  two  spaces ", "don't 1234 \x00\x7f\ufeff"]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokenizers_give_our_ids(kind, tmp_path):
    ours = Tokenizer.load("bytes") if kind == "bytes" else Tokenizer.train(TEXTS * 20, 300)
    model = causal_lm()
    model.resize_token_embeddings(ours.vocab_size)
    write_folder(model, tmp_path / "m", tokenizer=ours)
    for theirs in (hf_tokenizer(ours), AutoTokenizer.from_pretrained(tmp_path / "m")):
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


# ---- damage


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: flip(f / "model.safetensors"), "model.safetensors was changed after it was written"),
        (lambda f: edit(f / "config.json", norm_eps=1e-3), "config.json has .* bytes instead of"),
        (lambda f: flip(f / "retentive_network.py"), "retentive_network.py was changed"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (
            lambda f: (f / "manifest.json").write_text('{"files": ["config.json"]}'),
            "manifest.json is damaged",
        ),
        (
            lambda f: (f / "manifest.json").write_text('{"files": {"config.json": 3}}'),
            "manifest.json is damaged",
        ),
        (lambda f: (f / "manifest.json").write_text('{"files": {}}'), "is not in the manifest"),
        (
            lambda f: (f / "manifest.json").write_text('{"files": {"../x": {"bytes": 1, "sha256": ""}}}'),
            "../x is missing",
        ),
    ],
)
def test_changes_are_refused(single, change, message):
    change(single)
    with pytest.raises(UserError, match=message):
        open_folder(single)


def a_shard(folder):
    return min(folder.glob("model-*.safetensors"))


def unsealed(folder):
    (folder / "manifest.json").unlink()
    return folder


def rewritten(folder, change):
    """The folder with other weights, and no manifest to tell."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return unsealed(folder)


def test_weights_that_do_not_fit_are_all_listed(single):
    def change(tensors):
        tensors["extra"] = tensors.pop("model.norm.weight")
        tensors["model.norm.bias"] = torch.zeros(3)
        tensors["model.blocks.0.ffn.fc1.weight"][1, 2] = float("nan")
        tensors["model.blocks.1.ffn.fc1.weight"][0, :2] = float("inf")
        tensors["model.blocks.0.ffn_norm.bias"] = torch.zeros(16, dtype=torch.int64)

    with pytest.raises(UserError) as error:
        open_folder(rewritten(single, change))
    for part in (
        "model.norm.weight is missing",
        "extra is not part of the model",
        "model.norm.bias has shape (3,) instead of (16,)",
        "model.blocks.0.ffn.fc1.weight has 1 values that are NaN or infinite",
        "model.blocks.1.ffn.fc1.weight has 2 values that are NaN or infinite",
        "model.blocks.0.ffn_norm.bias has type torch.int64",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": V + 1}, rf"embedding.weight has shape \({V}, 16\) instead of \({V + 1}, 16\)"),
        ({"tie_embeddings": False}, "lm_head.weight is missing"),
        ({"num_layers": 1}, "blocks.1.ffn.fc1.weight is not part of the model"),
        ({"ffn": "swiglu"}, "blocks.0.ffn.gate.weight is missing"),
        ({"d_modle": 3}, "config.json: unknown setting 'd_modle'"),
        ({"model_type": "llama"}, "holds a model of type 'llama'"),
        ({"transformers_weights": "../model.safetensors"}, "unknown setting 'transformers_weights'"),
    ],
)
def test_a_configuration_that_contradicts_the_weights(single, changes, message):
    edit(unsealed(single) / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        open_folder(single)


def test_the_auto_class_checks_as_well(single):
    flip(single / "model.safetensors")
    with pytest.raises(UserError, match="was changed"):
        AutoModelForCausalLM.from_pretrained(single)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_truncated_files(single, length):
    content = (single / "model.safetensors").read_bytes()
    (unsealed(single) / "model.safetensors").write_bytes(content[:length])
    with pytest.raises(UserError, match=r"cannot read .*model.safetensors"):
        open_folder(single)


@pytest.mark.parametrize(
    "target", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x", ".."]
)
def test_an_index_cannot_lead_out_of_the_folder(folder, target):
    shutil.copy(a_shard(folder), folder.parent / "outside.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = target
    edit(unsealed(folder) / "model.safetensors.index.json", **index)
    with pytest.raises(UserError, match="leads out of the folder"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "has no weight_map"),
        ([1], "has no weight_map"),
        ({"lm_head.weight": 3}, "has no weight_map"),
        ({"lm_head.weight": "model-7.safetensors"}, "model-7.safetensors is missing; the index names it"),
    ],
)
def test_a_broken_index(folder, weight_map, message):
    edit(unsealed(folder) / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(UserError, match=message):
        open_folder(folder)


def test_an_index_that_promises_too_much(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    index["lm_head.weight"] = next(file for file in index.values() if file != index["lm_head.weight"])
    edit(unsealed(folder) / "model.safetensors.index.json", weight_map=index)
    with pytest.raises(UserError, match=r"lm_head.weight is not in model-.*, where the index says"):
        open_folder(folder)


@pytest.mark.parametrize("sealed", [True, False])
def test_links_out_of_the_folder(single, sealed):
    file = single / "model.safetensors"
    outside = file.rename(single.parent / "elsewhere.safetensors")
    file.symlink_to(outside)
    if not sealed:
        unsealed(single)
    with pytest.raises(UserError, match=r"is a link to .*elsewhere.safetensors, outside the folder"):
        open_folder(single)


def test_links_of_the_hubs_cache_are_in_order(single, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(single.iterdir())):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert same(logits(open_folder(snapshot), tokens(1, 4)), logits(open_folder(single), tokens(1, 4)))


def test_weights_slipped_in_beside_the_manifest(folder):
    shutil.copy(a_shard(folder), folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors is not in the manifest"):
        open_folder(folder)


class Malicious:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return (os.mkdir, (str(self.witness),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
@pytest.mark.parametrize("options", [{}, {"use_safetensors": False}, {"weights_only": False}])
def test_a_pickle_is_never_opened(single, name, options, tmp_path):
    (unsealed(single) / "model.safetensors").unlink()
    (single / name).write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    with pytest.raises(UserError, match=r"never opened|cannot read|safetensors only"):
        open_folder(single, **options)
    assert not (tmp_path / "executed").exists()
    pickle.loads((single / name).read_bytes())  # it would have been
    assert (tmp_path / "executed").exists()


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"config.json is missing"):
        open_folder(tmp_path)
    with pytest.raises(UserError, match="safetensors only"):
        open_folder(tmp_path, gguf_file="x.gguf")
    with pytest.raises(UserError, match="every weight has to fit"):
        open_folder(tmp_path, ignore_mismatched_sizes=True)
