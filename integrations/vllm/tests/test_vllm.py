"""vLLM with the plugin says what the model says: greedy tokens and log-probabilities against whole sequences in fp64."""

from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from vllm import LLM, SamplingParams

from retnet.mixers import (
    MIXERS,
    GatedRetentionConfig,
    H3Config,
    LinearConfig,
    LstmConfig,
    RetentionConfig,
    Rwkv4Config,
    S4DConfig,
    SoftmaxConfig,
)
from retnet.model import LanguageModel, ModelConfig
from retnet.model.hf import RetNetForCausalLM, write_folder

VOCAB = 97
NEW = 12  # tokens a prompt
CLOSE = 1e-4  # of a log-probability, with weights in fp32

MODELS = {
    "paper": ModelConfig(
        vocab_size=VOCAB, d_model=64, num_layers=3, mixer=RetentionConfig(num_heads=2, chunk_size=16)
    ),
    "torchscale": ModelConfig(
        vocab_size=VOCAB,
        d_model=64,
        num_layers=2,
        mixer=RetentionConfig(num_heads=4, head_norm="rms", score_norm="decay"),
        norm="rmsnorm",
        ffn="geglu",
        embedding_scale=True,
        embedding_norm=True,
        tie_embeddings=False,
    ),
    # softmax and the fields of retention that others brought, lightning attention first of all
    "hybrid": ModelConfig(
        vocab_size=VOCAB,
        d_model=64,
        num_layers=6,
        layers=("retention", "ring", "softmax", "gated_retention", "ungated", "softmax"),
        mixer=RetentionConfig(
            num_heads=4,
            value_dim=24,
            decay="alibi",
            decay_by_layer="lightning",
            scale=1.0,
            activation="silu",
            gate_activation="sigmoid",
            head_norm="rms",
            head_norm_affine=True,
            head_norm_groups=2,
            rotary="none",
            form="recurrent",
        ),
        mixers={
            "ring": RetentionConfig(
                num_heads=4,
                key_dim=24,
                decay_by_layer="lightning-1",
                qk_norm=True,
                qk_norm_eps=1e-3,
                gate_activation="sigmoid",
                head_norm_groups=2,
                rotary="halves",
                rotary_dim=8,
                rotary_spacing="geometric",
                rotary_base=500.0,
            ),
            "ungated": RetentionConfig(
                num_heads=2,
                decay=(0.9, 0.99),
                decay_by_layer=(1.0, 1.0, 1.0, 1.0, 0.3, 1.0),
                gate=False,
                head_norm_affine=True,
                head_norm_eps=1e-2,
                score_norm="decay",
            ),
            "gated_retention": GatedRetentionConfig(
                num_heads=2,
                value_dim=16,
                temperature=4.0,
                rotary="halves",
                rotary_base=500.0,
                head_norm="rms",
                head_norm_eps=1e-2,
                chunk_size=16,
            ),
            "softmax": SoftmaxConfig(
                num_heads=8,
                kv_heads=2,
                key_dim=32,
                bias=True,
                qk_norm=True,
                qk_norm_eps=1e-3,
                rotary="interleaved",
                rotary_dim=16,
                rotary_base=500.0,
            ),
        },
        norm_eps=1e-3,
        residual="norm",
        residual_alpha=(1.3, 0.9),  # of a mixer and of an FFN
        residual_beta=0.7,
        ffn_layers=("swiglu", "gelu"),
        ffn_dims=(96, 64, 128),
    ),
    # every mixer whose state has a constant size, with pages of many sizes
    "mixed": ModelConfig(
        vocab_size=VOCAB,
        d_model=32,
        num_layers=7,
        mixer=RetentionConfig(num_heads=2, head_norm="none", score_norm="paper"),
        layers=("retention", "gated_retention", "linear", "rwkv4", "s4d", "h3", "lstm"),
        mixers={
            "gated_retention": GatedRetentionConfig(),
            "linear": LinearConfig(num_heads=2, rotary="interleaved", rotary_base=500.0, eps=1e-3),
            "rwkv4": Rwkv4Config(),
            "s4d": S4DConfig(state_size=8, spectrum="inv", step_min=1e-2, step_max=0.5),
            "h3": H3Config(
                head_width=4, state_size=8, shift_size=5, spectrum="inv", step_min=1e-2, step_max=0.5
            ),
            "lstm": LstmConfig(),
        },
        ffn_dim=48,
    ),
}

# of training, and which code computes it
OTHERWISE = {"dropout", "init", "backend", "sdpa"}


def test_every_setting_of_a_model_is_tried():
    """What no model here sets would be served untested: a new field belongs into one of them."""
    kinds = [kind for model in MODELS.values() for kind in (model, *model.mixer_kinds_by_layer)]
    assert {kind.name for kind in kinds if hasattr(kind, "name")} == MIXERS.keys() - {"hyena"}
    seen, tried = set(), set()
    for kind in kinds:
        for field in fields(kind):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            setting = f"{type(kind).__name__}.{field.name}"
            seen.add(setting)
            if getattr(kind, field.name) != default or field.name in OTHERWISE | {"name"}:
                tried.add(setting)
    assert seen - tried == set()


def made(name: str) -> LanguageModel:
    """In fp64, of weights that are fp32 numbers."""
    torch.manual_seed(7)
    model = LanguageModel(MODELS[name])
    with torch.no_grad():
        for parameter in model.parameters():  # norms too: weights of 1 and 0 would hide an exchange
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.head.weight.mul_(4)  # decided opinions
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("folders")
    for name in MODELS:
        write_folder(RetNetForCausalLM.from_language_model(made(name)), home / name)
    return {name: home / name for name in MODELS}


