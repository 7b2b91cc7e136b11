"""transformers' MiniMax with our op in its linear layers: the same function, cache and gradients as its own."""

import copy
import itertools

import pytest
import torch

from retnet.mixers import MultiScaleRetention, RetentionConfig, SoftmaxConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.settings import UserError
from tests.helpers.lazily import Lazy, transformers
from tests.helpers.parity import relative

lightning = Lazy("retnet.model.hf.lightning")

V = 61


@pytest.fixture(scope="module")
def pair():
    """transformers' own model and the same with our op; three linear layers to one of softmax."""
    return made(["full_attention"] + ["linear_attention"] * 3)


def made(layer_types):
    torch.manual_seed(0)
    config = transformers.MiniMaxConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        head_dim=12,
        block_size=16,
        layer_types=layer_types,
        linear_attn_alpha_factor=0.7,
        linear_attn_beta_factor=1.3,
        pad_token_id=0,
        initializer_range=0.2,
    )
    theirs = transformers.MiniMaxForCausalLM(config).eval()
    return theirs, lightning.use_retention(copy.deepcopy(theirs))


def tokens(rows, length):
    return torch.randint(1, V, (rows, length))


def both(pair, *args, **kwargs):
    with torch.no_grad():
        return [model(*args, **kwargs) for model in pair]


@pytest.mark.parametrize("length", [1, 15, 16, 50, 300])
def test_logits_and_states(pair, length):
    theirs, ours = both(pair, tokens(2, length))
    assert relative(ours.logits, theirs.logits) <= 1e-5
    caches = ours.past_key_values.linear_cache, theirs.past_key_values.linear_cache
    assert [len(cache) for cache in caches] == [4, 4]
    for one, other in itertools.islice(zip(*caches, strict=True), 1, None):
        assert one.shape == other.shape
        assert relative(one, other) <= 1e-5


def test_residual_sums_of_each_kind_are_lists_of_ours():
    """With one expert it is a model of ours: its weights give its logits, whatever α and β its kinds of layers have."""
    torch.manual_seed(0)
    factors = {"linear_attn": (0.7, 1.3), "full_attn": (1.1, 0.8), "mlp": (0.9, 1.2)}
    config = transformers.MiniMaxConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=1,
        num_experts_per_tok=1,
        head_dim=12,
        layer_types=["full_attention"] + ["linear_attention"] * 3,
        initializer_range=0.2,
        **{f"{name}_alpha_factor": alpha for name, (alpha, _) in factors.items()},
        **{f"{name}_beta_factor": beta for name, (_, beta) in factors.items()},
    )
    theirs = transformers.MiniMaxForCausalLM(config).eval()
    kinds = [factors[name] for kind in ("full_attn", *["linear_attn"] * 3) for name in (kind, "mlp")]
    alphas, betas = zip(*kinds, strict=True)
    linear = RetentionConfig(
        num_heads=4,
        key_dim=12,
        value_dim=12,
        decay="alibi",
        decay_by_layer="lightning",
        scale=1.0,
        activation="silu",
        gate_activation="sigmoid",
        head_norm="rms",
        head_norm_affine=True,
        head_norm_groups=1,
        rotary="none",
    )
    full = SoftmaxConfig(
        num_heads=4, kv_heads=2, key_dim=12, rotary_base=config.rope_parameters["rope_theta"]
    )
    ours = LanguageModel(
        ModelConfig(
            vocab_size=V,
            d_model=32,
            num_layers=4,
            mixer=linear,
            mixers={"softmax": full},
            layers=("softmax", *["retention"] * 3),
            norm="rmsnorm",
            norm_eps=config.rms_norm_eps,
            ffn="swiglu",
            ffn_dim=24,
            tie_embeddings=False,
            residual="norm",
            residual_alpha=alphas,
            residual_beta=betas,
        )
    ).eval()
    with torch.no_grad():
        ours.embedding.weight.copy_(theirs.model.embed_tokens.weight)
        ours.head.weight.copy_(theirs.lm_head.weight)
        ours.norm.weight.copy_(theirs.model.norm.weight)
        for own, layer in zip(ours.blocks, theirs.model.layers, strict=True):
            attention, mixer = layer.self_attn, own.mixer
            if isinstance(mixer, MultiScaleRetention):
                qkv = attention.qkv_proj.weight.view(4, 3, 12, 32).transpose(0, 1).flatten(1, 2)
                names = {"out_proj": attention.out_proj, "gate_proj": attention.output_gate}
                mixer.head_norm_weight.copy_(attention.norm.weight)
            else:
                qkv = [getattr(attention, f"{name}_proj").weight for name in "qkv"]
                names = {"out_proj": attention.o_proj}
            for name, weight in zip("qkv", qkv, strict=True):
                getattr(mixer, f"{name}_proj").weight.copy_(weight)
            for name, other in names.items():
                getattr(mixer, name).weight.copy_(other.weight)
            own.mixer_norm.weight.copy_(layer.input_layernorm.weight)
            own.ffn_norm.weight.copy_(layer.post_attention_layernorm.weight)
            gate, up = layer.mlp.experts.gate_up_proj[0].chunk(2)
            for own_part, part in (
                (own.ffn.fc1, gate),
                (own.ffn.gate, up),
                (own.ffn.fc2, layer.mlp.experts.down_proj[0]),
            ):
                own_part.weight.copy_(part)
        ids = tokens(2, 40)
        assert relative(ours(ids), theirs(ids).logits) < 1e-4


