import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from retnet.data import Tokenizer
from retnet.evals.models import check_model, open_model
from retnet.evals.readers import CachedReader, RecurrentReader
from retnet.model import LanguageModel
from retnet.settings import UserError
from tests.helpers.lazily import hf, needs

pytestmark = needs("transformers")


@pytest.fixture(scope="module")
def folder(checkpoint, byte_tokenizer, tmp_path_factory):
    """The checkpoint as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("hf") / "ours"
    model = hf.RetNetForCausalLM.from_language_model(open_model(checkpoint).model)
    hf.write_folder(model, path, tokenizer=byte_tokenizer)
    return path


def test_a_checkpoint_and_its_folder_are_one_model(checkpoint, folder):
    ours, theirs = open_model(checkpoint), open_model(folder)
    tokens = torch.randint(257, (1, 30))
    with torch.no_grad():
        assert torch.equal(ours.model(tokens), theirs.model(tokens))
    assert isinstance(theirs.model, LanguageModel)
    assert isinstance(theirs.reader(), RecurrentReader)
    assert ours.limit is theirs.limit is None
    assert ours.tokenizer.fingerprint == theirs.tokenizer.fingerprint
    assert ours.about["parameters"] == theirs.about["parameters"]
    assert (ours.about["kind"], theirs.about["kind"]) == ("run", "retentive_network")


def test_a_foreign_model(llama_folder):
    llama = open_model(llama_folder, dtype="bfloat16")
    assert llama.limit == 300
    assert isinstance(llama.reader(), CachedReader)
    assert llama.about["dtype"] == "bfloat16"
    assert llama.tokenizer.encode("<|bos|>é") == list("<|bos|>é".encode())  # text never becomes a special id
    assert llama.tokenizer.bos_id == 256


def test_the_hash_is_that_of_weights_and_configuration(llama_folder, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(llama_folder, copy)
    (copy / "README.md").write_text("…")
    before = open_model(llama_folder).about["sha256"]
    assert open_model(copy).about["sha256"] == before
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert open_model(copy).about["sha256"] != before


def test_a_tokenizer_without_bos_starts_documents_with_eos(llama_folder, tmp_path, documents):
    copy = tmp_path / "gpt"
    shutil.copytree(llama_folder, copy)
    trained = hf.hf_tokenizer(Tokenizer.train(documents, 258))
    trained.bos_token = None
    trained.save_pretrained(copy)
    candidate = open_model(copy)
    assert candidate.theirs.bos_token is None
    assert candidate.tokenizer.bos_id == candidate.theirs.eos_token_id
    (copy / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": None})
    )
    with pytest.raises(UserError, match="neither a BOS nor an EOS token"):
        open_model(copy)


def test_what_cannot_be_opened_is_said_in_one_sentence(llama_folder, checkpoint, tmp_path, byte_tokenizer):
    def broken(name, change):
        copy = tmp_path / name
        shutil.copytree(llama_folder, copy)
        change(copy)
        with pytest.raises(UserError) as error:
            open_model(copy)
        assert "\n" not in str(error.value)
        return str(error.value)

    def pickled(copy):
        torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
        (copy / "model.safetensors").unlink()

    def incomplete(copy):
        weights = load_file(copy / "model.safetensors")
        weights.pop("model.norm.weight")
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})

    assert "cannot open" in broken("pickle", pickled)
    assert "lacks weights: model.norm.weight" in broken("incomplete", incomplete)
    assert "cannot open" in broken("cut", lambda copy: (copy / "model.safetensors").write_bytes(b"x" * 100))
    assert "cannot open" in broken("no-model", lambda copy: (copy / "config.json").write_text("{}"))
    big = Tokenizer.train(["a b c"], 290)
    big_ids = hf.hf_tokenizer(big)
    big_ids.add_tokens([f"<{i}>" for i in range(50)])
    assert "do not belong together" in broken("vocabulary", lambda copy: big_ids.save_pretrained(copy))
    with pytest.raises(UserError, match="leave out the checkpoint name 'best'"):
        check_model(llama_folder, "best")
    with pytest.raises(UserError, match="no run at"):
        check_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="did you mean 'bfloat16'"):
        open_model(llama_folder, dtype="bfloat")
    with pytest.raises(UserError, match="cannot be used here"):
        open_model(llama_folder, device="tpu")
