"""The compiled products and heads of decoding against the parts they stand for."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from retnet.mixers import RetentionConfig
from retnet.mixers.base import Int8Linear, Linear
from retnet.model import Block, LanguageModel, ModelConfig, quantise
from retnet.model.states import join_rows, select_rows
from retnet.ops import decode, native, product, retention_step
from tests.helpers.parity import assert_three_ways_agree, relative

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


def parts_alone(monkeypatch):
    """Without numba: everything is composed of torch's operators."""
    monkeypatch.setattr(decode, "_kernels", lambda _: None)


FFN = ["gelu", "geglu", "swiglu"]


def block(number=0, *, ffn="gelu", norm="layernorm", **options):
    torch.manual_seed(number)
    mixer = RetentionConfig(num_heads=4, **options)
    made = Block(ModelConfig(d_model=256, mixer=mixer, ffn=ffn, ffn_dim=300, norm=norm)).eval()
    for parameter in made.parameters():  # norms that do something
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize(("options", "ffn"), [(o, FFN[i % 3]) for i, o in enumerate(OPTIONS)], ids=str)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_fused_block_is_its_parts(options, ffn, norm, monkeypatch):
    module = block(ffn=ffn, norm=norm, **options)
    x = torch.randn(5, 40, 256)
    with torch.no_grad():
        fused, composed = module.mixer.init_state(5), module.mixer.init_state(5)
        fused.position.add_(10**6)  # far into a text, where angles are large
        composed.position.add_(10**6)
        outs = []
        for t in range(40):
            assert module._step_fused(x[:, t], module.mixer.init_state(5)) is not None  # it is what is tested
            y, fused = module.step(x[:, t], fused)
            outs.append(y)
        parts_alone(monkeypatch)
        for t, y in enumerate(outs):
            want, composed = module.step(x[:, t], composed)
            assert relative(y, want) < 1e-5
    assert relative(fused.kv, composed.kv) < 1e-5
    assert torch.equal(fused.position, composed.position)


@pytest.mark.parametrize("options", [{"head_norm_affine": True}, {"score_norm": "paper"}], ids=str)
def test_what_is_not_fused_is_composed(options):
    module = block(**options)
    state = module.mixer.init_state(1)
    with torch.no_grad():
        assert module._step_fused(torch.randn(1, 256), state) is None
    assert not state.kv.any()
    assert_three_ways_agree(module.mixer, torch.randn(1, 50, 256), 1e-5)


@pytest.mark.parametrize("change", ["double", "training", "gradient", "replaced", "strided", "batch"])
def test_nothing_happens_to_a_state_the_kernel_refuses(change):
    module, B = block(), 9 if change == "batch" else 1
    if change == "double":
        module.double()
    if change == "training":
        module.train()
    if change == "strided":
        module.ffn.fc2.weight = torch.nn.Parameter(torch.randn(300, 256).t())
    state = module.mixer.init_state(B)
    if change == "replaced":  # as LoRA does
        module.mixer.q_proj = torch.nn.Sequential(module.mixer.q_proj)
    with torch.set_grad_enabled(change == "gradient"):
        x = torch.randn(B, 256, dtype=state.kv.dtype)
        assert module._step_fused(x, state) is None
    assert not state.kv.any()
    assert not state.position.any()


@pytest.mark.parametrize("rows", [1, 3, 8, 9])
def test_product(rows):
    x, weight = torch.randn(rows, 130), torch.randn(513, 130)
    with torch.no_grad():
        assert relative(product(x, weight), F.linear(x, weight)) < 1e-5
        strided = torch.randn(rows, 260)[:, ::2]
        assert relative(product(strided, weight), F.linear(strided, weight)) < 1e-5
        strided = torch.randn(513, 260)[:, ::2]
        assert relative(product(x, strided), F.linear(x, strided)) < 1e-5


def int8(weight):
    """Codes and scales of a weight."""
    scale = weight.abs().amax(1) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 9])
def test_product_with_int8_weights(rows, monkeypatch):
    x = torch.randn(rows, 131)
    codes, scale = int8(torch.randn(513, 131) * torch.logspace(-3, 3, 513)[:, None])
    weight = codes.double() * scale.double()[:, None]
    want, size = F.linear(x.double(), weight), F.linear(x.double().abs(), weight.abs())
    with torch.no_grad():
        assert (decode.few_rows(x, codes, scale) is None) == (rows > decode.MAX_ROWS)
        for _ in range(2):
            got = product(x, codes, scale)
            assert ((got - want).abs() <= 1e-6 * size).all()  # each row by its own measure
            strided = product(torch.stack((x, x), -1)[..., 0], codes.t().contiguous().t(), scale)
            assert relative(strided, want) < 1e-5
            parts_alone(monkeypatch)


