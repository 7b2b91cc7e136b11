"""Checkpoint directories: complete or absent; damage is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig, checkpoint
from retnet.model.checkpoint import load_model, model_files, verify, write_checkpoint
from retnet.settings import UserError


def model(**options) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(
        ModelConfig(vocab_size=31, d_model=16, num_layers=2, mixer=RetentionConfig(num_heads=2), **options)
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_saved_model_is_the_same_model(tied, dtype, tmp_path):
    saved = model(tie_embeddings=tied)
    write_checkpoint(tmp_path / "c", model_files(saved))
    loaded = load_model(tmp_path / "c", dtype=dtype)
    assert not loaded.training
    assert loaded.config == saved.config
    assert (loaded.head.weight is loaded.embedding.weight) == tied
    tokens = torch.randint(31, (1, 20))
    with torch.no_grad():
        want = saved.eval().to(dtype)(tokens) if dtype else saved.eval()(tokens)
        assert torch.equal(loaded(tokens), want)
    names = load_file(tmp_path / "c/model.safetensors").keys()
    assert ("head.weight" in names) != tied
    assert not any("log_decay" in name or "theta" in name for name in names)


def test_an_interrupted_write_leaves_nothing_that_could_be_taken_for_a_checkpoint(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(UserError, match=r"cannot write .*c: disk full"):
        write_checkpoint(tmp_path / "c", {**model_files(model()), "more": fail})
    assert not (tmp_path / "c").exists()
    write_checkpoint(tmp_path / "c", model_files(model()))  # what was left does not stand in the way
    verify(tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_the_manifest_is_written_last(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(checkpoint, "flush", lambda path: order.append(path.name))
    write_checkpoint(tmp_path / "c", model_files(model()))
    assert order == ["model.safetensors", "model.toml", "manifest.json", ".c.partial", tmp_path.name]


def damaged(tmp_path, change):
    write_checkpoint(tmp_path / "c", model_files(model()))
    change(tmp_path / "c")
    return tmp_path / "c"


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: flip(c / "model.safetensors"), "model.safetensors was changed after it was written"),
        (lambda c: (c / "model.safetensors").write_bytes(b"x"), "model.safetensors has 1 bytes instead of"),
        (lambda c: (c / "model.toml").unlink(), "model.toml is missing"),
        (lambda c: (c / "manifest.json").unlink(), "has no manifest.json, so it is no complete checkpoint"),
        (lambda c: (c / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda c: (c / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    ],
)
def test_damage_is_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_model(damaged(tmp_path, change))


def test_all_damage_is_listed_at_once(tmp_path):
    path = damaged(tmp_path, lambda c: ((c / "model.toml").unlink(), flip(c / "model.safetensors")))
    with pytest.raises(UserError, match=r"model.safetensors was changed.*model.toml is missing"):
        verify(path)


def test_a_manifest_cannot_reach_outside(tmp_path):
    path = damaged(tmp_path, lambda _: None)
    (tmp_path / "outside").write_text("secret")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../outside"] = {"sha256": "0", "bytes": 6}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"\.\./outside is missing"):
        verify(path)


def test_weights_that_do_not_fit_are_all_listed(tmp_path):
    tensors = checkpoint.weights(model())
    tensors["extra"] = tensors.pop("norm.weight")
    tensors["norm.bias"] = torch.zeros(3)
    files = {**model_files(model()), "model.safetensors": lambda path: save_file(tensors, path)}
    write_checkpoint(tmp_path / "c", files)
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "c")
    for part in ("norm.weight is missing", "extra is not part", r"norm.bias has shape (3,) instead of (16,)"):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["shard-00001-model-00001-of-00001.safetensors", "model.safetensors"])
def test_what_the_manifest_does_not_list_is_not_read(name, tmp_path):
    """Nobody has verified it: a process that was thought dead has written it, say."""
    path = damaged(tmp_path, lambda c: (c / "model.safetensors").rename(tmp_path / "whole"))
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["model.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "whole").rename(path / name)
    with pytest.raises(UserError, match=r"has no model\.safetensors in its manifest"):
        load_model(path)
