"""The compiled decoder of layers that differ, and of softmax layers, whose caches grow: `LanguageModel.step` is the law."""

import pytest
import torch

from retnet.engine import ComposedDecoder, choose_decoder, quantise
from retnet.engine.cpu_decoder import CpuDecoder, NotCompiledError
from retnet.mixers import RetentionConfig, SoftmaxConfig
from retnet.mixers.states import join_rows, select_rows
from retnet.model import LanguageModel, ModelConfig
from tests.helpers.fast import few_fast
from tests.helpers.parity import relative

numba = pytest.importorskip("numba")

SIZES = {"vocab_size": 257, "d_model": 128, "num_layers": 4, "mixer": RetentionConfig(num_heads=4)}
HYBRIDS = {
    "three to one": {"layers": ("retention", "retention", "retention", "softmax"), "ffn_dims": (256, 256, 256, 300)},
    "softmax first": {
        "layers": ("softmax", "retention"),
        "mixers": {"softmax": SoftmaxConfig(num_heads=8, kv_heads=2, qk_norm=True, bias=True)},
        "ffn_layers": ("geglu", "swiglu", "gelu"),
        "norm": "rmsnorm",
    },
    "sizes of heads": {
        "layers": ("retention", "wide", "narrow"),
        "mixers": {
            "wide": RetentionConfig(num_heads=3, key_dim=50, value_dim=34, decay="none", gate=False, rotary="none"),
            "narrow": SoftmaxConfig(num_heads=5, kv_heads=1, key_dim=18, rotary="interleaved", rotary_dim=6),
        },
    },
    "no rotation": {"mixer": SoftmaxConfig(num_heads=4, rotary="none")},
}  # fmt: skip


def model(**options):
    torch.manual_seed(0)
    made = LanguageModel(ModelConfig(**(SIZES | options))).eval()
    for parameter in made.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("kind", ["fp32", "int8"])
@pytest.mark.parametrize("name", few_fast(HYBRIDS, "softmax first", "sizes of heads"))
def test_layers_that_differ_follow_the_law(name, kind):
    """Rows of several ages, over caches that grow: room is made for 64 places and more, and again on the way."""
    module = quantise(model(**HYBRIDS[name])) if kind == "int8" else model(**HYBRIDS[name])
    tokens, slots, ages = torch.randint(257, (3, 90)), torch.tensor([4, 0, 2]), (20, 0, 63)
    decoder = CpuDecoder(module, 5)
    decoder.reset(torch.arange(5))
    with torch.no_grad():
        read = [
            module.prefill(tokens[i : i + 1, :age], module.init_state(1))[1] for i, age in enumerate(ages)
        ]
        law = join_rows(read)
        decoder.write(slots, law)
        for t in range(70):
            want, law = module.step(tokens[:, t], law)
            assert relative(decoder.step(tokens[:, t], slots), want) < 1e-4
    for ours, theirs in zip(decoder.read(slots), law, strict=True):
        assert torch.equal(ours[-1], theirs[-1])
        for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
            for row, length in enumerate(theirs[-1].tolist()):
                places = slice(length if len(ours) == 3 else None)  # of a cache, those that are filled
                assert relative(mine[row, places], other[row, places]) < 1e-5


def test_a_row_is_the_same_bits_in_any_company_and_any_place():
    module, lengths = model(**HYBRIDS["softmax first"]), torch.randint(1, 40, (12,))
    with torch.no_grad():
        read = [module.prefill(torch.randint(257, (1, int(n))), module.init_state(1))[1] for n in lengths]
    states, tokens = join_rows(read), torch.randint(257, (12,))
    decoder = CpuDecoder(module, 20)

    def step(rows, slots):
        decoder.write(slots, select_rows(states, rows))
        return [decoder.step(tokens[rows], slots) for _ in range(3)][-1]

    alone = [step([row], torch.tensor([5]))[0] for row in range(3)]
    for count in (2, 3, 5, 9, 12):
        rows = torch.cat([torch.arange(3), torch.randperm(9) + 3])[:count]
        rows = rows[torch.randperm(count)].tolist()
        logits = step(rows, torch.randperm(20)[:count])
        for place, row in enumerate(rows):
            assert row >= 3 or torch.equal(logits[place], alone[row]), f"row {row} of {count}"


def test_a_layer_that_is_not_covered_leaves_all_to_the_composed_decoder():
    module = model(layers=("retention", "linear"))
    assert type(choose_decoder(module, 1)) is ComposedDecoder
    with pytest.raises(NotCompiledError, match="a layer, an option"):
        CpuDecoder(module, 1)