def test_weights_and_buffers_are_the_same(pair, tmp_path):
    theirs, ours = (model.state_dict() for model in pair)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())
    pair[1].save_pretrained(tmp_path)
    again = transformers.MiniMaxForCausalLM.from_pretrained(tmp_path).eval()
    want, got = both((pair[0], again), tokens(1, 20))
    assert torch.equal(want.logits, got.logits)  # what is saved is transformers' own
    assert lightning.use_retention(pair[1]) is pair[1]  # a second time changes nothing


def test_prefill_in_chunks_and_steps(pair):
    ids = tokens(2, 90)
    want = both(pair[:1], ids)[0].logits
    for model in pair:
        cache, logits = None, []
        with torch.no_grad():
            for piece in ids.split([40, 1, 1, 37, 11], dim=1):
                out = model(piece, past_key_values=cache)
                cache = out.past_key_values
                logits.append(out.logits)
        assert relative(torch.cat(logits, 1), want) <= 1e-5


def test_a_first_layer_without_keys():
    """transformers counts the tokens of a cache by layer 0, and masks by that; MiniMax-01 begins with a linear one."""
    pair = made(["linear_attention", "full_attention"] * 2)
    ids = tokens(2, 60)
    want = both(pair[:1], ids)[0].logits
    for first in pair:
        with torch.no_grad():
            cache = first(ids[:, :20]).past_key_values
            got = [
                pair[1](piece, past_key_values=cache).logits
                for piece in ids[:, 20:].split([25, 1, 14], dim=1)
            ]
        assert relative(torch.cat(got, 1), want[:, 20:]) <= 1e-5
    options = {"max_new_tokens": 8, "do_sample": False}
    pieces = pair[1].generate(ids, past_key_values=lightning.MiniMaxCache(), prefill_chunk_size=16, **options)
    assert torch.equal(pieces, pair[0].generate(ids, use_cache=False, **options))


def test_a_cache_goes_from_one_to_the_other_and_is_not_changed_behind_its_back(pair):
    ids = tokens(1, 60)
    want = both(pair[:1], ids)[0].logits[:, 50:]
    for first, second in (pair, pair[::-1]):
        with torch.no_grad():
            cache = first(ids[:, :50]).past_key_values
            kept = [x.clone() for x in cache.linear_cache[1:]]
            fork = copy.copy(cache)
            fork.linear_cache, fork.layers = list(cache.linear_cache), copy.deepcopy(cache.layers)
            got = second(ids[:, 50:51], past_key_values=fork).logits
            rest = second(ids[:, 51:], past_key_values=fork).logits
        assert relative(torch.cat([got, rest], 1), want) <= 1e-5
        assert all(torch.equal(x, y) for x, y in zip(cache.linear_cache[1:], kept, strict=True))


