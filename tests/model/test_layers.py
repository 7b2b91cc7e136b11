"""Layers that differ: patterns of mixers and FFNs, in configurations, in all three forms, and wherever models go."""

import dataclasses
import tomllib
from dataclasses import replace

import pytest
import torch

from retnet.convert import fla, syncdoth
from retnet.data import DataConfig
from retnet.measure.sizes import transformer
from retnet.mixers import GatedRetentionConfig, RetentionConfig, SoftmaxConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.model.cost import cost
from retnet.settings import UserError, build, config_path, dump, load, shipped_configs
from retnet.train.config import RunConfig
from tests.helpers.fast import few_fast
from tests.helpers.kinds import HYBRIDS, configured
from tests.helpers.lazily import hf
from tests.helpers.parity import assert_rows_independent, assert_three_ways_agree, relative

TEXT = {
    "vocab_size": 61,
    "d_model": 32,
    "num_layers": 7,
    "mixer": {"name": "retention", "num_heads": 2},
    "layers": ["retention", "wide", "softmax"],
    "mixers": {"wide": {"name": "retention", "num_heads": 2, "key_dim": 24, "decay": "none"}},
    "ffn_layers": ["gelu", "swiglu"],
    "ffn_dims": [64, 48],
}


def test_patterns_are_repeated_to_the_last_layer():
    config = build(ModelConfig, TEXT)
    wide = RetentionConfig(num_heads=2, key_dim=24, decay="none")
    three = (RetentionConfig(num_heads=2), wide, SoftmaxConfig())
    assert config.mixers_by_layer == (*three, *three, three[0])
    assert config.ffns_by_layer == (("gelu", 64), ("swiglu", 48)) * 3 + (("gelu", 64),)
    model = LanguageModel(config)
    assert [type(block.mixer).Config for block in model.blocks] == [type(c) for c in config.mixers_by_layer]
    assert [block.ffn.fc1.out_features for block in model.blocks] == [64, 48, 64, 48, 64, 48, 64]
    assert [block.ffn.gate is not None for block in model.blocks] == [False, True] * 3 + [False]


def test_a_configuration_is_written_and_read_whole():
    config = build(ModelConfig, TEXT)
    assert build(ModelConfig, tomllib.loads(dump(config))) == config
    assert hash(config) == hash(build(ModelConfig, TEXT))
    assert not config.is_uniform


def test_one_mixer_for_all_is_written_as_before():
    assert not {"layers", "mixers", "ffn_layers", "ffn_dims"} & set(dump(ModelConfig()).split())
    alike = ModelConfig(layers=("retention",), ffn_dims=(512,))
    assert ModelConfig().is_uniform
    assert alike.is_uniform
    assert alike.mixers_by_layer == ModelConfig().mixers_by_layer


