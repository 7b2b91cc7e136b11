"""pipeline, device maps, int8 weights, torch.compile: with a Hugging Face model of ours, for real, on a CPU."""

import copy

import pytest
import torch

from retnet.data import Tokenizer
from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from tests.helpers.fast import few_fast
from tests.helpers.lazily import hf, transformers
from tests.helpers.parity import relative
from tests.model.hf_helpers import V, causal_lm, greedy, language_model, left_padded, tokens


@pytest.fixture
def texts(tmp_path):
    """A folder of a byte model with its tokenizer, and the model."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=257, d_model=16, num_layers=2, mixer=RetentionConfig(num_heads=2))
    model = LanguageModel(config).double().eval()
    hf.write_folder(
        hf.RetNetForCausalLM.from_language_model(model), tmp_path / "m", tokenizer=Tokenizer.load("bytes")
    )
    return tmp_path / "m", model


@pytest.mark.parametrize("batch_size", [1, 3])
def test_pipeline(texts, batch_size):
    folder, law = texts
    ours = Tokenizer.load("bytes")
    prompts = ["once upon a time", "é", "def f():"]
    generator = transformers.pipeline("text-generation", model=str(folder))
    found = generator(prompts, max_new_tokens=5, do_sample=False, batch_size=batch_size)
    for prompt, (answer,) in zip(prompts, found, strict=True):
        row = torch.tensor([ours.bos_id, *ours.encode(prompt)])
        want = greedy(law, row, 5)[1:].tolist()
        want = want[: want.index(ours.bos_id)] if ours.bos_id in want else want
        assert answer["generated_text"] == ours.decode(want)


# ---- device maps


@pytest.mark.filterwarnings("ignore:.*offloaded modules.*:UserWarning")
@pytest.mark.parametrize(
    "device_map",
    [
        "cpu",
        "auto",
        {"": "cpu"},
        {"model.embedding": "cpu", "model.blocks.0": "cpu", "model.blocks.1": "disk"},
    ],
    ids=["cpu", "auto", "dict", "disk"],
)
@pytest.mark.parametrize("dialect", few_fast(["fla", "torchscale"], "fla"))
def test_device_maps(dialect, device_map, tmp_path):
    pytest.importorskip("accelerate")
    model = causal_lm(dialect)
    hf.write_folder(model, tmp_path / "m")
    if isinstance(device_map, dict) and len(device_map) > 1:
        rest = {"model.norm": "disk", "lm_head": "disk"}
        device_map = {
            **device_map,
            **rest,
            **({"model.embedding_norm": "cpu"} if dialect == "torchscale" else {}),
        }
    found = hf.RetNetForCausalLM.from_pretrained(
        tmp_path / "m", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    ids, mask = left_padded([tokens(4), tokens(7)])
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        want, got = model(ids, attention_mask=mask).logits, found(ids, attention_mask=mask).logits
    assert relative(got, want) < 1e-12
    assert torch.equal(found.generate(ids, **options), model.generate(ids, **options))


# ---- int8


@pytest.fixture
def int8():
    quantization = pytest.importorskip("torchao.quantization")
    return quantization.quantize_, quantization.Int8WeightOnlyConfig()


def wide_model():
    """Wide enough that its weights would go to the kernels for decoding."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=V, d_model=128, num_layers=2, mixer=RetentionConfig(num_heads=2), tie_embeddings=False
    )
    return hf.RetNetForCausalLM.from_language_model(LanguageModel(config).eval())


def check_quantised(found, model):
    """Whole sequences, many rows and few, and decoding compute with the same rounded weights."""
    assert type(found.model.blocks[0].mixer.q_proj.weight) is not torch.nn.Parameter
    ids = tokens(2, 90)
    with torch.no_grad():
        want, got = model(ids).logits, found(ids).logits
        assert 0 < relative(got, want) < 0.05
        cache = hf.RetNetCache()
        pieces = [found(piece, past_key_values=cache).logits for piece in ids.split((80, 1, 1, 8), dim=1)]
        assert relative(torch.cat(pieces, dim=1), got) < 1e-5
    out = found.generate(ids[:, :5], max_new_tokens=5, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        assert torch.equal(
            out[:, 5:], torch.stack([found(out[:, :t]).logits[:, -1].argmax(-1) for t in range(5, 10)], 1)
        )


def test_int8_weights(int8):
    quantize, settings = int8
    model = wide_model()
    found = copy.deepcopy(model)
    quantize(found, settings)
    check_quantised(found, model)


def test_int8_weights_from_a_folder_and_back(int8, tmp_path):
    from transformers import TorchAoConfig

    model = wide_model()
    hf.write_folder(model, tmp_path / "m")
    found = hf.RetNetForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=TorchAoConfig(int8[1]), device_map="cpu"
    )
    check_quantised(found, model)
    found.save_pretrained(tmp_path / "int8")
    again = hf.RetNetForCausalLM.from_pretrained(tmp_path / "int8", device_map="cpu")
    ids = tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, found(ids).logits)
    with pytest.raises(ValueError, match="undo its quantisation"):
        found.to_language_model()


# ---- torch.compile


def decode(model, step, ids, start):
    """Logits of ids[:, start:] by single steps after the first `start` tokens were read."""
    with torch.no_grad():
        cache = model(ids[:, :start]).past_key_values
        found = []
        for token in ids[:, start:].split(1, dim=1):
            out = step(input_ids=token, past_key_values=cache)
            found.append(out.logits)
            cache = out.past_key_values
    return torch.cat(found, dim=1)


def check_compiled(dialect, backend):
    torch._dynamo.reset()
    model, law, ids = causal_lm(dialect, torch.float32), language_model(dialect, torch.float32), tokens(2, 20)
    step = torch.compile(model, fullgraph=True, backend=backend)
    decode(model, step, ids[:, :6], 5)  # one token, which compiles
    with torch._dynamo.config.patch(error_on_recompile=True):
        for start in (5, 11):
            with torch.no_grad():
                want = law(ids)[:, start:]
            assert relative(decode(model, step, ids, start), want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dialect", few_fast(["torchscale", "plain"], "plain"))
def test_a_compiled_step_is_one_graph_and_stays_it(dialect):
    check_compiled(dialect, "aot_eager")


@pytest.mark.slow
def test_a_compiled_step_in_machine_code():
    check_compiled("plain", "inductor")
