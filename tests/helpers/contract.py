"""The contract of a sequence mixer, as assertions that every mixer's test calls."""

import itertools

import torch

from retnet.mixers.packing import SequenceMixer
from retnet.mixers.states import join_tensors, select_rows
from retnet.model import LanguageModel, ModelConfig
from tests.helpers.parity import (
    assert_causal,
    assert_rows_independent,
    assert_three_ways_agree,
    relative,
    run_three_ways,
)


def assert_mixer_holds(module, d_model: int, *, tolerance: float = 1e-8, leak: float = 0.0) -> None:
    """All of a mixer's contract, in fp64: three ways, causal, rows alone, any cut, any packing, rows of any age joined."""
    x = torch.randn(2, 75, d_model, dtype=torch.float64)
    assert_three_ways_agree(module, x, tolerance)
    assert_causal(module, x, leak=leak)
    assert_rows_independent(module, x)
    with torch.no_grad():
        assert_cut_anywhere(module, x[:, :9], tolerance)
        assert_packed_is_separate(module, d_model, [5, 0, 1, 20, 7, 1, 5, 0], tolerance)
        assert_rows_of_any_age_join(module, d_model, [7, 0, 1, 30], tolerance)
        for shape in ((2, 0, d_model), (0, 3, d_model)):  # no tokens, no rows
            empty = x.new_zeros(shape)
            assert module(empty).shape == shape
            y, _ = module.prefill(empty, module.init_state(shape[0]))
            assert y.shape == shape


def assert_cut_anywhere(module, x, tolerance: float) -> None:
    """Read up to any token, then on from the state, it is the same text; also where the rest comes token by token."""
    whole, B = module(x), x.shape[0]
    for cut in range(x.shape[1] + 1):
        first, state = module.prefill(x[:, :cut], module.init_state(B))
        for t in range(cut, min(cut + 2, x.shape[1])):
            y, state = module.step(x[:, t], state)
            first = torch.cat([first, y[:, None]], dim=1)
        rest, _ = module.prefill(x[:, first.shape[1] :], state)
        assert relative(torch.cat([first, rest], dim=1), whole) <= tolerance, f"cut at {cut}"


def assert_packed_is_separate(module, d_model: int, lengths: list[int], tolerance: float) -> None:
    """Documents packed in a row, read twice from their states, give what each gives alone."""
    bounds = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    x = torch.randn(1, bounds[-1], d_model, dtype=torch.float64)
    whole = module(x, cu_seqlens=cu_seqlens)
    first, state = module.prefill(x, module.init_state(len(lengths)), cu_seqlens=cu_seqlens)
    assert relative(first, whole) <= tolerance
    second, state = module.prefill(x, state, cu_seqlens=cu_seqlens)
    token = torch.randn(len(lengths), d_model, dtype=torch.float64)
    third, _ = module.step(token, select_rows(state, range(len(lengths))))
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        alone = module(torch.cat([x[:, a:b], x[:, a:b], token[None, i : i + 1]], dim=1))
        packed = torch.cat([whole[:, a:b], second[:, a:b], third[None, i : i + 1]], dim=1)
        assert relative(packed, alone) <= tolerance, f"document {i}"
    nothing = torch.zeros(1, dtype=torch.int32)
    assert module(x[:, :0], cu_seqlens=nothing).shape == (1, 0, d_model)


def assert_rows_of_any_age_join(module, d_model: int, ages: list[int], tolerance: float) -> None:
    """Rows that have read different numbers of tokens go on in one batch as each would alone, also in another order."""
    texts = [torch.randn(1, age + 6, d_model, dtype=torch.float64) for age in ages]
    states = [module.prefill(x[:, :-6], module.init_state(1))[1] for x in texts]
    order = list(reversed(range(len(ages))))
    joined = type(states[0])(*(join_tensors(parts) for parts in zip(*states, strict=True)))
    joined = select_rows(joined, order)
    last = torch.cat([texts[i][:, -6:] for i in order])
    first, joined = module.prefill(last[:, :3], joined)
    steps = []
    for t in range(3, 6):
        y, joined = module.step(last[:, t], joined)
        steps.append(y)
    together = torch.cat([first, torch.stack(steps, dim=1)], dim=1)
    for row, i in enumerate(order):
        assert relative(together[row], module(texts[i])[0, -6:]) <= tolerance, f"age {ages[i]}"


def assert_half_weights_stay_near(mixer_class, config, d_model: int, tolerance: float) -> None:
    """With bf16 weights the function, computed all three ways, is that of the same weights in fp32; states are no narrower.

    What `Precise` holds is not rounded at all.
    """
    exact = mixer_class(d_model, config)
    half = mixer_class(d_model, config)
    half.load_state_dict(exact.state_dict())
    half = half.to(torch.bfloat16)
    exact.load_state_dict({name: w.float() for name, w in half.state_dict().items()})
    x = torch.randn(2, 300, d_model).bfloat16()
    with torch.no_grad():
        want = exact(x.float())
    for name, way in zip(("forward", "prefill", "step"), run_three_ways(half, x), strict=True):
        assert way.dtype == torch.bfloat16
        assert relative(way, want) <= tolerance, f"{name}: {relative(way, want):.2e}"


def assert_survives_meta(mixer_class, config, d_model: int) -> None:
    """Made on the meta device, given memory and weights, it is the module that was made at once."""
    made = mixer_class(d_model, config)
    with torch.device("meta"):
        module = mixer_class(d_model, config)
    if issubclass(mixer_class, SequenceMixer):  # runs there, and makes no tensor on another device
        assert module(torch.empty(2, 40, d_model, device="meta")).is_meta
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(made.state_dict()[name])
    x = torch.randn(2, 40, d_model)
    assert torch.equal(module(x), made(x))


def assert_gradients_are_finite(mixer_class, config, d_model: int, *, length: int = 2048) -> None:
    """fp32, large inputs, long: every weight has a gradient, finite and not all zero; under autocast to bf16 as well.

    Nothing of T × T numbers a head or a channel is kept for it.
    """
    module = mixer_class(d_model, config)
    for T, autocast in ((length, False), (130, True)):
        module.zero_grad()
        x = (3 * torch.randn(1, T, d_model)).requires_grad_()
        kept: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda saved, kept=kept: kept.append(saved.numel()) or saved, lambda saved: saved
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), hooks:
            y = module(x)
        y.float().square().mean().backward()
        for name, p in [("x", x), *module.named_parameters()]:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.any(), name
        if not autocast:
            assert max(kept) <= 64 * T * d_model


def assert_learns(config, *, d_model: int = 32, steps: int = 30, learning_rate: float = 5e-3) -> None:
    """In a small language model, on a text that repeats itself with documents packed, the loss falls by a half."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=17, d_model=d_model, num_layers=2, mixer=config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    tokens = torch.arange(12).repeat(16)[None]
    cu_seqlens = torch.tensor([0, 100, 101, 192], dtype=torch.int32)
    losses = []
    for _ in range(steps):
        logits = model(tokens[:, :-1], cu_seqlens=cu_seqlens.clamp(max=191))
        loss = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2, losses
