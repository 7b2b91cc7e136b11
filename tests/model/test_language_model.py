"""forward == prefill == step by step, padding, and sizes, for every preset dialect."""

import ast
import collections
import dataclasses
import inspect
from pathlib import Path

import pytest
import torch

from retnet.measure.memory import most_alive
from retnet.mixers import MIXERS, RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.model.checkpoint import weights
from retnet.model.cost import cost, kv_cache_bytes
from retnet.model.language_model import Block, fresh_weights
from retnet.nn import rotary
from retnet.ops import rotation
from retnet.settings import UserError, config_path, load, shipped_configs
from retnet.train.config import RunConfig
from tests.helpers.fast import few_fast
from tests.helpers.parity import assert_rows_independent, assert_three_ways_agree, relative, run_three_ways

DIALECTS = ["paper/200m", "variants/torchscale", "variants/fla"]


def small(preset: str, **changes) -> ModelConfig:
    """The dialect of a preset at a size that a test can run: everything but the widths is the preset's."""
    config = load(RunConfig, config_path(preset)).model
    mixer = dataclasses.replace(config.mixer, num_heads=2, key_dim=None)
    sizes = {
        "vocab_size": 61,
        "d_model": 32,
        "num_layers": 2,
        "ffn_dim": None,
        "mixer": mixer,
        "dropout": 0.0,
    }
    return dataclasses.replace(config, **(sizes | changes))


def model(preset: str, dtype=torch.float64, **changes) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(small(preset, **changes)).to(dtype).eval()


@pytest.mark.parametrize("preset", DIALECTS)
@pytest.mark.parametrize("T", [1, 2, 63, 130])
def test_three_ways_in_fp64(preset, T):
    assert_three_ways_agree(model(preset), torch.randint(61, (2, T)), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("preset", DIALECTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["fp64", "fp32"]
)
def test_three_ways_over_4096_tokens(preset, dtype, tolerance):
    assert_three_ways_agree(model(preset, dtype), torch.randint(61, (1, 4096)), tolerance)


@pytest.mark.parametrize("preset", few_fast(DIALECTS, "variants/fla"))
def test_three_ways_with_bf16_weights(preset):
    """Each way rounds at other places; what they share is fp32 state, γ and statistics, so they stay near each other."""
    exact = model(preset, torch.float32)
    half = model(preset, torch.float32).to(torch.bfloat16)
    exact.load_state_dict({name: w.float() for name, w in half.state_dict().items()})
    x = torch.randint(61, (1, 300))
    ways = run_three_ways(half, x)
    with torch.no_grad():
        want = exact(x)
    assert all(way.dtype == torch.bfloat16 and relative(way, want) < 2e-2 for way in ways)
    assert all(layer.kv.dtype == torch.float32 for layer in half.init_state(1))


@pytest.mark.parametrize("preset", DIALECTS)
def test_rows_are_independent(preset):
    assert_rows_independent(model(preset), torch.randint(61, (3, 40)))


@pytest.mark.parametrize("preset", DIALECTS)
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
def test_padding_changes_nothing(preset, side):
    module = model(preset)
    rows = [torch.randint(61, (n,)) for n in (9, 1, 0, 23)]
    T = 23
    tokens, mask = torch.zeros(4, T, dtype=torch.int64), torch.zeros(4, T, dtype=torch.bool)
    for i, row in enumerate(rows):
        places = {
            "left": torch.arange(T - len(row), T),
            "right": torch.arange(len(row)),
            "anywhere": torch.randperm(T)[: len(row)].sort().values,
        }[side]
        tokens[i, places], mask[i, places] = row, True
    with torch.no_grad():
        whole = module(tokens, mask=mask)
        first, state = module.prefill(tokens, module.init_state(4), mask=mask)
        second, state = module.prefill(tokens, state, mask=mask)  # the state went on from real tokens alone
        stepped, state = module.step(torch.tensor([1, 2, 3, 4]), state)
        for i, row in enumerate(rows):
            want = module(torch.cat([row, row, torch.tensor([i + 1])])[None])[0]
            n = len(row)
            assert relative(whole[i, mask[i]], want[:n]) < 1e-9
            assert relative(first[i, mask[i]], want[:n]) < 1e-9
            assert relative(second[i, mask[i]], want[n : 2 * n]) < 1e-9
            assert relative(stepped[i], want[-1]) < 1e-9
            assert not whole[i, ~mask[i]].any()


def test_packed_documents_equal_separate_ones():
    module = model("paper/200m")
    rows = [torch.randint(61, (n,)) for n in (9, 1, 30)]
    cu_seqlens = torch.tensor([0, 9, 10, 40], dtype=torch.int32)
    with torch.no_grad():
        packed = module(torch.cat(rows)[None], cu_seqlens=cu_seqlens)[0]
        assert relative(packed, torch.cat([module(row[None])[0] for row in rows])) < 1e-9


def test_mistakes_with_masks():
    module = model("paper/200m")
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="allowed: \\[B,T\\] of bool"):
        module(tokens, mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="give one"):
        module(tokens, mask=torch.ones(1, 4, dtype=torch.bool), cu_seqlens=torch.tensor([0, 4]))


