"""The compiled decoder against the composed one, `LanguageModel.step`, which is the law."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from retnet.engine import ComposedDecoder, choose_decoder, decode_from, quantise
from retnet.engine.cpu_decoder import CpuDecoder, NotCompiledError
from retnet.mixers import RetentionConfig
from retnet.mixers.states import join_rows, select_rows
from retnet.model import LanguageModel, ModelConfig
from retnet.nn import Int8Linear, Linear
from tests.helpers.fast import few_fast
from tests.helpers.parity import relative

numba = pytest.importorskip("numba")

OPTIONS = [
    {},
    {"gate": False},
    {"head_norm": "rms"},
    {"head_norm": "rms", "score_norm": "decay", "head_norm_eps": 1e-2},
    {"head_norm": "none", "score_norm": "none"},
    {"head_norm": "none", "score_norm": "decay"},
    {"decay": "none", "score_norm": "decay"},
    {"rotary": "halves", "rotary_spacing": "geometric"},
    {"rotary": "none"},
    {"key_dim": 34, "value_dim": 131},
    {"head_norm_affine": True, "scale": 0.3},
    {"head_norm": "rms", "head_norm_affine": True, "head_norm_groups": 2, "gate_activation": "sigmoid"},
    {"qk_norm": True, "activation": "silu", "rotary": "halves", "rotary_dim": 20, "head_norm_groups": 1},
]
FFN = ["gelu", "geglu", "swiglu"]


def model(**options):
    torch.manual_seed(0)
    mixer = RetentionConfig(num_heads=4, **options.pop("mixer", {}))
    sizes = {"vocab_size": 257, "d_model": 128, "num_layers": 3, "mixer": mixer}
    made = LanguageModel(ModelConfig(**(sizes | options))).eval()
    for parameter in made.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return made


def compiled(model, slots):
    """A decoder whose sequences are at their beginning."""
    decoder = CpuDecoder(model, slots)
    decoder.reset(torch.arange(slots))
    return decoder


@pytest.mark.parametrize(("options", "ffn"), [(o, FFN[i % 3]) for i, o in enumerate(OPTIONS)], ids=str)
@pytest.mark.parametrize("norm", few_fast(["layernorm", "rmsnorm"], "layernorm"))
def test_every_option_of_a_block(options, ffn, norm):
    module = model(num_layers=1, d_model=256, ffn=ffn, ffn_dim=300, norm=norm, mixer=options)
    tokens, slots = torch.randint(257, (5, 40)), torch.arange(5)
    decoder, law = compiled(module, 5), module.init_state(5)
    with torch.no_grad():
        for state in (decoder.pools[0].state, law[0]):
            state.position.add_(10**6)  # far into a text, where angles are large
        for t in range(40):
            want, law = module.step(tokens[:, t], law)
            assert relative(decoder.step(tokens[:, t], slots), want) < 1e-4
    (ours,) = decoder.read(slots)
    assert relative(ours.kv, law[0].kv) < 1e-5
    assert torch.equal(ours.position, law[0].position)


def test_options_that_are_not_compiled():
    with pytest.raises(NotCompiledError, match="an option"):
        CpuDecoder(model(mixer={"score_norm": "paper"}), 1)


MODELS = [
    {},
    {"tie_embeddings": True, "embedding_scale": True, "norm": "rmsnorm", "ffn": "swiglu"},
    {"embedding_norm": True, "mixer": {"rotary": "halves", "value_dim": 40}},
    {"mixer": {"rotary": "none", "gate": False}, "embedding_norm": True, "norm": "rmsnorm", "ffn": "geglu"},
    {
        "residual": "norm",
        "residual_alpha": (1.5, 0.7, 1.0, 1.2),
        "residual_beta": (0.5, 1.5),
        "mixer": {"decay_by_layer": "lightning"},
    },
]


@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("rows", few_fast([1, 2, 5, 17], 1, 5))
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_a_model_against_fp64(options, rows, kind):
    module = quantise(model(**options)) if kind == "int8" else model(**options)
    exact, tokens = copy.deepcopy(module).double(), torch.randint(257, (rows, 25))
    with torch.no_grad():
        want, read = exact.prefill(tokens, exact.init_state(rows, dtype=torch.float64))
        decoder, slots = compiled(module, rows), torch.arange(rows)
        for t in range(25):
            assert relative(decoder.step(tokens[:, t], slots), want[:, t]) < 1e-4
        for ours, theirs in zip(decoder.read(slots), read, strict=True):
            assert relative(ours.kv, theirs.kv) < 1e-5
            assert torch.equal(ours.position, theirs.position)


def test_rows_of_a_batch_are_at_their_own_places():
    """Angles are computed once for all layers, so nothing but positions and θ may decide whether they are."""
    module = model()
    module.blocks[1].mixer.theta.mul_(2)  # a layer of other angles
    exact, tokens = copy.deepcopy(module), torch.randint(257, (3, 9))
    exact = exact.double()
    exact.blocks[1].mixer.theta.mul_(2)  # `double` has computed them anew
    with torch.no_grad():
        texts = [torch.cat([tokens[i, :n], tokens[i, :1]])[None] for i, n in enumerate((9, 1, 4))]
        want = torch.cat([layer_by_layer(exact, text)[0][:, -1] for text in texts])
        states = [layer_by_layer(module, text[:, :-1])[1] for text in texts]
        decoder, slots = decode_from(module, join_rows(states))
        got = decoder.step(tokens[:, 0], slots)
    assert relative(got, want) < 1e-4


def layer_by_layer(model, tokens):
    """`prefill`, but that each layer turns by its own θ: a model hands all of them the angles of its first."""
    x, after = model.embedding(tokens), []
    for block, before in zip(model.blocks, model.init_state(len(tokens)), strict=True):
        x, state = block.prefill(x, before)
        after.append(state)
    return model.head(model.norm(x)), tuple(after)


CHANGES = {
    "weights copied": lambda m, w: m.blocks[1].mixer.q_proj.weight.copy_(w),
    "weights assigned": lambda m, w: setattr(m.blocks[1].mixer.q_proj.weight, "data", w),
    "a parameter": lambda m, w: setattr(m.blocks[1].mixer.q_proj, "weight", nn.Parameter(w)),
    "a layer": lambda m, w: setattr(m.blocks[2].mixer, "q_proj", model().blocks[0].mixer.k_proj),
    "a block": lambda m, w: m.blocks.__setitem__(1, model().blocks[2]),
    "blocks fewer": lambda m, w: m.blocks.__delitem__(1),
    "the head": lambda m, w: setattr(m, "head", Linear(128, 300)),
    "the embedding": lambda m, w: setattr(m, "embedding", nn.Embedding(257, 128)),
    "the last norm": lambda m, w: m.norm.weight.mul_(2),
    "a hook": lambda m, w: m.blocks[1].ffn.fc1.register_forward_hook(lambda layer, x, y: 2 * y),
    "a hook before": lambda m, w: m.norm.register_forward_pre_hook(lambda layer, x: (2 * x[0] + 1,)),
    "a forward": lambda m, w: setattr(m.blocks[1].ffn_norm, "forward", lambda x: 2 * x),
    "a wrapped layer": lambda m, w: setattr(m.blocks[1].ffn, "fc2", nn.Sequential(m.blocks[1].ffn.fc2)),
    "rows": lambda m, w: setattr(m.head, "forward", lambda x: x[:, :5]),
    "a part in training": lambda m, w: m.blocks[1].train(),
    "double": lambda m, w: m.double(),
    "strided": lambda m, w: setattr(m.blocks[0].ffn.fc2, "weight", nn.Parameter(torch.randn(256, 128).t())),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_stepped_as_it_is(change):
    module, tokens = model(), torch.tensor([5, 6])
    with torch.no_grad():
        compiled(module, 2).step(tokens, torch.arange(2))
        CHANGES[change](module, torch.randn(128, 128))
        decoder, slots = decode_from(module, module.init_state(2))
        want, _ = module.step(tokens, module.init_state(2))
        assert relative(decoder.step(tokens, slots), want) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        None,
        "no scales",
        "a short scale",
        "a layer in fp32",
        "a short weight",
        "a short norm",
        "a missing weight",
    ],
)
def test_int8_weights_are_read_only_if_all_of_them_fit(change):
    module = quantise(model(num_layers=1, d_model=256, ffn="swiglu"))
    mixer, ffn = module.blocks[0].mixer, module.blocks[0].ffn
    if change == "no scales":
        mixer.k_proj.scale = None
    if change == "a short scale":
        ffn.fc2.scale = ffn.fc2.scale[:-1]
    if change == "a layer in fp32":
        mixer.out_proj = Linear(512, 256).eval()
    if change == "a short weight":
        ffn.gate.codes = ffn.gate.codes[:, :-1].contiguous()
    if change == "a short norm":
        module.blocks[0].ffn_norm.weight = nn.Parameter(torch.ones(255))
    if change == "a missing weight":
        mixer.v_proj = None
    assert isinstance(mixer.q_proj, Int8Linear)
    if change is None:
        assert isinstance(choose_decoder(module, 1), CpuDecoder)
    else:
        with pytest.raises(NotCompiledError):
            CpuDecoder(module, 1)


@pytest.mark.parametrize("kind", ["fp32", "int8"])
@pytest.mark.parametrize("width", [128, 136])  # a whole number of panels, and not
def test_a_row_is_the_same_bits_in_any_company_and_any_place(kind, width):
    module = model(d_model=width, ffn="swiglu", ffn_dim=3 * width, tie_embeddings=False)
    module = quantise(module) if kind == "int8" else module
    tokens, states = torch.randint(257, (70,)), module.init_state(70)
    torch.manual_seed(1)
    for state in states:
        state.kv.normal_()
        state.position.random_(10000)

    decoder = CpuDecoder(module, 80)

    def step(rows, slots):
        """Logits and states of some of the 70 rows, in these slots."""
        for pool in decoder.pools:
            pool.state.kv.fill_(torch.nan)  # of those who are not there
        decoder.write(slots, tuple(select_rows(state, rows) for state in states))
        return decoder.step(tokens[rows], slots), decoder.read(slots)

    watched = 3  # rows 0, 1 and 2
    alone = [step(torch.tensor([row]), torch.tensor([5])) for row in range(watched)]
    for count in (2, 3, 4, 5, 7, 8, 9, 13, 17, 31, 64, 65, 70):
        rows = torch.cat([torch.arange(watched), torch.randperm(70 - watched) + watched])[:count]
        rows = rows[torch.randperm(count)]
        logits, after = step(rows, torch.randperm(80)[:count])
        for place, row in enumerate(rows.tolist()):
            if row < watched:
                want, want_after = alone[row]
                assert torch.equal(logits[place], want[0]), f"row {place} of {count}"
                for ours, theirs in zip(after, want_after, strict=True):
                    assert torch.equal(ours.kv[place], theirs.kv[0])
                    assert torch.equal(ours.position[place], theirs.position[0])


def test_weights_may_change_in_place():
    module, token, slot = model(), torch.tensor([3]), torch.tensor([0])
    with torch.no_grad():
        decoder = compiled(module, 1)
        decoder.step(token, slot)
        module.head.weight.mul_(2)
        want, _ = module.step(token, decoder.read(slot))
        assert relative(decoder.step(token, slot), want) < 1e-5


def test_it_keeps_the_memory_it_reads():
    """Weights that were replaced are not seen, but reading freed memory would be worse than reading old numbers."""
    module, token, slot = model(), torch.tensor([3]), torch.tensor([0])
    twin = copy.deepcopy(module)
    one, other = compiled(module, 1), compiled(twin, 1)
    one.step(token, slot)
    other.step(token, slot)
    module.load_state_dict({k: torch.full_like(v, 7.0) for k, v in module.state_dict().items()}, assign=True)
    junk = [torch.full((128, 128), 9.0) for _ in range(50)]  # where the old weights were, were they freed
    assert torch.equal(one.step(token, slot), other.step(token, slot))
    assert len(junk) == 50


def test_a_step_that_is_watched_is_composed():
    """Modes of torch see operators, and the kernel is none."""
    module, token, slot = model(), torch.tensor([3]), torch.tensor([0])
    decoder, seen = compiled(module, 1), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        got = decoder.step(token, slot)
    assert len(seen) > 50
    want = compiled(module, 1).step(token, slot)
    assert relative(got, want) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(decoder.step(token, slot).float(), want) > 0


@pytest.mark.parametrize("token", [-1, 257])
def test_a_token_that_is_not_in_the_vocabulary_is_an_error(token):
    decoder = compiled(model(), 1)
    with pytest.raises(ValueError, match="is not in the vocabulary"):
        decoder.step(torch.tensor([token]), torch.tensor([0]))
    assert not decoder.pools[0].state.kv.any()


def test_threads_and_copies_have_decoders_of_their_own():
    module, slot = model(tie_embeddings=False), torch.tensor([0])
    twin = copy.deepcopy(module)
    texts = torch.randint(257, (6, 30))

    def read(text):
        decoder = compiled(module, 1)
        return torch.cat([decoder.step(token[None], slot) for token in text])

    with torch.no_grad():
        twin.head.weight.mul_(2)
    want = [read(text) for text in texts]
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(read, texts))
    logits = [compiled(m, 1).step(torch.tensor([1]), slot) for m in (module, twin)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert relative(logits[1], 2 * logits[0]) < 1e-6


def test_derived_models_are_composed():
    class Louder(LanguageModel):
        def _embed(self, tokens):
            return 2 * super()._embed(tokens)

    torch.manual_seed(0)
    config = ModelConfig(vocab_size=257, d_model=128, num_layers=1, mixer=RetentionConfig(num_heads=4))
    module = Louder(config).eval()
    with pytest.raises(NotCompiledError, match="it is a Louder"):
        CpuDecoder(module, 1)
    assert type(choose_decoder(module, 1)) is ComposedDecoder


def test_the_choice_is_logged_with_its_reason(caplog):
    with caplog.at_level("INFO", logger="retnet.engine"):
        choose_decoder(model(), 1)
        choose_decoder(model(mixer={"score_norm": "paper"}), 1)
    first, second = (record.message for record in caplog.records)
    assert "compiled" in first
    assert "composed of the model's parts: it has a layer, an option" in second
