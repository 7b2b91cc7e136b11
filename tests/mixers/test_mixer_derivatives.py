"""A table: models of every mixer × every way of asking for a derivative. Each cell is right, or refused by name."""

import copy

import pytest
import torch
from torch.func import functional_call

from retnet import LanguageModel, ModelConfig
from retnet.mixers import MIXERS, SoftmaxConfig
from tests.helpers.derivatives import WAYS, assert_right_or_refused, gradient, leaves, loss, second
from tests.helpers.fast import few_fast
from tests.helpers.parity import relative

TOKENS = torch.arange(80).mul(7).remainder(11).view(2, 40)  # enough rows for the kernels of many
NO_SECOND = {
    "softmax": "has no second derivative on cpu; use sdpa = 'math'",
    "lstm": "in fp64 on a CPU alone",
}
REFUSED = {
    (mixer, way): said
    for mixer, said in NO_SECOND.items()
    for way in ("create_graph", "is_grads_batched, create_graph")
}


def model_of(config) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(vocab_size=11, d_model=16, num_layers=1, mixer=config))


def function_of(model, tokens=TOKENS):
    """Logits as a function of the weights, one of the last norm's last; and these."""
    weights = dict(model.named_parameters())
    weights["norm.weight"] = weights.pop("norm.weight")

    def logits(*given):
        return functional_call(model, dict(zip(weights, given, strict=True)), (tokens,))

    return logits, list(weights.values())


def exact(model):
    """The same model in fp64 with plain formulas."""
    law = copy.deepcopy(model).double()
    if isinstance(law.config.mixer, SoftmaxConfig):
        object.__setattr__(law.blocks[0].mixer.config, "sdpa", "math")
    return law


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch loops where it has no rule
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mixer", few_fast(MIXERS, "retention", "gated_retention", "softmax"))
def test_right_or_refused(mixer, way):
    model = model_of(MIXERS[mixer].Config())
    law, _ = function_of(exact(model))
    f, weights = function_of(model)
    refusal = REFUSED.get((mixer, way))
    assert_right_or_refused(way, f, weights, law, tolerance=2e-3, refusal=refusal)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_law_is_the_slope(mixer):
    """First and second derivatives in fp64, beside differences of what they are derivatives of."""
    f, weights = function_of(exact(model_of(MIXERS[mixer].Config())), TOKENS[:, :9])
    steps = [x.detach().sin() for x in weights]

    def at(h):
        return [x.detach() + h * s for x, s in zip(weights, steps, strict=True)]

    def along(grads):
        return sum((g * s).sum() for g, s in zip(grads, steps, strict=True))

    h = 1e-5
    slope = (loss(f(*at(h))) - loss(f(*at(-h)))) / (2 * h)
    assert relative(along(gradient(f, weights)), slope) < 1e-6
    norms = [sum(g.pow(2).sum() for g in gradient(f, at(s))) for s in (h, -h)]
    assert relative(along(second(f, weights)), (norms[0] - norms[1]) / (2 * h)) < 1e-6


@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_through_steps(mixer):
    """Decoding token by token has the gradients of reading at once."""
    model = exact(model_of(MIXERS[mixer].Config()))

    def stepped():
        state, logits = model.init_state(2), []
        for token in TOKENS[:, :5].unbind(1):
            y, state = model.step(token, state)
            logits.append(y)
        return torch.stack(logits, dim=1)

    weights = list(model.parameters())
    got = torch.autograd.grad(loss(stepped()), weights)
    want = torch.autograd.grad(loss(model(TOKENS[:, :5])), weights)
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 1e-8


def test_flash_attention_has_gradients_alone():
    model = model_of(SoftmaxConfig(sdpa="flash"))
    f, weights = function_of(model)
    assert all(x.any() for x in gradient(f, weights))
    with pytest.raises(NotImplementedError, match="sdpa = 'flash' has no second derivative"):
        second(f, weights)
    with pytest.raises(NotImplementedError, match=r"'flash' has neither.*use sdpa = 'auto' or 'math'"):
        torch.func.jvp(f, tuple(leaves(weights)), tuple(weights))
