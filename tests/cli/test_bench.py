import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from retnet.bench import llama_cpp, served
from retnet.cli import bench, cli
from retnet.settings import UserError
from tests.helpers.echo_server import echo_server


def quick(verb, out, *options):
    """The record of a quick run, the size of its picture and what it printed."""
    words = ["bench", verb, "--quick", "--out", out, *options]
    result = CliRunner().invoke(cli, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (data,), (picture,) = out.glob(f"{verb}-quick.*.json"), out.glob(f"{verb}-quick.*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(data) in result.stdout
    assert str(picture) in result.stdout
    return json.loads(data.read_text(encoding="utf-8")), result.stdout


def fails(*words):
    with pytest.raises(UserError) as error:
        CliRunner().invoke(cli, ["bench", *map(str, words)], catch_exceptions=False)
    return str(error.value)


def check(record, verb):
    assert record["name"] == f"{verb}-quick"
    assert record["host"]["versions"]["torch"]
    assert record["configuration"]["quick"]
    for row in record["rows"]:  # our tokens of one sequence are measured in more, shorter rounds
        short = verb == "decode" and row["batch"] == 1 and row["name"] != "llama"
        assert len(row["rounds"]) == (20 if short else 2)
    for target in record["targets"]:
        assert target["met"] in (True, False)
        assert target["seen"]["low"] <= target["seen"]["median"] <= target["seen"]["high"]


@pytest.mark.slow
def test_train(tmp_path):
    place = tmp_path / "new" / "place"
    record, shown = quick("train", place, "--extra", "--model.num_layers", 1, "--minutes", 0.001)
    check(record, "train")
    assert record["configuration"]["model"]["d_model"] == 64
    assert record["configuration"]["model"]["num_layers"] == 1
    assert {(row["name"], row["length"]) for row in record["rows"]} == {
        *((name, length) for name in ("retnet", "llama") for length in (64, 128)),
        ("retnet, bf16 autocast", 128),
        ("retnet, one packed row", 128),
    }
    assert record["op"]["shape"] == {"B": 1, "T": 256, "H": 2, "K": 32, "V": 64}
    assert record["rounds"] == {"op": 2, "steps and op, memory kept": 2}  # never fewer than give a median
    assert "rounds: op 2; steps and op, memory kept 2" in shown
    assert record["configuration"]["minutes"] == 0.001
    assert len(record["op"]["rows"]) == len(record["op"]["rows_with_kept_memory"]) == 6
    assert "Targets (meaningless after a quick run)" in shown


@pytest.mark.slow
def test_decode(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "missing", lambda: "llama.cpp is not measured: it is not here")
    record, shown = quick("decode", tmp_path, "--long", 200)
    check(record, "decode")
    assert record["configuration"]["model"]["d_model"] == 128
    assert {(row["name"], row["batch"], row["context"]) for row in record["rows"]} == {
        *(("retnet", batch, context) for batch in (1, 2) for context in (64, 256)),
        *(("llama", batch, context) for batch in (1, 2) for context in (64, 128)),
        ("retnet int8", 1, 64),
    }
    assert [mark["token"] for mark in record["long"]["marks"]] == [100, 200]
    assert "One generation of 200 tokens" in shown
    assert record["rounds"] == {
        "one sequence of ours": 20,
        "the rest": 2,
        "many rows": 2,
        "many rows, in short rounds": 2,
        "beside llama.cpp": 2,
    }
    batches = record["batches"]["rows"]
    assert [(row["weights"], row["batch"]) for row in batches] == [
        (weights, batch) for weights in ("fp32", "int8") for batch in (1, 2, 4)
    ]
    assert all(row["products_of_torch_mm"]["median"] > 0 for row in batches)
    assert "Steps of many rows" in shown
    throughput = record["throughput"]
    ours = [row for row in throughput["rows"] if row["name"] == "retnet"]
    tasks = (("write", 16), ("write", 64), ("read", 100))
    assert [(row["weights"], row["work"], row["tokens"]) for row in ours] == [
        (weights, *task) for weights in ("fp32", "8 bits") for task in tasks
    ]
    assert "Tokens per second, batch 1" in shown
    assert ours == throughput["rows"]
    assert "llama.cpp is not measured: it is not here" in shown


@pytest.mark.slow
def test_engine(tmp_path):
    record, shown = quick("engine", tmp_path, "--minutes", 0.001)
    check(record, "engine")
    assert record["configuration"]["minutes"] == 0.001
    ways = ("greedy", "sampled", "top-p 0.9", "top-k 40, top-p 0.9")
    assert [(row["rows"], row["sampling"]) for row in record["rows"]] == [
        (n, way) for n in (1, 2) for way in ways
    ]
    assert [row["what"] for row in record["exact"]] == ["a step of 1", "a step of 2", "reading 400 tokens"]
    assert len(record["drafts"]) == 2
    assert [(row["what"], row["reused"], row["tokens"]) for row in record["edits"]] == [
        ("the same prompt", 384, 400),
        ("edit at 398", 384, 399),
        ("edit at 200", 128, 201),
        ("edit at 2", 0, 3),
    ]
    assert "A session after a restart" in shown


@pytest.mark.slow
def test_ops(tmp_path):
    record, shown = quick("ops", tmp_path, "--lengths", "100,128", "--device", "cpu")
    check(record, "ops")
    assert record["configuration"]["lengths"] == [100, 128]
    names = {"retnet", "retnet, reference", "autograd, parallel form", "SDPA, H·K wide", "SDPA, H·V wide"}
    chunked = {"autograd, indexed chunks", "autograd, split chunks"}  # of 128 tokens
    found = {(row["length"], row["name"]) for row in record["rows"]} - {
        (length, "retnet, torch operators")
        for length in (100, 128)  # where numba is
    }
    assert found == {(length, name) for length in (100, 128) for name in names} | {(128, n) for n in chunked}
    assert {row["mode"] for row in record["rows"]} == {"forward", "forward + backward"}
    assert all(row["times_ours"]["median"] == 1 for row in record["rows"] if row["name"] == "retnet")
    assert {(row["batch"], row["key_dim"]) for row in record["steps"]} == {(1, 256), (8, 256), (1, 64)}
    assert max(record["errors"].values()) < 1e-5
    assert "A step of decoding" in shown
    assert record["rounds"] == {"op": 2, "steps": 24}
    assert "The op, H 2, K 16, V 32" in shown


@pytest.mark.slow
def test_serve(tmp_path, monkeypatch):
    """Everything but the servers themselves, in whose place one stands that streams without a model."""

    @contextmanager
    def start(streams, context):
        with echo_server() as url:
            yield served.Listening(url, os.getpid())

    monkeypatch.setattr(
        served, "ours", lambda name, config, weights, folder: served.Served(name, weights, start, {})
    )
    record, shown = quick("serve", tmp_path, "--no-peers")
    points = {(row["name"], row["weights"], row["streams"], row["context"]) for row in record["rows"]}
    servers = (("retnet", "fp32"), ("retnet", "8 bits"), ("Transformer, retnet serve", "fp32"))
    assert points == {
        (*server, streams, context) for server in servers for streams in (1, 2) for context in (16, 64)
    }
    for row in record["rows"]:
        assert all(each["tokens"] == 8 * row["streams"] for each in row["rounds"])
        assert row["first_token_p50"]["median"] > 0
        assert row["rss_bytes"] > 1e8
    assert [len(chat["turns"]) for chat in record["chats"]] == [4, 4]
    assert 1 in {row["streams"] for row in record["overhead"]}  # two need not be under way together here
    assert "servers of others are not measured: --no-peers" in shown
    assert "Server and engine beside the bare decoder" in shown


def test_the_quick_model_has_every_layer_of_a_pattern_once():
    small = bench._model("hybrid/3m-7to1", (), 64)
    assert small.num_layers == 8
    assert [(mixer.name, mixer.num_heads) for mixer in small.mixers_by_layer][-2:] == [
        ("retention", 2),
        ("softmax", 2),
    ]
    assert bench._model("variants/hyena", ("--model.num_layers", "1"), 64).num_layers == 1  # it has no heads


def test_mistakes_end_in_one_sentence(tmp_path, monkeypatch):
    assert "no configuration 'laptop/26m'" in fails("train", "--config", "laptop/26m")
    assert "unexpected argument 'please'" in fails("train", "please")
    assert "unknown setting" in fails("decode", "--model.width", 3)
    assert "--tokens is 1000" in fails("train", "--tokens", 1000)
    assert "--long is 5" in fails("decode", "--long", 5)
    assert "--lengths is '2k'" in fails("ops", "--lengths", "2k")
    assert "--shapes is '8x256'" in fails("ops", "--shapes", "8x256")
    assert "device 'abacus' cannot be used" in fails("ops", "--device", "abacus")
    (tmp_path / "file").touch()
    assert "cannot write to the directory" in fails("train", "--quick", "--out", tmp_path / "file" / "below")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'retnet[bench]'" in fails("train", "--quick", "--out", tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'retnet[bench]'" in fails("decode", "--quick", "--out", tmp_path)


def test_values_out_of_range_are_refused():
    result = CliRunner().invoke(cli, ["bench", "decode", "--rounds", "0"])
    assert result.exit_code == 2
    assert "Invalid value for '--rounds': 0 is not in the range x>=1" in result.stderr
    result = CliRunner().invoke(cli, ["bench", "ops", "--minutes", "0"])
    assert result.exit_code == 2
    assert "Invalid value for '--minutes': 0" in result.stderr


@pytest.mark.slow
def test_help_imports_nothing_heavy():
    code = (
        "import sys; from retnet.cli import cli; cli(['bench', 'train', '--help'], standalone_mode=False);"
        "sys.exit(' '.join({'torch', 'transformers', 'matplotlib'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--tokens" in done.stdout
