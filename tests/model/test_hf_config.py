"""The Hugging Face configuration: the fields of `ModelConfig`, through JSON and back, checked as strictly."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from retnet.mixers import MIXERS
from retnet.model import LanguageModel, ModelConfig
from retnet.settings import UserError, config_path, load, shipped_configs
from retnet.train.config import RunConfig
from tests.helpers.lazily import hf, transformers
from tests.model.hf_helpers import DIALECTS, V


@pytest.mark.parametrize("dialect", DIALECTS)
def test_through_json_and_back(dialect, tmp_path):
    config = hf.RetNetConfig.from_model_config(DIALECTS[dialect], bos_token_id=3)
    assert config.model_config == DIALECTS[dialect]
    config.save_pretrained(tmp_path)
    for read in (hf.RetNetConfig, transformers.AutoConfig):
        found = read.from_pretrained(tmp_path)
        assert type(found) is hf.RetNetConfig
        assert found.model_config == DIALECTS[dialect]
        assert found.bos_token_id == 3
    text = json.loads((tmp_path / "config.json").read_text())
    assert text["model_type"] == "retentive_network"
    assert hf.RetNetConfig(**config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer(name):
    config = ModelConfig(vocab_size=V, mixer=MIXERS[name].Config())
    found = hf.RetNetConfig.from_dict(json.loads(hf.RetNetConfig.from_model_config(config).to_json_string()))
    assert found.model_config == config


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_configuration(name):
    config = replace(load(RunConfig, config_path(name)).model, vocab_size=V)
    assert hf.RetNetConfig.from_model_config(config).model_config == config


def test_transformers_names():
    config = hf.RetNetConfig(
        vocab_size=V, hidden_size=24, num_hidden_layers=3, tie_word_embeddings=False, ffn_dim=50
    )
    assert (config.d_model, config.num_layers, config.tie_embeddings) == (24, 3, False)
    assert (config.hidden_size, config.num_hidden_layers, config.tie_word_embeddings) == (24, 3, False)
    assert (config.num_attention_heads, config.intermediate_size) == (4, 50)
    assert hf.RetNetConfig(vocab_size=V, ffn_dims=[40, 72, 56]).intermediate_size == 72  # of the widest
    assert config.get_text_config() is config
    config.vocab_size = 50  # what resizing the embeddings does
    assert config.model_config.vocab_size == 50


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_modle": 8}, r"unknown setting 'd_modle'; did you mean 'd_model'"),
        ({"max_position_embeddings": 8}, "unknown setting 'max_position_embeddings'"),
        ({"num_attention_heads": 8}, "unknown setting 'num_attention_heads'"),
        ({"d_model": 0}, "d_model is 0; it must be at least 1"),
        ({"d_model": "wide"}, "d_model 'wide'"),
        ({"ffn": "relu"}, "ffn 'relu'.*allowed: 'gelu'"),
        ({"mixer": {"name": "retention", "num_head": 2}}, "unknown setting 'mixer.num_head'; did you mean"),
        ({"mixer": {"name": "retenton"}}, "unknown mixer.name 'retenton'"),
        ({"mixer": {"name": "retention", "decay": [0.5, 1.5], "num_heads": 2}}, r"γ = 1.5 is outside"),
        ({"hidden_size": 8, "d_model": 16}, "hidden_size is 8 and d_model 16, but they are one setting"),
    ],
)
def test_what_no_model_can_be_made_of_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        hf.RetNetConfig(vocab_size=V, **fields)


def test_a_model_needs_a_vocabulary():
    with pytest.raises(UserError, match="vocab_size is not set"):
        hf.RetNetForCausalLM(hf.RetNetConfig())


def test_overrides_are_checked_when_a_model_is_made(tmp_path):
    hf.RetNetConfig(vocab_size=V, d_model=16).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path, dropout=0.25, d_model=24)
    assert (config.model_config.dropout, config.model_config.d_model) == (0.25, 24)
    with pytest.raises(UserError, match="dropout is 2"):
        transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(tmp_path, dropout=2.0))


@pytest.mark.parametrize("init", ["deepnet", "normal"])
def test_auto_classes_make_models_filled_as_ours(init):
    wide = ModelConfig(vocab_size=V, d_model=96, num_layers=3, tie_embeddings=False, init=init)
    model = transformers.AutoModelForCausalLM.from_config(hf.RetNetConfig.from_model_config(wide))
    assert type(model) is hf.RetNetForCausalLM
    found, want = model.to_language_model().state_dict(), LanguageModel(wide).state_dict()
    assert found.keys() == want.keys()
    for name, x in want.items():
        assert float(found[name].std()) == pytest.approx(float(x.std()), rel=0.1), name
        assert float(found[name].mean()) == pytest.approx(float(x.mean()), abs=0.02), name
    assert type(transformers.AutoModel.from_config(model.config)) is hf.RetNetModel


@pytest.mark.slow
def test_the_package_itself_does_not_import_transformers():
    code = "import sys, retnet, retnet.model, retnet.cli; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0