WRONG = {
    "weights of another type": lambda w, c, s: (c.to(torch.uint8), s),
    "fp32 weights with a scale": lambda w, c, s: (w, s),
    "int8 weights without": lambda w, c, s: (c, None),
    "bf16 weights": lambda w, c, s: (w.bfloat16(), None),
    "scales of another type": lambda w, c, s: (c, s.double()),
    "too few scales": lambda w, c, s: (c, s[:-1]),
    "strided scales": lambda w, c, s: (c, torch.stack((s, s), 1)[:, 0]),
    "scales on another device": lambda w, c, s: (c, s.to("meta")),
    "weights on another device": lambda w, c, s: (w.to("meta"), None),
    "narrower weights": lambda w, c, s: (w[:, :-1].contiguous(), None),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_kernel_reads_only_what_it_knows(wrong):
    weight = torch.randn(200, 130)
    with torch.no_grad():
        assert decode.few_rows(torch.randn(1, 130), *WRONG[wrong](weight, *int8(weight))) is None


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
def test_a_block_with_int8_weights_is_read_only_if_all_of_it_fits(change):
    module = block(ffn="swiglu")
    mixer, ffn = module.mixer, module.ffn
    for layers in (mixer, ffn):
        for name, layer in list(layers.named_children()):
            setattr(layers, name, Int8Linear(layer))
    state = module.mixer.init_state(1)
    if change == "no scales":
        mixer.k_proj.scale = None
    if change == "a short scale":
        ffn.fc2.scale = ffn.fc2.scale[:-1]
    if change == "a layer in fp32":
        mixer.out_proj = Linear(512, 256)
    if change == "a short weight":
        ffn.gate.codes = ffn.gate.codes[:, :-1].contiguous()
    if change == "a short norm":
        module.ffn_norm.weight = torch.nn.Parameter(torch.ones(255))
    if change == "a missing weight":
        mixer.v_proj = None
    if change == "a position":
        state = state._replace(position=torch.zeros(1, dtype=torch.int32))
    with torch.no_grad():
        assert (module._step_fused(torch.randn(1, 256), state) is None) == (change is not None)
    assert state.kv.any() == (change is None)


@pytest.mark.parametrize(("H", "K", "V"), [(1, 1, 1), (3, 60, 100), (4, 64, 128)])
@pytest.mark.parametrize("slots", [None, [2, -1, 0, 4, -1]])
def test_step_in_one_pass(H, K, V, slots, monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(5, H, K, generator=g) for _ in range(2))
    v, state = torch.randn(5, H, V, generator=g), torch.randn(6, H, K, V, generator=g)
    log_decay = torch.tensor([1.0, 0.9, 0.5, 0.99])[:H].log()
    rows = None if slots is None else torch.tensor(slots, dtype=torch.int32)
    one, other = state.clone(), state.clone()
    fused = retention_step(q, k, v, log_decay, one, rows)
    parts_alone(monkeypatch)
    composed = retention_step(q, k, v, log_decay, other, rows)
    assert relative(fused, composed) < 1e-6
    assert relative(one, other) < 1e-6


def test_other_types_go_through_torch():
    for dtype in (torch.float64, torch.bfloat16):
        x, w = torch.randn(1, 256, dtype=dtype), torch.randn(256, 256, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(product(x, w), F.linear(x, w))


def test_without_numba_it_says_what_to_install(monkeypatch, caplog):
    import sys

    monkeypatch.setitem(sys.modules, "numba", None)
    with caplog.at_level("INFO", logger="retnet.ops"):
        assert native.compiler.__wrapped__() is None
    assert "pip install 'retnet[fast]'" in caplog.text


def test_large_pages_change_no_number_and_no_address(monkeypatch):
    x, asked = torch.randn(3 << 20), []
    want, address = x.clone(), x.data_ptr()
    native.in_large_pages([x, None, torch.empty(0)])
    assert (x.data_ptr(), x.nbytes) == (address, 12 << 20)
    assert torch.equal(x, want)

    class System:
        def madvise(self, start, length, advice):
            asked.append((start.value, length.value))
            return -1  # refused, as by an old system

    monkeypatch.setattr(native, "_libc", System)
    native.in_large_pages([x, x[:100]])
    assert asked == [(start, 1 << 21) for start in range(address >> 21 << 21, address + x.nbytes, 1 << 21)]
    monkeypatch.setattr(native, "LARGE_PAGES", 2)
    asked.clear()
    native.in_large_pages([x])
    assert len(asked) == 2
    monkeypatch.setattr(native.sys, "platform", "darwin")
    native.in_large_pages([x])
    assert len(asked) == 2


@pytest.mark.parametrize("change", ["copied", "assigned", "parameter", "module", "wrapped", "double"])
def test_a_plan_ends_when_the_block_changes(change, monkeypatch):
    module, x = block(), torch.randn(1, 256)
    with torch.no_grad():
        module.step(x, module.mixer.init_state(1))  # makes the plan
        projection, other = module.mixer.q_proj, torch.randn(256, 256)
        if change == "copied":
            projection.weight.copy_(other)
        if change == "assigned":
            projection.weight.data = other
        if change == "parameter":
            projection.weight = torch.nn.Parameter(other)
        if change == "module":
            module.mixer.q_proj = block(1).mixer.q_proj
        if change == "wrapped":
            monkeypatch.setattr(projection, "forward", lambda x: x @ other.t())
        if change == "double":
            module, x = module.double(), x.double()
        got, _ = module.step(x, module.mixer.init_state(1))
        parts_alone(monkeypatch)
        want, _ = module.step(x, module.mixer.init_state(1))
    assert relative(got, want) < 1e-5


def model(**options):
    torch.manual_seed(0)
    mixer = RetentionConfig(num_heads=4, **options.pop("mixer", {}))
    sizes = {"vocab_size": 257, "d_model": 128, "num_layers": 3, "mixer": mixer}
    made = LanguageModel(ModelConfig(**(sizes | options))).eval()
    for parameter in made.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return made


MODELS = [
    {},
    {"tie_embeddings": True, "embedding_scale": True, "norm": "rmsnorm", "ffn": "swiglu"},
    {"embedding_norm": True, "mixer": {"rotary": "halves", "value_dim": 40}},
    {"mixer": {"rotary": "none", "gate": False}, "embedding_norm": True, "norm": "rmsnorm", "ffn": "geglu"},
]


@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_a_model_in_one_call_is_its_blocks(options, rows, kind, monkeypatch):
    module = quantise(model(**options)) if kind == "int8" else model(**options)
    exact, tokens = copy.deepcopy(module).double(), torch.randint(257, (rows, 25))
    with torch.no_grad():
        want, read = exact.prefill(tokens, exact.init_state(rows, dtype=torch.float64))
        state = module.init_state(rows)
        for t in range(25):
            assert relative(module._step_fused(tokens[:, t], state), want[:, t]) < 1e-4
        for ours, theirs in zip(state, read, strict=True):
            assert relative(ours.kv, theirs.kv) < 1e-5
            assert torch.equal(ours.position, theirs.position)
        _, after = module.step(tokens[:, 0], state)
        assert all(a is b for a, b in zip(after, state, strict=True))
        parts_alone(monkeypatch)
        assert module._step_fused(tokens[:, 0], state) is None


def test_rows_of_a_batch_are_at_their_own_places():
    """Angles are computed once for all layers, so nothing but positions and θ may decide whether they are."""
    module = model()
    module.blocks[1].mixer.theta.mul_(2)  # a layer of other angles
    exact, tokens = copy.deepcopy(module), torch.randint(257, (3, 9))
    exact = exact.double()
    exact.blocks[1].mixer.theta.mul_(2)  # `double` has computed them anew
    with torch.no_grad():
        texts = [torch.cat([tokens[i, :n], tokens[i, :1]])[None] for i, n in enumerate((9, 1, 4))]
        want = torch.cat([exact.prefill(text, exact.init_state(1))[0][:, -1] for text in texts])
        states = [module.prefill(text[:, :-1], module.init_state(1))[1] for text in texts]
        fused = module._step_fused(tokens[:, 0], join_rows(states))
    assert relative(fused, want) < 1e-4


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
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_is_read_anew(change, monkeypatch):
    module, tokens = model(), torch.tensor([5, 6])
    with torch.no_grad():
        module.step(tokens, module.init_state(2))  # makes the plan
        CHANGES[change](module, torch.randn(128, 128))
        got, _ = module.step(tokens, module.init_state(2))
        parts_alone(monkeypatch)
        want, _ = module.step(tokens, module.init_state(2))
    assert relative(got, want) < 1e-5


@pytest.mark.parametrize(
    "change", ["batch", "gradient", "training", "types", "state", "strided", "length", "int32"]
)
def test_nothing_happens_to_the_states_of_a_model_that_is_refused(change):
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
        assert module._step_fused(tokens, state) is None
    assert not any(s.kv.any() or s.position.any() for s in state)


@pytest.mark.parametrize("options", [{}, {"mixer": {"head_norm_affine": True}}], ids=["fused", "composed"])
def test_a_stepper_is_the_steps_of_its_model(options):
    module, tokens = model(**options), torch.randint(257, (2, 12))
    with torch.no_grad():
        state = module.init_state(2)
        stepper = module.stepper(module.init_state(2))
        for token in tokens.t():
            want, state = module.step(token, state)
            assert torch.equal(stepper.step(token), want)
        for ours, theirs in zip(stepper.state, state, strict=True):
            assert torch.equal(ours.kv, theirs.kv)
            assert torch.equal(ours.position, theirs.position)


def test_a_stepper_sees_weights_that_change_in_place():
    module, token = model(), torch.tensor([3])
    with torch.no_grad():
        stepper = module.stepper(module.init_state(1))
        stepper.step(token)
        module.head.weight.mul_(2)
        state = select_rows(stepper.state, [0])
        assert torch.equal(stepper.step(token), module.step(token, state)[0])


def test_a_stepper_keeps_the_memory_it_reads():
    """Weights that were replaced are not seen, but reading freed memory would be worse than reading old numbers."""
    module, token = model(), torch.tensor([3])
    twin = copy.deepcopy(module)
    with torch.no_grad():
        stepper, other = (m.stepper(m.init_state(1)) for m in (module, twin))
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
        stepper, state = module.stepper(module.init_state(1)), module.init_state(1)
        for _ in range(2):
            _, state = module.step(token, state)
            stepper.step(token)
    logits = stepper.step(token)  # with a gradient
    assert logits.requires_grad
    want, _ = module.step(token, state)
    assert relative(logits, want) < 1e-6
    with torch.no_grad():
        assert stepper.step(token).shape == (1, 257)
        with pytest.raises(IndexError):
            stepper.step(torch.tensor([257]))


@pytest.mark.parametrize("token", [-1, 257])
def test_a_token_that_is_not_in_the_vocabulary_is_an_error(token):
    module = model()
    state = module.init_state(1)
    with torch.no_grad(), pytest.raises(IndexError):
        module.step(torch.tensor([token]), state)
    assert not state[0].kv.any()


def test_threads_and_copies_have_plans_of_their_own():
    module = model(tie_embeddings=False)
    with torch.no_grad():
        module.step(torch.tensor([1]), module.init_state(1))
        twin = copy.deepcopy(module)
        twin.head.weight.mul_(2)
        texts = torch.randint(257, (6, 30))

        def read(text):
            with torch.no_grad():
                state = module.init_state(1)
                return torch.cat([module.step(token[None], state)[0] for token in text])

        want = [read(text) for text in texts]
        with ThreadPoolExecutor(3) as pool:
            got = list(pool.map(read, texts))
        logits = [m.step(torch.tensor([1]), m.init_state(1))[0] for m in (module, twin)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert relative(logits[1], 2 * logits[0]) < 1e-6


def test_other_mixers_and_derived_models_are_composed():
    class Louder(LanguageModel):
        def _embed(self, tokens):
            return 2 * super()._embed(tokens)

    torch.manual_seed(0)
    config = ModelConfig(vocab_size=257, d_model=128, num_layers=1, mixer=RetentionConfig(num_heads=4))
    for module in (Louder(config).eval(), model(mixer={"head_norm_affine": True})):
        with torch.no_grad():
            assert module._step_fused(torch.tensor([1]), module.init_state(1)) is None
        assert_three_ways_agree(module, torch.randint(257, (1, 20)), 1e-5)


def test_a_step_under_a_transform_or_a_mode_is_an_operator():
    q, v, log_decay = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 5), torch.full((3,), -0.1)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        retention_step(q[0], q[0], v[0], log_decay, torch.zeros(1, 3, 4, 5))
    assert any("retnet" in name for name in seen)