@pytest.mark.parametrize(
    "options", [{"embedding_scale": True}, {"embedding_norm": True}, {"tie_embeddings": True}], ids=str
)
def test_embedding_options(options):
    tokens = torch.randint(61, (2, 20))
    changed = model("variants/fla", **options)
    assert_three_ways_agree(changed, tokens, 1e-9)
    with torch.no_grad():
        assert relative(changed(tokens), model("variants/fla")(tokens)) > 1e-3
    if "tie_embeddings" in options:
        assert changed.head.weight is changed.embedding.weight


def test_dropout_acts_in_training_alone():
    module = model("paper/200m", dropout=0.5)
    tokens = torch.randint(61, (1, 20))
    with torch.no_grad():
        assert torch.equal(module(tokens), module(tokens))
        module.train()
        assert not torch.equal(module(tokens), module(tokens))


class TestInitialisation:
    def test_deepnet(self):
        module = LanguageModel(small("paper/200m", d_model=256, num_layers=4))
        block = module.blocks[0]
        beta = (8 * 4) ** -0.25
        d = 256
        for weight, gain, fans in (
            (block.mixer.q_proj.weight, 1, 2 * d),
            (block.mixer.k_proj.weight, 1, 2 * d),
            (block.mixer.v_proj.weight, beta, 3 * d),
            (block.mixer.out_proj.weight, beta, 3 * d),
            (block.ffn.fc1.weight, beta, 3 * d),
            (block.ffn.fc2.weight, beta, 3 * d),
        ):
            assert abs(float(weight.detach().std()) / (gain * (2 / fans) ** 0.5) - 1) < 0.02
        assert abs(float(module.embedding.weight.detach().std()) * d**0.5 - 1) < 0.02

    def test_normal(self):
        module = LanguageModel(small("variants/fla", d_model=256))
        assert abs(float(module.blocks[1].ffn.fc2.weight.detach().std()) / 0.02 - 1) < 0.02
        assert abs(float(module.head.weight.detach().std()) / 0.02 - 1) < 0.05

    def test_first_loss_is_that_of_guessing(self):
        module = model("paper/200m", torch.float32, vocab_size=1000, d_model=128)
        tokens = torch.randint(1000, (4, 64))
        loss = torch.nn.functional.cross_entropy(module(tokens).flatten(0, 1), torch.randint(1000, (256,)))
        assert abs(float(loss.detach()) - torch.tensor(1000.0).log()) < 0.8


class TestSizes:
    @pytest.mark.parametrize(
        ("preset", "d", "layers"),
        [
            ("paper/200m", 1024, 16),
            ("paper/1.3b", 2048, 24),
            ("paper/2.7b", 2560, 32),
            ("paper/6.7b", 4096, 32),
        ],
    )
    def test_paper_models_have_12_d_squared_a_layer(self, preset, d, layers):
        config = load(RunConfig, config_path(preset)).model
        size = cost(config)
        assert size.parameters["mixers"] == 8 * d * d * layers
        assert size.parameters["feed-forward"] == 4 * d * d * layers
        assert size.parameters["embedding"] == config.vocab_size * d
        assert size.parameters["head"] == 0  # tied
        assert size.parameters["norms"] == (2 * layers + 1) * 2 * d
        assert size.state_bytes == layers * (2 * d * 256 * 4 + 8)

    def test_paper_13b(self):
        size = cost(load(RunConfig, config_path("paper/13b")).model)
        assert size.parameters["mixers"] == 40 * (2 * 5120 * 5120 + 3 * 5120 * 8560)
        assert size.parameters["feed-forward"] == 40 * 3 * 5120 * 8560

    def test_counts_are_those_of_the_module(self):
        config = small("variants/fla", embedding_norm=True)
        size = cost(config)
        assert size.total == sum(p.numel() for p in LanguageModel(config).parameters())
        state = LanguageModel(config).init_state(1)
        assert size.state_bytes == sum(x.nbytes for layer in state for x in layer)

    def test_flops(self):
        size = cost(
            ModelConfig(vocab_size=100, d_model=64, num_layers=3, mixer=RetentionConfig(num_heads=2)), 4096
        )
        C, K, V = 64, 32, 64
        assert size.flops_per_token == 2 * (3 * 12 * 64**2 + 100 * 64) + 3 * 2 * (2 * C * (K + V) + 4 * K * V)

    def test_kv_cache_of_a_transformer(self):
        config = load(RunConfig, config_path("paper/6.7b")).model
        assert kv_cache_bytes(config, 8192) == 2 * 32 * 4096 * 8192 * 2


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_configuration_is_valid(name):
    config = load(RunConfig, config_path(name))
    assert cost(config.model).total > 0


