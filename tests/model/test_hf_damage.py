"""Hugging Face folders that are refused: damaged, contradictory, leading elsewhere, pickled."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from retnet.settings import UserError
from tests.helpers.lazily import transformers
from tests.model.hf_helpers import V, flip, logits, open_folder, same, tokens


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
        transformers.AutoModelForCausalLM.from_pretrained(single)


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