MISTAKES = [
    ({"layers": ["softmax"]}, "layers names no 'retention', which is mixer.name"),
    ({"layers": []}, "layers has 0 entries for 7 layers"),
    ({"layers": ["retention", "sofmax", "wide"]}, "unknown mixer 'sofmax' in layers; did you mean 'softmax'"),
    ({"layers": ["retention"]}, "mixers.wide is not in layers"),
    ({"layers": ["retention", "wide"] * 4}, "layers has 8 entries for 7 layers; allowed: 1 to num_layers"),
    ({"layers": "retention"}, "layers 'retention': Expected `array"),
    ({"layers": ["retention", 3]}, r"layers\[1\] 3"),
    (
        {"mixers": {"wide": {"name": "softmax", "num_head": 3}}},
        "mixers.wide.num_head'; did you mean 'num_heads'",
    ),
    ({"mixers": {"wide": {"num_heads": 3}}}, "mixers.wide must be a table with a 'name'"),
    ({"mixers": {"wide": {"name": "softmax", "num_heads": 0}}}, "num_heads is 0"),
    ({"mixers": ["softmax"]}, "mixers must be a table of tables"),
    (
        {"mixers": TEXT["mixers"] | {"retention": {"name": "softmax"}}},
        "mixers.retention has the name of mixer",
    ),
    (
        {"ffn_layers": ["gelu", "swiglo"]},
        r"ffn_layers\[1\] 'swiglo'.*allowed: 'gelu'.*did you mean \"swiglu\"",
    ),
    ({"ffn_dims": [0]}, "ffn_dims has an item that is 0; it must be at least 1"),
    ({"ffn_dims": [8] * 8}, "ffn_dims has 8 entries for 7 layers"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_named(change, message):
    with pytest.raises(UserError, match=message):
        build(ModelConfig, TEXT | change, "model")


def test_patterns_from_python():
    """Lists are taken for what they are; a text is not read letter by letter."""
    config = ModelConfig(layers=["retention", "softmax"], ffn_layers=["gelu"], ffn_dims=[64, 48])
    assert config == ModelConfig(layers=("retention", "softmax"), ffn_layers=("gelu",), ffn_dims=(64, 48))
    assert hash(config) == hash(replace(config))
    for name in ("layers", "ffn_layers", "ffn_dims"):
        with pytest.raises(UserError, match=f"^{name} is 'gelu'; it must be a list"):
            ModelConfig(**{name: "gelu"})
    with pytest.raises(UserError, match=r"^layers is 3; it must be a list"):
        ModelConfig(layers=3)
    assert DataConfig(corpus=["a", "b"]).corpus == ("a", "b")
    assert DataConfig(corpus="abc").corpus == "abc"


# -- what it computes ------------------------------------------------------------------------------------------


def model(dtype=torch.float64) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(build(ModelConfig, TEXT)).to(dtype).eval()


@pytest.mark.parametrize("T", few_fast([1, 2, 63, 130], 1, 63))
def test_three_ways(T):
    assert_three_ways_agree(model(), torch.randint(61, (2, T)), 1e-9)


@pytest.mark.parametrize("name", HYBRIDS)
def test_three_ways_of_other_patterns(name):
    torch.manual_seed(0)
    module = LanguageModel(configured(name, vocab_size=61, d_model=32, num_layers=4)).double().eval()
    tokens = torch.randint(61, (2, 70))
    assert_three_ways_agree(module, tokens, 1e-9)
    assert_rows_independent(module, tokens)


def test_layers_are_those_of_models_of_one_kind():
    """Every block alone is that of a model all of whose layers are so; the whole is one after the other."""
    module = model()
    tokens, bounds = torch.randint(61, (1, 40)), torch.tensor([0, 13, 40], dtype=torch.int32)
    for cu_seqlens in (None, bounds):
        x = module.embedding(tokens)
        for number, block in enumerate(module.blocks):
            alone = LanguageModel(module.config.of_layer(number)).double().eval()
            alone.blocks[0].load_state_dict(block.state_dict())
            x = alone.blocks[0](x, cu_seqlens)
        assert relative(module.norm(x), module.features(tokens, cu_seqlens)) < 1e-12


def test_padding_and_packed_documents():
    module, tokens = model(), torch.randint(61, (3, 40))
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, :9], mask[1, 20:] = False, False
    got = module(tokens, mask=mask)
    assert relative(got[0, 9:], module(tokens[:1, 9:])[0]) < 1e-12
    assert relative(got[1, :20], module(tokens[1:2, :20])[0]) < 1e-12
    bounds = torch.tensor([0, 9, 9, 40], dtype=torch.int32)
    packed = module(tokens[:1], cu_seqlens=bounds)
    assert relative(packed[0, 9:], module(tokens[:1, 9:])[0]) < 1e-12


def test_all_layers_learn():
    module = model(torch.float32).train()
    tokens = torch.randint(61, (2, 33))
    loss = torch.nn.functional.cross_entropy(module(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in module.parameters())


# -- where it goes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_survives_a_hugging_face_folder(tmp_path, dtype):
    torch.manual_seed(0)
    config = dataclasses.replace(
        build(ModelConfig, TEXT), mixers=None, layers=("retention", "softmax", "rwkv4")
    )
    law = LanguageModel(config).to(dtype).eval()
    tokens = torch.randint(61, (2, 20))
    hf.RetNetForCausalLM.from_language_model(law).save_pretrained(tmp_path)
    back = hf.RetNetForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert back.config.model_config == config
    assert torch.equal(back(tokens).logits, law(tokens))
    assert {n: p.dtype for n, p in back.to_language_model().named_parameters()} == {
        n: p.dtype for n, p in law.named_parameters()
    }


def test_formats_of_one_kind_of_layer_say_so():
    config = build(ModelConfig, TEXT)
    tensors = LanguageModel(config).state_dict()
    for reasons in (fla.cannot_express(config, tensors), syncdoth.cannot_express(config)):
        assert reasons == ["its layers differ (model.layers, ffn_layers, ffn_dims)"]


def test_cost_counts_every_layer():
    config = build(ModelConfig, TEXT)
    alone = [cost(config.of_layer(number), 100) for number in range(7)]
    whole = cost(config, 100)
    assert whole.state_bytes == sum(each.state_bytes for each in alone)
    for part in ("mixers", "feed-forward"):
        assert whole.parameters[part] == sum(each.parameters[part] for each in alone)
    assert whole.state_bytes > cost(config, 10).state_bytes  # softmax layers grow
    assert transformer(config, 16).is_uniform


@pytest.mark.parametrize("name", [n for n in shipped_configs() if n.startswith("hybrid/")])
def test_presets_are_as_large_as_what_they_are_made_of(name):
    size, _, ratio = name.removeprefix("hybrid/").partition("-")
    config = load(RunConfig, config_path(name)).model
    softmax = [isinstance(kind, SoftmaxConfig) for kind in config.mixers_by_layer]
    every = int(ratio[0]) + 1
    assert softmax == [(n + 1) % every == 0 for n in range(config.num_layers)]
    same = load(RunConfig, config_path({"3m": "laptop/3m"}.get(size, f"paper/{size}"))).model
    assert abs(cost(config).total / cost(same).total - 1) < 0.05
    each = {cost(config.of_layer(n)).total for n in range(every)}
    assert max(each) / min(each) < 1.02


def test_gated_retention_beside_retention_has_positions_of_its_own():
    """Kinds with the same rotation are asked apart: what is shared is shared among one kind alone."""
    config = ModelConfig(
        vocab_size=61,
        d_model=32,
        num_layers=4,
        mixer=RetentionConfig(rotary_base=100.0),
        layers=("retention", "gated_retention"),
        mixers={"gated_retention": GatedRetentionConfig(rotary_base=10.0)},
    )
    torch.manual_seed(0)
    module = LanguageModel(config).double().eval()
    assert_three_ways_agree(module, torch.randint(61, (2, 70)), 1e-9)
    x = module.embedding(torch.randint(61, (1, 9)))
    positions = module._positions(x)
    assert positions[0] is positions[2]
    assert positions[1] is positions[3]
    assert not torch.equal(positions[0].cos, positions[1].cos)