def test_a_model_needs_a_vocabulary():
    with pytest.raises(UserError, match="vocab_size is not set"):
        LanguageModel(ModelConfig())


@pytest.mark.parametrize("wrong", [{"vocab_size": 0}, {"d_model": -1}, {"dropout": 1.0}, {"norm_eps": -1.0}])
def test_impossible_sizes(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        ModelConfig(**wrong)


def test_rows_of_caches_that_grow_are_joined():
    from retnet.mixers.states import join_rows

    assert join_rows([(torch.ones(1, 2, 3),), (torch.ones(2, 5, 3),)])[0].shape == (3, 5, 3)


@pytest.mark.parametrize("mixer", ["retention", "softmax", "linear", "gated_retention"])
def test_angles_are_computed_once_a_pass(mixer, monkeypatch):
    """cos and sin are those of positions, not of layers; a mixer alone makes its own, which are the same."""
    made = []
    monkeypatch.setattr(rotary, "rotation", lambda *args: made.append(args) or rotation(*args))
    module = LanguageModel(
        small("paper/200m", num_layers=3, mixer=MIXERS[mixer].Config(num_heads=2))
    ).double()
    tokens, bounds = torch.randint(61, (1, 9)), torch.tensor([0, 4, 9], dtype=torch.int32)
    for cu_seqlens in (None, bounds):
        made.clear()
        whole = module.features(tokens, cu_seqlens)
        assert len(made) == 1
        x = module.embedding(tokens)
        for block in module.blocks:
            x = block(x, cu_seqlens)
        assert torch.equal(module.norm(x), whole)
    state = module.init_state(1)
    for way, piece in ((module.prefill, tokens), (module.step, tokens[:, 0])):
        made.clear()
        with torch.no_grad():
            _, state = way(piece, state)
        assert len(made) == 1


class TestFreshWeights:
    """One at a time they are those of a whole model."""

    @pytest.mark.parametrize("mixer", MIXERS)
    def test_are_those_of_a_model(self, mixer):
        options = {
            "mixer": MIXERS[mixer].Config(),
            "num_layers": 3,
            "init": "normal" if mixer == "h3" else "deepnet",
        }
        hybrid = {"layers": (mixer, "retention", "hyena"), "norm": "rmsnorm", "embedding_norm": True}
        for more in ({"tie_embeddings": True, "norm": "layernorm"}, {"tie_embeddings": False, **hybrid}):
            config = dataclasses.replace(ModelConfig(vocab_size=31, d_model=16), **options, **more)
            torch.manual_seed(5)
            want = weights(LanguageModel(config))
            torch.manual_seed(5)
            got = list(fresh_weights(config))
            assert sorted(name for name, _ in got) == sorted(want)
            assert all(torch.equal(x, want[name]) for name, x in got)

    def test_are_never_all_there_at_once(self):
        config = ModelConfig(vocab_size=31, d_model=64, num_layers=12)
        whole = 4 * cost(config).total
        known = whole  # a model on the meta device, which is counted and is nowhere
        most = most_alive(lambda: collections.deque(fresh_weights(config), maxlen=0))
        assert most - known < whole / 6
        assert most_alive(lambda: list(fresh_weights(config))) - known >= whole


def test_blocks_of_the_vllm_plugin_add_as_blocks_do():
    """Its own tests need vLLM, so none of these would see that what it overrides has moved."""
    text = (Path(__file__).parents[2] / "integrations/vllm/src/retnet_vllm/model.py").read_text("utf-8")
    (theirs,) = (
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.name == "_add"
    )
    assert [argument.arg for argument in theirs.args.args] == list(inspect.signature(Block._add).parameters)
