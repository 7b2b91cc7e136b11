"""Corpora small enough to check by hand."""

import json
from dataclasses import replace

import pytest

from retnet.data import DataConfig, prepare


@pytest.fixture
def config(tmp_path):
    """A configuration whose cache lies in the test's own folder."""
    return DataConfig(corpus=str(tmp_path / "corpus"), cache=str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path):
    """The folder that `config` reads."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    return folder


@pytest.fixture
def jsonl():
    def write(path, texts):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_shards(tmp_path, jsonl):
    """Documents → the TokenShards that hold exactly them, in order."""

    def make(texts, shard_tokens=1 << 20, **settings):
        number = len(list(tmp_path.glob("made*")))
        train = jsonl(tmp_path / f"made{number}.jsonl", texts)
        other = jsonl(tmp_path / f"validation{number}.jsonl", ["v"])
        config = DataConfig(corpus=str(train), validation=str(other), cache=str(tmp_path / "cache"))
        return prepare(replace(config, **settings), shard_tokens=shard_tokens).train

    return make