def opened(folder: Path, **settings) -> LLM:
    usual = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 48,  # so that prompts are cut, beside others that are decoded
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }
    return LLM(str(folder), **{**usual, **settings})


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def said(llm: LLM, asked: list[list[int]]) -> list:
    how = SamplingParams(temperature=0, max_tokens=NEW, logprobs=1, ignore_eos=True, detokenize=False)
    return llm.generate([{"prompt_token_ids": ids} for ids in asked], how, use_tqdm=False)


def drop(llm: LLM, asked: list[list[int]]) -> None:
    """Asks and aborts: some while they are read, some while they are decoded, some before they began."""
    engine, how = llm.llm_engine, SamplingParams(max_tokens=NEW, ignore_eos=True, detokenize=False)
    for number, ids in enumerate(asked):
        engine.add_request(f"dropped {number}", {"prompt_token_ids": ids}, how)
    for number in range(len(asked)):
        engine.step()
        engine.abort_request([f"dropped {number}"])
    assert not engine.has_unfinished_requests()


@torch.no_grad()
def check(answers: list, model: LanguageModel) -> None:
    """Every token is the likeliest of the law, or as likely to `CLOSE`, and its log-probability is right."""
    law = model.double()
    for answer in answers:
        given, new = list(answer.prompt_token_ids), list(answer.outputs[0].token_ids)
        assert len(new) == NEW
        logits = law(torch.tensor([given + new[:-1]]))[0, len(given) - 1 :]
        logprobs = logits.log_softmax(-1)
        right = logprobs[range(NEW), new]
        told = [places[token].logprob for places, token in zip(answer.outputs[0].logprobs, new, strict=True)]
        torch.testing.assert_close(torch.tensor(told).double(), right, rtol=0, atol=CLOSE)
        assert (logprobs.amax(-1) - right).max() < CLOSE, f"prompt of {len(given)} tokens"
        assert torch.equal(logprobs.argmax(-1), torch.tensor(new)), f"prompt of {len(given)} tokens"


LENGTHS = (1, 300, 2, 47, 48, 49, 129, 17)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_and_logprobs_over_batches_and_chunked_prefill(folders, name):
    llm, asked = opened(folders[name]), prompts(*LENGTHS)
    answers = said(llm, asked)  # four at once, in pages that others have left
    check(answers, made(name))
    drop(llm, asked)
    alone = said(llm, asked[1:2])
    assert alone[0].outputs[0].token_ids == answers[1].outputs[0].token_ids


@pytest.mark.parametrize("name", ["paper", "hybrid", "mixed"])
def test_prefix_caching_reads_less_and_says_the_same(folders, name):
    llm = opened(folders[name], enable_prefix_caching=True, block_size=32)
    (shared, tail) = prompts(200, 40, seed=1)
    asked = [shared, shared + tail, shared[:100] + tail, shared + tail[:7]]
    first = said(llm, asked[:1])
    rest = said(llm, asked[1:])
    again = said(llm, asked)
    check(first + rest + again, made(name))
    cached = [answer.num_cached_tokens for answer in rest + again]
    assert cached[0] >= 160, cached
    assert all(count % 32 == 0 for count in cached), cached
    assert [a.outputs[0].token_ids for a in again] == [a.outputs[0].token_ids for a in first + rest]


def test_heads_on_two_ranks(folders, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else one rank a NUMA node
    llm = opened(folders["hybrid"], tensor_parallel_size=2, enable_prefix_caching=True, block_size=32)
    asked = prompts(*LENGTHS[:5], seed=2)
    check(said(llm, asked) + said(llm, asked), made("hybrid"))


def test_bfloat16_weights_keep_fp32_states(folders):
    llm = opened(folders["paper"], dtype="bfloat16")
    ours = made("paper").bfloat16()
    for answer in said(llm, prompts(5, 300)):
        given, new = list(answer.prompt_token_ids), list(answer.outputs[0].token_ids)
        logits = ours(torch.tensor([given + new[:-1]]))[0, len(given) - 1 :].float()
        right = logits.log_softmax(-1)[range(NEW), new]
        told = [places[token].logprob for places, token in zip(answer.outputs[0].logprobs, new, strict=True)]
        assert (torch.tensor(told) - right).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        ({"layers": ("retention", "hyena")}, {}, "layer 1 is 'hyena'"),
        ({"layers": ("retention", "softmax")}, {}, "'softmax' with heads of width 4"),
        ({"mixer": RetentionConfig(num_heads=2, score_norm="torchscale")}, {}, "score_norm = 'torchscale'"),
        ({}, {"mamba_cache_dtype": "float16"}, "mamba_cache_dtype is 'float16'"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(tmp_path, change, settings, words):
    config = ModelConfig(vocab_size=VOCAB, d_model=16, num_layers=2, **change)
    write_folder(RetNetForCausalLM.from_language_model(LanguageModel(config)), tmp_path / "folder")
    with pytest.raises(ValueError, match=words):
        opened(tmp_path / "folder", **settings)


def test_a_folder_with_other_weights_is_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folders["paper"].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.stranger"] = tensors.pop("model.norm.weight")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.stranger is not part of the model; norm.weight is missing"):
        opened(broken)
