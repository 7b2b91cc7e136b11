"""Reading torchscale's checkpoints: the same logits, every option run or refused, nothing ever executed."""

import argparse
import json
from dataclasses import replace

import pytest
import torch

from retnet.convert import clamp_effect, random_tokens, read, with_clamp
from retnet.convert.weights import build
from retnet.settings import UserError
from tests.helpers import torchscale
from tests.helpers.checkpoints import (
    GOLDEN,
    TORCHSCALE,
    golden,
    save_torchscale,
    torchscale_buffers,
    torchscale_weights,
)
from tests.helpers.parity import assert_three_ways_agree, relative

NAMES = ["torchscale-gelu", "torchscale-fairseq-swish"]


def run(found, tokens, dtype=torch.float32):
    with torch.inference_mode():
        return found.model().to(dtype)(tokens)


def stripped(name):
    state = torch.load(GOLDEN / name / "checkpoint.pt", weights_only=True)["model"]
    return {key.removeprefix("decoder."): x for key, x in state.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_judge_agrees_with_torchscale_itself(name):
    tokens, want = golden(name)
    args = json.loads((GOLDEN / name / "config.json").read_text())
    assert relative(torchscale.logits(stripped(name), args, tokens), want) < 1e-7  # of which fp32 is 6e-8


@pytest.mark.parametrize("name", NAMES)
def test_golden_checkpoints(name):
    tokens, want = golden(name)
    args = json.loads((GOLDEN / name / "config.json").read_text())
    found = read(GOLDEN / name)
    assert found.kind == "torchscale"
    assert found.notes == ()
    assert relative(run(found, tokens), want) <= 5e-5
    assert relative(run(with_clamp(found), tokens), want) <= 1e-6
    exact = torchscale.logits(stripped(name), args, tokens)
    assert relative(run(with_clamp(found), tokens, torch.float64), exact) <= 1e-8
    unclamped = torchscale.logits(stripped(name), args, tokens, clamp=False)
    assert relative(run(found, tokens, torch.float64), unclamped) <= 1e-8
    assert clamp_effect(found, tokens) == pytest.approx(relative(unclamped, exact), rel=0.05)
    assert clamp_effect(found, tokens) > 1e-6  # it acts here, or nothing above would have shown it


VARIANTS = [
    {},
    {"activation_fn": "swish", "no_scale_embedding": False, "layernorm_embedding": True},
    {"share_decoder_input_output_embed": True, "layernorm_eps": 1e-5, "subln": True},
    {"decoder_retention_heads": 1, "decoder_value_embed_dim": 10, "layernorm_eps": 1e-4},
    {"decoder_retention_heads": 6, "decoder_value_embed_dim": 6, "decoder_ffn_embed_dim": 7},
    {"decoder_retention_heads": 12, "decoder_value_embed_dim": 24, "decoder_layers": 1, "dropout": 0.1},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o)) or "plain")
def test_logits_where_the_clamp_does_not_act(options, tmp_path):
    args = {**TORCHSCALE, **options}
    state = torchscale_weights(args, scale=0.05)
    source = save_torchscale(tmp_path / "a", {**state, **torchscale_buffers(args)}, args)
    tokens = torch.randint(53, (2, 37))
    want = torchscale.logits(state, args, tokens)
    assert torch.equal(want, torchscale.logits(state, args, tokens, clamp=False))
    found = read(source)
    assert relative(run(found, tokens), want) <= 1e-5
    assert relative(run(found, tokens, torch.float64), want) <= 1e-8
    assert relative(run(with_clamp(found), tokens, torch.float64), want) <= 1e-8


def test_the_bridge_is_what_makes_them_equal(tmp_path):
    """ε·s² in place of ε: without it these logits would be wrong, so the test above could not pass by chance."""
    args = {**TORCHSCALE, "layernorm_eps": 1e-4}
    state = torchscale_weights(args, scale=0.05)
    found = read(save_torchscale(tmp_path / "a", state, args))
    tokens = torch.randint(53, (2, 37))
    plain = replace(found.config, mixer=replace(found.config.mixer, score_norm="none"))
    with torch.inference_mode():
        unbridged = build(plain, found.tensors).double()(tokens)
    assert relative(unbridged, torchscale.logits(state, args, tokens)) > 1e-3


@pytest.mark.parametrize("options", VARIANTS[:3], ids=["plain", "swish", "tied"])
def test_the_clamp_is_exact_where_it_acts(options, tmp_path):
    args = {**TORCHSCALE, **options}
    state = torchscale_weights(args, scale=4)
    found = read(save_torchscale(tmp_path / "a", state, args))
    tokens = torch.randint(53, (2, 37))
    want = torchscale.logits(state, args, tokens)
    assert relative(torchscale.logits(state, args, tokens, clamp=False), want) > 1e-8
    assert relative(run(with_clamp(found), tokens, torch.float64), want) <= 1e-8


def test_what_was_converted_generates(tmp_path):
    found = read(save_torchscale(tmp_path / "a", torchscale_weights(TORCHSCALE), TORCHSCALE))
    assert_three_ways_agree(found.model().double(), torch.randint(53, (2, 21)), 1e-10)


