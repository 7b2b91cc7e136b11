"""Folders of flash-linear-attention: the same logits for whatever it can express, and back without losing a bit."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from retnet.convert import Found, convert, fla, folders, read, write
from retnet.convert.weights import expected
from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.model.checkpoint import verify, weights
from retnet.settings import UserError
from tests.helpers import fla as judge
from tests.helpers.checkpoints import FLA, GOLDEN, fla_weights, golden, save_folder
from tests.helpers.parity import assert_three_ways_agree, relative


def run(found, tokens, dtype=torch.float64):
    with torch.inference_mode():
        return found.model().to(dtype)(tokens)


def test_the_judge_agrees_with_flash_linear_attention_itself():
    tokens, want = golden("fla")
    state = load_file(GOLDEN / "fla/model.safetensors")
    config = json.loads((GOLDEN / "fla/config.json").read_text())
    assert relative(judge.logits(state, config, tokens), want) < 1e-6


def test_the_golden_folder():
    tokens, want = golden("fla")
    found = read(GOLDEN / "fla")
    assert found.kind == "fla"
    assert found.notes == ()
    assert found.tokens == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    assert relative(run(found, tokens, torch.float32), want) <= 1e-5
    state = load_file(GOLDEN / "fla/model.safetensors")
    config = json.loads((GOLDEN / "fla/config.json").read_text())
    assert relative(run(found, tokens), judge.logits(state, config, tokens)) <= 1e-10  # ln γ is kept in fp32


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True, "norm_eps": 1e-4},
        {"num_heads": 6, "num_kv_heads": 2, "expand_v": 1.5},
        {"num_heads": 4, "num_kv_heads": 1, "expand_k": 2 / 3, "expand_v": 1},
        {"use_output_gate": False, "elementwise_affine": False, "num_heads": 1},
        {
            "fuse_norm": False,
            "attn_mode": "parallel",
            "hidden_act": "swish",
            "attn": None,
            "norm_first": True,
        },
        {"intermediate_size": None, "hidden_ratio": 3, "expand_k": 2.0},
        {"intermediate_size": None, "hidden_ratio": None, "elementwise_affine": False},
    ],
    ids=lambda o: "-".join(map(str, o)) or "plain",
)
def test_every_option_it_can_express(options, tmp_path):
    config = {**FLA, **options}
    state = fla_weights(config)
    folder = save_folder(tmp_path / "a", state, config)
    if "fuse_norm" in options:  # the judge knows one name
        state = {name.replace("g_norm.", "g_norm_swish_gate."): x for name, x in state.items()}
    tokens = torch.randint(53, (2, 29))
    found = read(folder)
    assert relative(run(found, tokens), judge.logits(state, config, tokens)) <= 1e-8
    assert_three_ways_agree(found.model().double(), tokens, 1e-10)
    convert(folder, tmp_path / "b", to="fla")
    again = read(tmp_path / "b")
    assert again.config == found.config
    assert all(torch.equal(again.tensors[name], x) for name, x in found.tensors.items())


def test_defaults_are_those_of_flash_linear_attention(tmp_path):
    """A configuration that says nothing else is of its smallest published size in shapes alone."""
    config = fla.model_config(fla.FlaArguments(), "nowhere")
    assert (config.d_model, config.num_layers, config.vocab_size, config.ffn_dim) == (2048, 24, 32000, 2816)
    assert (config.mixer.num_heads, config.mixer.key_dim, config.mixer.value_dim) == (8, 256, 512)


@pytest.mark.parametrize(
    "option",
    [
        {"use_short_conv": True},
        {"attn": {"layers": [1], "num_heads": 2}},
        {"feature_map": "relu"},
        {"attnres_block_size": 2},
        {"hidden_act": "powlu"},
        {"norm_first": False},
    ],
    ids=lambda o: next(iter(o)),
)
def test_what_cannot_be_run_is_refused_by_name(option, tmp_path):
    folder = save_folder(tmp_path / "a", fla_weights(FLA), {**FLA, **option})
    with pytest.raises(UserError, match=rf"cannot be run here, .*{next(iter(option))} = "):
        read(folder)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_heads": 5}, r"gives 24.0 for 5 heads"),
        ({"expand_k": 0.3}, r"gives 7.199\d* for 3 heads"),
        ({"num_heads": 6, "num_kv_heads": 4}, r"num_kv_heads 4 does not divide num_heads 6"),
        ({"hidden_size": "wide"}, r"hidden_size 'wide'"),
        ({"vocab_size": 0}, r"vocab_size is 0"),
        ({"expand_k": 0.125}, r"key_dim 1 is odd"),
    ],
)
def test_sizes_that_make_no_sense(option, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(save_folder(tmp_path / "a", fla_weights(FLA), {**FLA, **option}))


def test_unknown_options_are_noted(tmp_path):
    config = {**FLA, "logit_scale": 2.0, "unused": None, "transformers_version": "5.0"}
    (note,) = read(save_folder(tmp_path / "a", fla_weights(FLA), config)).notes
    assert note.endswith("without effect: logit_scale")


def ours(model=None, **mixer):
    """A model in FLA's dialect, but for what is given, with norms of its own."""
    mixer = {"num_heads": 2, "head_norm": "rms", "rotary": "halves", "rotary_spacing": "geometric", **mixer}
    sizes = {
        "vocab_size": 31,
        "d_model": 16,
        "num_layers": 2,
        "ffn": "swiglu",
        "norm": "rmsnorm",
        "norm_eps": 1e-6,
    }
    config = ModelConfig(**{**sizes, "mixer": RetentionConfig(**mixer), **(model or {})})
    tensors = weights(LanguageModel(config).requires_grad_(False))
    for name, x in tensors.items():
        if "norm" in name:
            x += 0.3 * torch.randn(x.shape)
    if mixer.get("head_norm_affine"):
        for name, x in tensors.items():
            if name.endswith("head_norm_weight"):  # FLA has one weight for all heads
                x.copy_(x.view(2, -1)[:1].expand(2, -1).flatten())
    return Found("run", config, tensors, {})


