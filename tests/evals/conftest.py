"""Tiny models, and documents of awkward lengths."""

import pytest
import torch

from retnet.data import Tokenizer
from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.model.checkpoint import model_files, write_checkpoint
from tests.evals.by_hand import tiny_llama, words


@pytest.fixture(scope="session")
def byte_tokenizer():
    return Tokenizer.load("bytes")


@pytest.fixture(scope="session")
def model(byte_tokenizer):
    """fp64, so that sums can be compared closely."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=byte_tokenizer.vocab_size, d_model=16, num_layers=1, mixer=RetentionConfig(num_heads=2)
    )
    return LanguageModel(config).double().eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, byte_tokenizer):
    """A checkpoint directory, fp32."""
    torch.manual_seed(1)
    config = ModelConfig(vocab_size=257, d_model=32, num_layers=2, mixer=RetentionConfig(num_heads=2))
    path = tmp_path_factory.mktemp("models") / "ours"
    files = {**model_files(LanguageModel(config)), "tokenizer.json": byte_tokenizer.save}
    write_checkpoint(path, files)
    return path


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory, byte_tokenizer):
    """A Hugging Face folder of a model that is not ours."""
    pytest.importorskip("transformers")
    from retnet.model.hf import hf_tokenizer

    path = tmp_path_factory.mktemp("models") / "llama"
    tiny_llama(260, 300).save_pretrained(path)
    hf_tokenizer(byte_tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def documents():
    """Of 1 byte to some thousands, characters of several bytes among them."""
    return ["a", "ab", words(3), words(25, 1), words(140, 2), words(30, 3), "é" * 31]
