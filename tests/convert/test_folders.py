"""Model folders that lie: each lie is named, nothing outside the folder is opened, and what is written is whole."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from retnet.convert import convert, folders, read
from retnet.convert.folders import INDEX, WEIGHTS, Folder, destination
from retnet.model.checkpoint import write_checkpoint
from retnet.settings import UserError
from tests.helpers.checkpoints import FLA, GOLDEN, fla_weights, save_folder


@pytest.fixture
def sharded(tmp_path):
    """A folder whose weights are in two shards, with their index."""
    folder = save_folder(tmp_path / "model", fla_weights(FLA), FLA)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    halves = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for name, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, folder / name)
    places = {key: name for name, keys in halves.items() for key in keys}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_shards_are_one_model(sharded, tmp_path):
    whole = save_folder(tmp_path / "whole", fla_weights(FLA), FLA)
    one, other = read(sharded), read(whole)
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[name], x) for name, x in other.tensors.items())
    assert one.hashes.keys() == {"config.json", INDEX, "a.safetensors", "b.safetensors"}


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/c.safetensors", "..", ""])
def test_an_index_cannot_lead_outside(name, sharded):
    save_file({"model.norm.weight": torch.zeros(24)}, sharded.parent / "outside.safetensors")
    change_index(sharded, lambda places: places.update({"model.norm.weight": name}))
    with pytest.raises(UserError, match=r"which is not the name of a file in this folder"):
        read(sharded)


@pytest.mark.parametrize("name", ["b.safetensors", "config.json"])
def test_links_out_of_the_folder(name, sharded):
    shutil.move(sharded / name, sharded.parent / name)
    os.symlink(sharded.parent / name, sharded / name)
    with pytest.raises(UserError, match=r"is a link that leads out of its folder, to"):
        read(sharded)


def test_the_cache_of_the_hub_is_made_of_links(sharded):
    home = sharded.parent / "models--someone--model"
    (home / "blobs").mkdir(parents=True)
    shutil.move(sharded, home / "snapshots" / "0123abc")
    for file in (home / "snapshots/0123abc").iterdir():
        blob = home / "blobs" / f"hash-of-{file.name}"
        shutil.move(file, blob)
        os.symlink(os.path.relpath(blob, file.parent), file)
    assert read(home / "snapshots/0123abc").kind == "fla"


def test_every_shard_that_is_missing_damaged_or_out_of_order_is_named(sharded):
    (sharded / "b.safetensors").write_bytes((sharded / "b.safetensors").read_bytes()[:-100])
    change_index(sharded, lambda places: places.update({"x": "c.safetensors", "y": "a.safetensors"}))
    with pytest.raises(UserError) as error:
        read(sharded)
    for part in (
        f"{sharded} has no c.safetensors",
        f"cannot read {sharded / 'b.safetensors'}",
        "y is not in a.safetensors, where the index has it",
    ):
        assert part in str(error.value)


def test_a_tensor_in_two_shards(sharded):
    b = load_file(sharded / "b.safetensors")
    a = load_file(sharded / "a.safetensors")
    name = min(a)
    save_file({**b, name: a[name]}, sharded / "b.safetensors")
    with pytest.raises(
        UserError, match=rf"{name} is in b.safetensors, but not there by the index.*{name} is in two shards"
    ):
        read(sharded)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}', "{}"])
def test_a_damaged_index(index, sharded):
    (sharded / INDEX).write_text(index)
    with pytest.raises(UserError, match=r"is not valid JSON|not a JSON object|is damaged"):
        read(sharded)


def test_two_sets_of_weights_or_none(sharded):
    save_file({}, sharded / WEIGHTS)
    with pytest.raises(UserError, match=r"has both .*remove the one that does not belong"):
        read(sharded)
    (sharded / WEIGHTS).unlink()
    (sharded / INDEX).unlink()
    (sharded / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"has neither .*pytorch_model.bin\); weights in pickles are not read"
    ):
        read(sharded, "fla")


def test_truncated_weights(tmp_path):
    folder = save_folder(tmp_path / "a", fla_weights(FLA), FLA)
    data = (folder / WEIGHTS).read_bytes()
    for content in (data[:-1], data[:4], b"", b"\xff" * 100):
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read"):
            read(folder)


def test_tensors_that_do_not_fit_are_all_listed(tmp_path):
    weights = fla_weights({**FLA, "num_hidden_layers": 11})
    del weights["model.layers.2.mlp.up_proj.weight"]
    weights["model.layers.10.attn.k_proj.weight"] = torch.zeros(8, 24)
    weights["model.layers.10.attn.q_proj.weight"][0, 0] = float("inf")
    weights["model.layers.3.attn.q_conv1d.weight"] = torch.zeros(24, 1, 4)
    with pytest.raises(UserError) as error:
        read(save_folder(tmp_path / "a", weights, {**FLA, "num_hidden_layers": 11}))
    wrong = str(error.value).partition("configuration: ")[2].split("; ")
    assert wrong == [  # layer 10 after layer 2
        "model.layers.2.mlp.up_proj.weight is missing",
        "model.layers.3.attn.q_conv1d.weight (24, 1, 4) is not part of the model",
        "model.layers.10.attn.k_proj.weight has shape (8, 24) instead of (24, 24)",
        "model.layers.10.attn.q_proj.weight has 1 values that are NaN or infinite",
    ]


def test_a_tied_head_with_nan_is_told_as_nan(tmp_path):
    config = {**FLA, "tie_word_embeddings": True}
    weights = fla_weights(config)
    weights["model.embeddings.weight"][0, 0] = float("nan")
    weights["lm_head.weight"] = weights["model.embeddings.weight"].clone()
    with pytest.raises(UserError, match=r"model.embeddings.weight has 1 values that are NaN"):
        read(save_folder(tmp_path / "a", weights, config))


def test_a_manifest_is_verified(tmp_path):
    weights = fla_weights(FLA)
    files = {
        WEIGHTS: lambda path: save_file(weights, path),
        "config.json": lambda path: path.write_text(json.dumps(FLA)),
    }
    write_checkpoint(tmp_path / "a", files)
    assert read(tmp_path / "a").hashes[WEIGHTS] == folders.sha256(tmp_path / "a" / WEIGHTS)
    (tmp_path / "a" / "config.json").write_text(json.dumps({**FLA, "norm_eps": 1e-3}))
    with pytest.raises(UserError, match=r"config.json has \d+ bytes instead of"):
        read(tmp_path / "a")


def test_a_configuration_that_is_no_object(tmp_path):
    folder = save_folder(tmp_path / "a", fla_weights(FLA), FLA)
    for text, message in (
        ("[1]", "holds list, not a JSON object"),
        ("{", "is not valid JSON"),
        ("[" * 10**5, "JSON"),
        ('{"norm_eps": NaN}', "NaN"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read(folder, "fla")


def test_names_of_files_are_names():
    with pytest.raises(UserError, match=r"refers to '\.\./fla/config.json'"):
        Folder(GOLDEN / "fla").file("../fla/config.json")


@pytest.mark.parametrize("to", ["hf", "fla", "run"])
def test_a_destination_that_cannot_be_written(to, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/out: (Not a directory|File exists)"):
        convert(GOLDEN / "fla", tmp_path / "file" / "out", to=to)


def test_destinations(tmp_path):
    source = save_folder(tmp_path / "source" / "model", fla_weights(FLA), FLA)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    model = save_folder(tmp_path / "old", fla_weights(FLA), FLA)
    for free in ("empty", "new", "deep/er/new"):
        assert destination(tmp_path / free, source, force=False) == tmp_path / free
    assert destination(model, source, force=True) == model
    for dest, force, message in (
        (source, True, "holds SOURCE"),
        (source.parent, True, "holds SOURCE"),
        (tmp_path / "file", True, "is a file"),
        (model, False, "exists and is not empty; choose another folder, or --force"),
        (tmp_path / "other", True, "holds no model .*remove it yourself"),
    ):
        with pytest.raises(UserError, match=message):
            destination(dest, source, force=force)
