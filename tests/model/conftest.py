"""Hugging Face folders of small models."""

import pytest


@pytest.fixture
def folder(tmp_path):
    """In shards."""
    return written(tmp_path, "fla", max_shard_size=4000)


@pytest.fixture
def single(tmp_path):
    """In one file."""
    return written(tmp_path)


def written(tmp_path, *dialect, **options):
    pytest.importorskip("transformers")
    from retnet.model.hf import write_folder
    from tests.model.hf_helpers import causal_lm

    write_folder(causal_lm(*dialect), tmp_path / "m", **options)
    return tmp_path / "m"