def test_every_form_of_names_types_and_arguments(tmp_path):
    state, buffers = torchscale_weights(TORCHSCALE), torchscale_buffers(TORCHSCALE)
    want = read(save_torchscale(tmp_path / "plain", state, TORCHSCALE))
    markers = {"version": torch.tensor([3.0]), "embed_positions._float_tensor": torch.zeros(1), **buffers}
    prefixed = {f"decoder.{name}": x for name, x in {**state, **markers}.items()}
    fairseq = {**TORCHSCALE, "arch": "retnet_base", "activation_fn": "gelu", "no_scale_embedding": True}
    sources = [
        save_torchscale(tmp_path / "prefix", prefixed, TORCHSCALE),
        save_torchscale(tmp_path / "args", state, args=None, cfg={**TORCHSCALE}),
        save_torchscale(tmp_path / "namespace", state, args=None, cfg=argparse.Namespace(**TORCHSCALE)),
        save_torchscale(
            tmp_path / "fairseq", prefixed, args=None, cfg={"model": {**fairseq}, "task": {"x": 1}}
        ),
        tmp_path / "plain",
    ]
    torch.save({"model": state}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "config.json").write_text(json.dumps(TORCHSCALE))
    for source in [*sources, tmp_path / "old.pt"]:
        found = read(source)
        assert found.config == want.config, source
        assert found.tensors.keys() == want.tensors.keys()
        assert all(torch.equal(found.tensors[name], x) for name, x in want.tensors.items())
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        rounded = {name: x.to(dtype) for name, x in prefixed.items()}
        found = read(save_torchscale(tmp_path / str(dtype), rounded, TORCHSCALE))
        assert found.dtype == dtype
        assert found.config == want.config  # γ is the exact one, however its buffer was rounded


def test_arguments_that_are_not_given_show_in_the_weights(tmp_path):
    state = {**torchscale_weights(TORCHSCALE), **torchscale_buffers(TORCHSCALE)}
    want = read(save_torchscale(tmp_path / "a", state, TORCHSCALE)).config
    assert read(save_torchscale(tmp_path / "b", state, {})).config == want
    del state["retnet_rel_pos.decay"]
    with pytest.raises(UserError, match=r"decoder_retention_heads is None; it must be given"):
        read(save_torchscale(tmp_path / "c", state, {}))
    preset = read(
        save_torchscale(tmp_path / "d", state, {"arch": "retnet_medium", "decoder_retention_heads": 3})
    )
    assert (preset.config.ffn, preset.config.embedding_scale) == ("swiglu", True)  # fairseq's defaults
    assert (want.ffn, want.embedding_scale) == ("geglu", False)  # torchscale's


def test_a_config_that_is_named_comes_before_others(tmp_path):
    state = torchscale_weights(TORCHSCALE)
    source = save_torchscale(tmp_path / "a", state, {**TORCHSCALE, "layernorm_eps": 1e-3})
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**TORCHSCALE, "layernorm_eps": 1e-2}))
    assert read(source).config.norm_eps == 1e-3
    found = read(source, config=other)
    assert found.config.norm_eps == 1e-2
    assert found.hashes.keys() == {"checkpoint.pt", "other.json"}


def test_no_arguments_at_all(tmp_path):
    with pytest.raises(UserError, match=r"holds no arguments .* give them with --config"):
        read(save_torchscale(tmp_path / "a", torchscale_weights(TORCHSCALE)))
    with pytest.raises(UserError, match=r"cannot read the arguments .*nowhere.json: No such file"):
        read(tmp_path / "a", config=tmp_path / "nowhere.json")


def test_the_chunkwise_form_and_unknown_arguments_are_noted(tmp_path):
    args = {**TORCHSCALE, "chunkwise_recurrent": True, "activation_function": "swish"}
    unknown, chunkwise = read(save_torchscale(tmp_path / "a", torchscale_weights(TORCHSCALE), args)).notes
    assert "without effect: activation_function" in unknown
    assert "the parallel form is what was converted" in chunkwise


@pytest.mark.parametrize(
    "option",
    [
        {"multiway": True},
        {"moe_freq": 2},
        {"use_xmoe": True},
        {"deepnorm": True},
        {"no_output_layer": True},
        {"activation_fn": "relu"},
        {"decoder_normalize_before": False},
    ],
    ids=lambda o: next(iter(o)),
)
def test_what_cannot_be_run_is_refused_by_name(option, tmp_path):
    source = save_torchscale(tmp_path / "a", torchscale_weights(TORCHSCALE), {**TORCHSCALE, **option})
    with pytest.raises(UserError, match=rf"cannot be run here, .*{next(iter(option))}"):
        read(source)