@pytest.mark.parametrize(
    "found",
    [
        lambda: ours(),
        lambda: ours({"tie_embeddings": False, "ffn_dim": 20}, head_norm_affine=True, value_dim=5),
        lambda: ours(gate=False, key_dim=6, head_norm_affine=True),
        lambda: ours({"num_layers": 12}, num_heads=4, decay=tuple(1 - 2.0 ** (-5 - h) for h in range(4))),
    ],
)
def test_ours_to_theirs_and_back_is_bit_equal(found, tmp_path):
    found = found()
    write(found, tmp_path / "a", "fla", source="ours")
    verify(tmp_path / "a")
    again = read(tmp_path / "a")
    assert again.tensors.keys() == found.tensors.keys()
    assert all(torch.equal(again.tensors[name], x) for name, x in found.tensors.items())
    tokens = torch.randint(31, (2, 17))
    assert torch.equal(run(again, tokens), run(found, tokens))
    with safe_open(tmp_path / "a/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers opens no other


def test_interleaved_pairs_become_halves(tmp_path):
    found = ours(rotary="interleaved")
    write(found, tmp_path / "a", "fla", source="ours")
    again, tokens = read(tmp_path / "a"), torch.randint(31, (2, 17))
    assert again.config.mixer.rotary == "halves"
    assert relative(run(again, tokens), run(found, tokens)) < 1e-12
    name = "blocks.0.mixer.q_proj.weight"
    assert not torch.equal(again.tensors[name], found.tensors[name])
    renamed = Found("run", again.config, found.tensors, {})  # keys renamed alone would be silently wrong
    assert relative(run(renamed, tokens), run(found, tokens)) > 1e-3


@pytest.mark.parametrize(
    ("found", "reasons"),
    [
        (lambda: ours(decay="experiments"), ["mixer.decay = 'experiments'"]),
        (lambda: ours(decay=0.9), ["mixer.decay = 0.9"]),
        (lambda: ours(rotary="none"), ["mixer.rotary = 'none'"]),
        (lambda: ours(rotary_base=500.0), ["rotary_base = 500"]),
        (
            lambda: ours(head_norm="none", score_norm="paper"),
            ["mixer.head_norm = 'none'", "score_norm = 'paper'"],
        ),
        (lambda: ours({"d_model": 8}, key_dim=300), ["keys of 300 per head"]),
        (
            lambda: ours(
                {"residual": "norm", "residual_alpha": 2.0},
                decay_by_layer="lightning",
                qk_norm=True,
                scale=1.0,
            ),
            [
                "residual = 'norm' (it has none)",
                "residual_alpha = 2.0",
                "mixer.decay_by_layer = 'lightning'",
                "mixer.qk_norm = True",
                "mixer.scale = 1.0",
            ],
        ),
        (
            lambda: ours(
                {"norm": "layernorm", "ffn": "geglu", "embedding_scale": True, "embedding_norm": True},
                score_norm="decay",
                rotary_spacing="inclusive",
                head_norm_eps=1e-5,
            ),
            [
                "rotary_spacing = 'inclusive'",
                "score_norm = 'decay'",
                "head_norm_eps = 1e-05 and norm_eps = 1e-06",
                "norm = 'layernorm'",
                "ffn = 'geglu'",
                "embedding_scale",
                "embedding_norm",
            ],
        ),
    ],
)
def test_every_reason_why_fla_cannot_express_a_model(found, reasons, tmp_path):
    with pytest.raises(UserError, match=r"flash-linear-attention cannot express this model") as error:
        write(found(), tmp_path / "a", "fla", source="ours")
    assert str(error.value).count(";") == len(reasons) - 1
    for reason in reasons:
        assert reason in str(error.value)
    assert not (tmp_path / "a").exists()


def test_head_norms_that_differ_cannot_be_expressed(tmp_path):
    found = ours(head_norm_affine=True)
    tensors = dict(found.tensors)
    tensors["blocks.1.mixer.head_norm_weight"] = torch.randn(16 * 2)
    with pytest.raises(UserError, match=r"a head norm with a weight for each head \(one weight for all\)$"):
        write(replace(found, tensors=tensors), tmp_path / "a", "fla", source="ours")


def test_frequencies_that_coincide_are_the_same(tmp_path):
    """Two to a head are one pair, and its frequency is 1 with and without the end point."""
    write(
        ours(key_dim=2, rotary_spacing="inclusive", rotary="interleaved"),
        tmp_path / "a",
        "fla",
        source="ours",
    )


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "SHARD", 100_000)
    convert(GOLDEN / "fla", tmp_path / "a", to="fla")
    assert len(list((tmp_path / "a").glob("model-0000*.safetensors"))) > 2
    again, found = read(tmp_path / "a"), read(GOLDEN / "fla")
    assert all(torch.equal(again.tensors[name], x) for name, x in found.tensors.items())
    assert again.tensors.keys() == found.tensors.keys() == expected(found.config).keys()
