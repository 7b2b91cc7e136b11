"""The compiled decoder against the composed one, `LanguageModel.step`, which is the law."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from retnet.engine import Stepper, quantise
from retnet.engine.cpu_decoder.stepper import bind
from retnet.mixers import RetentionConfig
from retnet.mixers.states import join_rows, select_rows
from retnet.model import LanguageModel, ModelConfig
from retnet.nn import Int8Linear, Linear
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


def step(model, tokens, state):
    """The compiled step, or None."""
    steps = bind(model, state)
    return None if steps is None else steps(tokens)


@pytest.mark.parametrize(("options", "ffn"), [(o, FFN[i % 3]) for i, o in enumerate(OPTIONS)], ids=str)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_every_option_of_a_block(options, ffn, norm):
    module = model(num_layers=1, d_model=256, ffn=ffn, ffn_dim=300, norm=norm, mixer=options)
    tokens = torch.randint(257, (5, 40))
    with torch.no_grad():
        ours, law = module.init_state(5), module.init_state(5)
        for state in (*ours, *law):
            state.position.add_(10**6)  # far into a text, where angles are large
        for t in range(40):
            want, law = module.step(tokens[:, t], law)
            assert relative(step(module, tokens[:, t], ours), want) < 1e-4
    assert relative(ours[0].kv, law[0].kv) < 1e-5
    assert torch.equal(ours[0].position, law[0].position)


@pytest.mark.parametrize(
    "options", [{"head_norm_affine": True}, {"score_norm": "paper"}, {"score_norm": "torchscale"}], ids=str
)
def test_options_that_are_not_compiled(options):
    module = model(mixer=options)
    state = model().init_state(1)
    with torch.no_grad():
        assert step(module, torch.tensor([1]), state) is None
    assert not state[0].kv.any()


MODELS = [
    {},
    {"tie_embeddings": True, "embedding_scale": True, "norm": "rmsnorm", "ffn": "swiglu"},
    {"embedding_norm": True, "mixer": {"rotary": "halves", "value_dim": 40}},
    {"mixer": {"rotary": "none", "gate": False}, "embedding_norm": True, "norm": "rmsnorm", "ffn": "geglu"},
]


@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_a_model_against_fp64(options, rows, kind):
    module = quantise(model(**options)) if kind == "int8" else model(**options)
    exact, tokens = copy.deepcopy(module).double(), torch.randint(257, (rows, 25))
    with torch.no_grad():
        want, read = exact.prefill(tokens, exact.init_state(rows, dtype=torch.float64))
        state = module.init_state(rows)
        for t in range(25):
            assert relative(step(module, tokens[:, t], state), want[:, t]) < 1e-4
        for ours, theirs in zip(state, read, strict=True):
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
        got = step(module, tokens[:, 0], join_rows(states))
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
    "training": lambda m, w: m.train(),
    "strided": lambda m, w: setattr(m.blocks[0].ffn.fc2, "weight", nn.Parameter(torch.randn(256, 128).t())),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_stepped_as_it_is(change):
    module, tokens = model(), torch.tensor([5, 6])
    with torch.no_grad():
        Stepper(module, module.init_state(2)).step(tokens)
        CHANGES[change](module, torch.randn(128, 128))
        got = Stepper(module, module.init_state(2)).step(tokens)
        want, _ = module.step(tokens, module.init_state(2))
    assert relative(got, want) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        None,
        "no scales",
        "a short scale",
        "a layer in fp32",
        "a short weight",
        "a short norm",
        "a position",
        "a missing weight",
    ],
)
def test_int8_weights_are_read_only_if_all_of_them_fit(change):
    module = quantise(model(num_layers=1, d_model=256, ffn="swiglu"))
    mixer, ffn = module.blocks[0].mixer, module.blocks[0].ffn
    state = module.init_state(1)
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
    if change == "a position":
        state = (state[0]._replace(position=torch.zeros(1, dtype=torch.int32)),)
    assert isinstance(mixer.q_proj, Int8Linear)
    with torch.no_grad():
        assert (step(module, torch.tensor([1]), state) is None) == (change is not None)
    assert state[0].kv.any() == (change is None)


@pytest.mark.parametrize(
    "change", ["batch", "gradient", "training", "types", "state", "strided", "length", "int32"]
)
def test_nothing_happens_to_the_states_of_a_step_that_is_refused(change):
    module, rows = model(), 9 if change == "batch" else 2
    state = module.init_state(rows)
    tokens = torch.zeros(rows, dtype=torch.int32 if change == "int32" else torch.int64)
    if change == "training":
        module.train()
    if change == "types":
        state = module.init_state(rows, dtype=torch.float64)
    if change == "state":
        state = module.init_state(rows + 1)
    if change == "strided":
        state = tuple(s._replace(kv=s.kv.mT.contiguous().mT) for s in state)
    if change == "length":
        state = state[:2]
    with torch.set_grad_enabled(change == "gradient"):
        assert step(module, tokens, state) is None
    assert not any(s.kv.any() or s.position.any() for s in state)


@pytest.mark.parametrize("options", [{}, {"mixer": {"head_norm_affine": True}}], ids=["compiled", "composed"])
def test_a_stepper_is_the_steps_of_its_model(options):
    module, tokens = model(**options), torch.randint(257, (2, 12))
    with torch.no_grad():
        state = module.init_state(2)
        stepper = Stepper(module, module.init_state(2))
        for token in tokens.t():
            want, state = module.step(token, state)
            assert relative(stepper.step(token), want) < 1e-4
        for ours, theirs in zip(stepper.state, state, strict=True):
            assert relative(ours.kv, theirs.kv) < 1e-5
            assert torch.equal(ours.position, theirs.position)


def test_a_stepper_sees_weights_that_change_in_place():
    module, token = model(), torch.tensor([3])
    with torch.no_grad():
        stepper = Stepper(module, module.init_state(1))
        stepper.step(token)
        module.head.weight.mul_(2)
        state = select_rows(stepper.state, [0])
        assert relative(stepper.step(token), module.step(token, state)[0]) < 1e-5


def test_a_stepper_keeps_the_memory_it_reads():
    """Weights that were replaced are not seen, but reading freed memory would be worse than reading old numbers."""
    module, token = model(), torch.tensor([3])
    twin = copy.deepcopy(module)
    with torch.no_grad():
        stepper, other = (Stepper(m, m.init_state(1)) for m in (module, twin))
        stepper.step(token)
        other.step(token)
        module.load_state_dict(
            {k: torch.full_like(v, 7.0) for k, v in module.state_dict().items()}, assign=True
        )
        junk = [torch.full((128, 128), 9.0) for _ in range(50)]  # where the old weights were, were they freed
        assert torch.equal(stepper.step(token), other.step(token))
    assert len(junk) == 50


def test_a_stepper_composes_a_step_that_the_kernel_refuses():
    module, token = model(), torch.tensor([3])
    with torch.no_grad():
        stepper, state = Stepper(module, module.init_state(1)), module.init_state(1)
        for _ in range(2):
            _, state = module.step(token, state)
            stepper.step(token)
    logits = stepper.step(token)  # with a gradient
    assert logits.requires_grad
    want, _ = module.step(token, state)
    assert relative(logits, want) < 1e-5
    with torch.no_grad():
        assert stepper.step(token).shape == (1, 257)
        with pytest.raises(IndexError):
            stepper.step(torch.tensor([257]))


@pytest.mark.parametrize("token", [-1, 257])
def test_a_token_that_is_not_in_the_vocabulary_is_an_error(token):
    module = model()
    stepper = Stepper(module, module.init_state(1))
    with torch.no_grad(), pytest.raises(IndexError):
        stepper.step(torch.tensor([token]))
    assert not stepper.state[0].kv.any()


def test_threads_and_copies_have_steps_of_their_own():
    module = model(tie_embeddings=False)
    with torch.no_grad():
        twin = copy.deepcopy(module)
        twin.head.weight.mul_(2)
        texts = torch.randint(257, (6, 30))

        def read(text):
            with torch.no_grad():
                stepper = Stepper(module, module.init_state(1))
                return torch.cat([stepper.step(token[None]) for token in text])

        want = [read(text) for text in texts]
        with ThreadPoolExecutor(3) as pool:
            got = list(pool.map(read, texts))
        logits = [Stepper(m, m.init_state(1)).step(torch.tensor([1])) for m in (module, twin)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert relative(logits[1], 2 * logits[0]) < 1e-6


def test_derived_models_are_composed():
    class Louder(LanguageModel):
        def _embed(self, tokens):
            return 2 * super()._embed(tokens)

    torch.manual_seed(0)
    config = ModelConfig(vocab_size=257, d_model=128, num_layers=1, mixer=RetentionConfig(num_heads=4))
    module = Louder(config).eval()
    with torch.no_grad():
        assert step(module, torch.tensor([1]), module.init_state(1)) is None