def test_all_reasons_are_named_at_once(tmp_path):
    args = {**TORCHSCALE, "multiway": True, "moe_freq": 2, "activation_fn": "relu"}
    with pytest.raises(UserError, match=r"multiway = True .*moe_freq = 2 .*activation_fn = 'relu'"):
        read(save_torchscale(tmp_path / "a", torchscale_weights(TORCHSCALE), args))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"decoder_layers": "two"}, "decoder_layers 'two'"),
        ({"layernorm_eps": "small"}, "layernorm_eps 'small'"),
        (
            {"decoder_retention_heads": 5},
            "decoder_retention_heads is 5; it must be given, and divide the widths",
        ),
        ({"decoder_layers": 0}, "num_layers is 0"),
        ({"dropout": 2.0}, "dropout is 2.0"),
    ],
)
def test_arguments_that_make_no_sense(args, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(save_torchscale(tmp_path / "a", torchscale_weights(TORCHSCALE), {**TORCHSCALE, **args}))


def test_decays_and_angles_that_contradict_the_arguments(tmp_path):
    state, buffers = torchscale_weights(TORCHSCALE), torchscale_buffers(TORCHSCALE)
    other = torchscale_buffers({**TORCHSCALE, "decoder_retention_heads": 2})
    with pytest.raises(UserError, match=r"heads is 3, but the checkpoint's decay is of 2 heads"):
        read(save_torchscale(tmp_path / "a", {**state, **other}, TORCHSCALE))
    angle = {"retnet_rel_pos.angle": buffers["retnet_rel_pos.angle"] * 2}
    with pytest.raises(UserError, match=r"angle is not what torchscale computes for heads of width 8"):
        read(save_torchscale(tmp_path / "b", {**state, **angle}, TORCHSCALE))
    with pytest.raises(UserError, match=r"are no logarithms of decays"):
        read(save_torchscale(tmp_path / "c", {**state, "retnet_rel_pos.decay": torch.ones(3)}, TORCHSCALE))


def test_a_model_trained_with_decays_of_its_own_keeps_them(tmp_path):
    gammas = torch.tensor([0.9, 0.95, 1.0])
    state = {**torchscale_weights(TORCHSCALE), "retnet_rel_pos.decay": gammas.log()}
    assert read(save_torchscale(tmp_path / "a", state, TORCHSCALE)).config.mixer.decay == pytest.approx(
        (0.9, 0.95, 1.0)
    )


def test_tensors_that_do_not_fit_are_all_listed(tmp_path):
    state = torchscale_weights(TORCHSCALE)
    state["layers.0.ffn.fc3.weight"] = state.pop("layers.0.ffn.fc2.weight")
    state["layers.1.retention.v_proj.weight"] = torch.zeros(5, 24)
    state["layers.1.retention.q_proj.weight"] = torch.zeros(24, 24, dtype=torch.int32)
    state["layers.1.ffn.fc1.weight"][3, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    with pytest.raises(UserError) as error:
        read(save_torchscale(tmp_path / "a", state, {**TORCHSCALE, "decoder_layers": 3}))
    for part in (
        "layers.0.ffn.fc2.weight is missing",
        "layers.0.ffn.fc3.weight (24, 20) is not part of the model",
        "layers.1.retention.v_proj.weight has shape (5, 24) instead of (36, 24)",
        "layers.1.retention.q_proj.weight holds torch.int32",
        "layers.1.ffn.fc1.weight has 3 values that are NaN or infinite",
        "layers.2.ffn.gate.weight is missing",
    ):
        assert part in str(error.value)


def test_tensors_that_are_of_another_model(tmp_path):
    for embedding in (None, torch.zeros(3)):
        state = {"embed_tokens.weight": embedding, "x": torch.zeros(1)}
        source = save_torchscale(
            tmp_path / str(embedding), {k: x for k, x in state.items() if x is not None}, {}
        )
        with pytest.raises(
            UserError, match=r"has no matrix embed_tokens.weight, so it is no RetNet of torchscale"
        ):
            read(source)


def test_a_tied_head_that_is_another_tensor(tmp_path):
    state = torchscale_weights(TORCHSCALE)
    args = {**TORCHSCALE, "share_decoder_input_output_embed": True}
    with pytest.raises(
        UserError, match=r"ties output_projection.weight to embed_tokens.weight, but they are two"
    ):
        read(save_torchscale(tmp_path / "a", state, args))
    del state["output_projection.weight"]
    assert "head.weight" not in read(save_torchscale(tmp_path / "b", state, args)).tensors


def test_names_with_and_without_the_prefix(tmp_path):
    state = torchscale_weights(TORCHSCALE)
    state["decoder.layer_norm.weight"] = state["layer_norm.weight"]
    with pytest.raises(UserError, match=r"has layer_norm.weight twice, with and without the prefix"):
        read(save_torchscale(tmp_path / "a", state, TORCHSCALE))


def test_untied_weights_that_share_their_memory_become_two(tmp_path):
    state = torchscale_weights({**TORCHSCALE, "share_decoder_input_output_embed": True})
    found = read(save_torchscale(tmp_path / "a", state, TORCHSCALE))
    head, embedding = found.tensors["head.weight"], found.tensors["embedding.weight"]
    assert torch.equal(head, embedding)
    assert head.data_ptr() != embedding.data_ptr()


def test_random_tokens_are_the_same_every_time():
    assert torch.equal(random_tokens(53), random_tokens(53))
    assert random_tokens(53).max() < 53