def test_left_padding(pair):
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :13] = 0
    theirs, ours = both(pair, ids, attention_mask=mask)
    assert relative(ours.logits[mask.bool()], theirs.logits[mask.bool()]) <= 1e-5
    alone = both(pair[1:], ids[1:, 13:])[0].logits
    assert relative(ours.logits[1:, 13:], alone) <= 1e-5


def test_packed_documents_do_not_see_each_other(pair):
    ids, lengths = tokens(1, 50), [20, 1, 29]
    bounds = torch.tensor([0, 20, 21, 50], dtype=torch.int32)
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = both(pair[1:], ids, position_ids=position, cu_seq_lens_q=bounds, use_cache=False)[0].logits
    alone = [both(pair[:1], piece)[0].logits for piece in ids.split(lengths, dim=1)]
    assert relative(packed, torch.cat(alone, 1)) <= 1e-5
    with pytest.raises(ValueError, match=r"cannot continue a cache; set use_cache=False"):
        pair[1](ids, cu_seq_lens_q=bounds)


def test_gradients(pair):
    ids, mask = tokens(2, 70), torch.ones(2, 70, dtype=torch.long)
    mask[0, :9] = 0
    grads = []
    for model in map(copy.deepcopy, pair):
        model.train()(ids, attention_mask=mask, labels=ids).loss.backward()
        grads.append({name: x.grad for name, x in model.named_parameters()})
    for name, want in grads[0].items():
        assert relative(grads[1][name], want) <= 1e-4, name
    with torch.enable_grad():  # through a state and one token after it
        cache = pair[1](ids[:, :20]).past_key_values
        pair[1](ids[:, 20:21], past_key_values=cache).logits.sum().backward()
    assert pair[1].model.layers[1].self_attn.qkv_proj.weight.grad.abs().sum() > 0
    pair[1].zero_grad()


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {}])
def test_generation(pair, options):
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    options = options | {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    want = pair[0].generate(ids, use_cache=False, **options)  # with one, transformers' beams change states
    assert torch.equal(pair[1].generate(ids, **options), want)


def test_bfloat16_keeps_states_in_fp32(pair):
    narrow = copy.deepcopy(pair[1]).bfloat16()
    ids = tokens(1, 40)
    theirs = both([copy.deepcopy(pair[0]).bfloat16()], ids)[0]
    out = both([narrow], ids)[0]
    assert out.logits.dtype == torch.bfloat16
    assert out.past_key_values.linear_cache[1].dtype == torch.float32
    exact = both(pair[:1], ids)[0].logits
    assert relative(out.logits.float(), exact) <= 2 * relative(theirs.logits.float(), exact)


def test_fields_of_retention_say_the_same_layer(pair):
    """What `lightning/minimax-3m` sets is this layer, with its γ; the ε in its count of layers is the rest."""
    config = RetentionConfig(
        num_heads=4,
        key_dim=12,
        value_dim=12,
        decay="alibi",
        decay_by_layer="lightning",
        scale=1.0,
        activation="silu",
        gate_activation="sigmoid",
        head_norm="rms",
        head_norm_affine=True,
        head_norm_groups=1,
        rotary="none",
    )
    x = torch.randn(2, 50, 32)
    for number in (1, 2, 3):
        theirs = pair[0].model.layers[number].self_attn
        ours = MultiScaleRetention(32, config.of_layer(number, 4))
        q, k, v = theirs.qkv_proj.weight.unflatten(0, (4, -1)).chunk(3, dim=1)
        weights = {"q": q.flatten(0, 1), "k": k.flatten(0, 1), "v": v.flatten(0, 1)}
        weights |= {"gate": theirs.output_gate.weight, "out": theirs.out_proj.weight}
        ours.load_state_dict(
            {f"{name}_proj.weight": x for name, x in weights.items()}
            | {"head_norm_weight": theirs.norm.weight}
        )
        with torch.no_grad():
            want = theirs(x, position_embeddings=None, attention_mask=None)[0]
            assert relative(ours(x), want) <= 1e-5


def test_a_model_without_such_layers():
    with pytest.raises(UserError, match=r"Linear has no layer of lightning attention; give transformers'"):
        lightning.use_retention(torch.nn.Linear(2, 2))
