"""Folders of Llama, Mistral, Qwen2 and Qwen3: the logits of transformers' own code, and what is refused by name."""

import json

import pytest
import torch

from retnet.convert import read
from retnet.settings import UserError
from tests.helpers.lazily import transformers

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS = {
    "llama": (
        "LlamaConfig",
        {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "mistral": (
        "MistralConfig",
        {"sliding_window": None, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 10, "eos_token_id": [3, 4]}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Kind → a folder of one, with weights of which none is as it is initialised, and its model."""

    def make(kind):
        torch.manual_seed(0)
        name, settings = KINDS[kind]
        config = getattr(transformers, name)(**SIZES, **settings)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for x in model.parameters():
                x.add_(0.2 * torch.randn_like(x))
        path = tmp_path_factory.mktemp("llama") / kind
        model.save_pretrained(path)
        return path, model

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, folder):
    path, theirs = folder(kind)
    found = read(path)
    assert found.kind == "llama"
    model, tokens = found.model(), torch.randint(50, (2, 20))
    with torch.inference_mode():
        expected, logits = theirs(tokens).logits, model(tokens)
        prefix, state = model.prefill(tokens[:, :13], model.init_state(2))
        last = []
        for t in range(13, 20):
            step, state = model.step(tokens[:, t], state)
            last.append(step)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.allclose(torch.cat([prefix, torch.stack(last, 1)], 1), expected, atol=1e-5)
    assert found.tokens["eos_token_id"] == theirs.config.eos_token_id
    assert not found.notes
    cache = model.init_state(1)[0].keys.shape[2:]
    assert tuple(cache) == (2, {"mistral": 8, "qwen3": 10}.get(kind, 6))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"attention_bias": True}, "attention_bias = True"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type = 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        ({"model_type": "mistral"}, "sliding_window = 4096"),  # as transformers has it where nothing is said
        ({"hidden_act": "gelu", "mlp_bias": True}, "mlp_bias = True.*hidden_act = 'gelu'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be at least 1"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of kv_heads 3"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(settings, says, tmp_path):
    config = {"model_type": "llama", **SIZES, **settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=says):
        read(tmp_path)
