import math
from types import SimpleNamespace

import pytest
import torch

from retnet.bench import implementations, op_steps, ops
from retnet.bench.implementations import (
    BOTH,
    FORWARD,
    LARGE,
    OURS,
    Algorithm,
    HeadShape,
    OpsBench,
    TimedImplementation,
    implementations_on,
)
from retnet.bench.op_steps import Step, StepRow
from retnet.bench.ops import OpRow
from retnet.cli.options import numbers
from retnet.measure import peers
from retnet.measure.clock import Sample, Spread, stopwatch
from retnet.measure.limits import recent
from retnet.ops import log_decays, retention
from retnet.settings import UserError
from tests.helpers.parity import random_inputs, relative

CPU = torch.device("cpu")
SMALL = HeadShape(2, 16, 32)


def counted(T, H, K, V, C):
    """Flops of the explicit algorithm, from the shapes of its products chunk by chunk."""
    forward = backward = 0
    for start in range(0, T, C):
        n = min(C, T - start)
        forward += n * n * (K + V) + 2 * n * K * V  # q kᵀ, A v; q S, kᵀ v
        backward += n * n * (3 * K + 2 * V)  # q kᵀ, G k, Gᵀ q; do vᵀ, Aᵀ do
        backward += 5 * n * K * V  # do Sᵀ, kᵀ v, v dSᵀ, k dS, qᵀ do
    return 2 * H * forward, 2 * H * (forward + backward)


@pytest.mark.parametrize("T", [1, 64, 100, 640])
def test_flops_are_those_of_the_products(T):
    forward, both = counted(T, 2, 16, 32, 64)
    assert implementations.LOOPED.flops(T, SMALL, FORWARD) == forward
    assert implementations.LOOPED.flops(T, SMALL, BOTH) == both


def test_kernels_get_credit_for_the_triangle_alone():
    pairs = 64 * 65 // 2 + 36 * 37 // 2
    assert implementations.COMPILED.flops(100, SMALL, FORWARD) == 2 * 2 * (pairs * 48 + 100 * 2 * 16 * 32)
    gap = implementations.LOOPED.flops(100, SMALL, BOTH) - implementations.COMPILED.flops(100, SMALL, BOTH)
    assert gap == 2 * 2 * (64**2 + 36**2 - pairs) * (4 * 16 + 3 * 32)


def test_flops_of_forms_without_chunks():
    assert implementations.SQUARE.flops(10, HeadShape(3, 4, 8), BOTH) == 3 * 2 * 3 * 100 * 12
    attention = implementations.ATTENTION.flops(10, HeadShape(2, 8, 8), BOTH)
    assert attention == 2 * 2 * 55 * (2 + 5) * 8


@pytest.mark.parametrize("shape", [SMALL, HeadShape(3, 60, 100)])
def test_every_way_computes_retention(shape):
    H, K, V = shape
    inputs = random_inputs(2, 128, H, K, V, dtype=torch.float32)[:3]
    want = retention(*(x.double() for x in inputs), log_decays("paper", H), backend="reference")[0]
    found = [
        one
        for one in implementations_on(CPU, shape)
        if one.name not in (implementations.NARROW, implementations.WIDE)
    ]
    assert found[0].name == OURS
    for one in found:
        assert relative(one.forward(*inputs), want) < 1e-5, one.name


def test_attention_is_causal_and_of_the_stated_width():
    narrow, wide = (
        one for one in implementations_on(CPU, HeadShape(8, 64, 128)) if one.name.startswith("SDPA")
    )
    assert (narrow.inputs, wide.inputs) == (HeadShape(4, 128, 128), HeadShape(8, 128, 128))
    assert peers.attention_heads(96) == (3, 32)
    q, k, v = (torch.randn(2, 5, 3, 8, dtype=torch.float64) for _ in range(3))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(8)
    masked = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -math.inf)
    want = torch.einsum("bhts,bshv->bthv", masked.softmax(-1), v)
    assert relative(peers.causal_attention(q, k, v), want) < 1e-12


def test_flash_linear_attention_is_used_where_it_is(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert peers.flash_linear_attention() == {}
    module = SimpleNamespace(
        chunk_retention=lambda q, k, v: (q + v, None), fused_chunk_retention=lambda q, k, v: (k + v, None)
    )
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    monkeypatch.setattr(peers, "need", lambda name: (module,))
    outputs = [form(1, 2, 4) for form in peers.flash_linear_attention().values()]
    assert outputs == [5, 6]


def test_what_is_left_out():
    bench = OpsBench(tokens=1024, peer_work=1e-9 * 1000)
    algorithm = Algorithm(None, False, (1, 0, 0), (0, 0, 0))
    one = TimedImplementation("x", lambda q, k, v: v, HeadShape(1, 1, 1), algorithm)  # 2 T² flops
    assert bench.batch(256) == 4
    assert bench.batch(2000) == 1
    assert not OpsBench(tokens=1, peer_work=1e-9 * 200).why_not(one, 10, FORWARD)
    assert OpsBench(tokens=1, peer_work=1e-9 * 199).why_not(one, 10, FORWARD)
    assert OpsBench(tokens=20, peer_work=1e-9 * 200).why_not(one, 10, FORWARD)
    assert OpsBench().why_not(one._replace(longest=9), 10, FORWARD)
    assert OpsBench().why_not(one._replace(multiple=4), 10, FORWARD)
    assert not OpsBench(peer_work=0).why_not(one._replace(name=OURS, longest=9), 10, FORWARD)


def row(name, length, seconds, shape=LARGE, algorithm=implementations.COMPILED):
    samples = [Sample(s, {"torch_mm": 50.0, "onednn": 100.0}) for s in seconds]
    return OpRow(
        TimedImplementation(name, lambda q, k, v: v, shape, algorithm), shape, length, 1, BOTH, samples
    )


def test_rates_of_rows():
    once = Algorithm(None, False, (1, 1, 0), (0, 0, 0))
    found = row("x", 5, [0.4, 0.8], HeadShape(1, 1, 1), once)  # 2 · 25 · 2 flops, 20 a token
    assert found.of_torch_mm == Spread(pytest.approx(0.75), 0.5, 1.0)
    assert found.of_limit == Spread(pytest.approx(0.375), 0.25, 0.5)
    assert row("fla", 5, [1.0], algorithm=None).of_limit is None


def test_targets_of_the_op():
    flops = implementations.COMPILED.flops(2048, LARGE, BOTH) / 2048
    second = flops / 50  # what a token takes at the rate of torch.mm
    rows = [
        row(OURS, 2048, [second, 2 * second]),
        row(OURS, 4096, [second, 2 * second]),
        row(OURS, 65536, [1.2 * second, 2.4 * second]),
        row(implementations.NARROW, 2048, [0.1 * second, 0.1 * second]),
        row(implementations.NARROW, 4096, [3 * second, 6 * second]),
        row(implementations.INDEXED, 2048, [0.5 * second, second]),
        row(implementations.INDEXED, 4096, [2 * second, 4 * second]),
    ]
    found = {t.what: (t.seen.median, t.met) for t in ops.op_targets(rows, CPU)}
    assert found == {
        "op: flops ÷ rate of torch.mm, forward + backward, T 2048, H8 K256 V512": (
            pytest.approx(0.75),
            True,
        ),
        "op: time of a token, forward + backward, at T 65536 ÷ at T 2048, H8 K256 V512": (
            pytest.approx(1.2),
            False,
        ),
        f"op: times faster than {implementations.NARROW}, forward + backward, at worst (T 4096, H8 K256 V512)": (
            pytest.approx(3),
            True,
        ),
        f"op: times faster than {implementations.INDEXED}, forward + backward, at worst (T 2048, H8 K256 V512)": (
            0.5,
            False,
        ),
    }


def test_flash_linear_attention_is_judged_by_head_size():
    shapes = (HeadShape(16, 64, 128), LARGE)
    ours = [row(OURS, 2048, [1.0], shape) for shape in shapes]
    fla = [row("fla", 2048, [2.0], shape, None) for shape in shapes]
    found = ops.op_targets([*ours, *fla], torch.device("meta"))
    assert [(t.least, t.met) for t in found] == [(3.0, False), (1.0, True)]


def test_targets_of_steps():
    assert Step(8, LARGE, True).state_bytes == 8 * 8 * 256 * 512 * 4
    samples = [Sample(s * 2e-6, {"update": 2 * Step(1, LARGE, True).state_bytes / 1e-6}) for s in (1, 2)]
    rows = [
        StepRow(name, step, samples)
        for name in (OURS, implementations.LOOP)
        for step in (Step(1, LARGE, True), Step(8, LARGE, True), Step(1, SMALL, False))
    ]
    found = [(t.wanted, pytest.approx(t.seen.median), t.met) for t in op_steps.step_targets(rows, CPU)]
    assert found == [("≥ 0.75", 0.375, False), ("≥ 0.75", 3.0, True), ("≤ 15", 3.0, True)]
    assert [t.wanted for t in op_steps.step_targets(rows, torch.device("meta"))] == ["≥ 0.8"]


def test_wrong_results_are_seen(monkeypatch):
    shape = HeadShape(1, 4, 4)
    monkeypatch.setattr(ops, "CHECKED", 8)
    right, *_ = found = [
        one for one in implementations_on(CPU, shape) if one.name in (OURS, implementations.REFERENCE)
    ]
    wrong = right._replace(name="wrong", forward=lambda q, k, v: right.forward(q, k, v) * 1.5)
    broken = right._replace(name="broken", forward=lambda q, k, v: right.forward(q, k, v) * math.nan)
    fails = right._replace(name="fails", forward=lambda q, k, v: 1 / 0)
    contenders = {shape: [*found, wrong, broken, fails]}
    errors, left_out = ops._errors(contenders, torch.float32, CPU, lambda _: None)
    assert left_out == ["fails cannot run H1 K4 V4 on cpu: ZeroDivisionError: division by zero"]
    assert fails not in contenders[shape]
    assert errors[OURS] < 1e-6
    assert errors["wrong"] == pytest.approx(0.5, rel=1e-3)
    assert errors["broken"] == math.inf
    assert [t.met for e in (errors[OURS], 1e-4) for t in ops.error_targets({OURS: e}, CPU)] == [True, False]


def test_too_little_memory_is_said_before(monkeypatch):
    rows = [row(OURS, 2048, []), row(OURS, 65536, [])]
    monkeypatch.setattr(ops, "free_memory", lambda _: 5e9)
    with pytest.raises(UserError, match=r"T 65536 with H8 K256 V512 takes about 9.7 GB .* 5.0 GB are free"):
        ops._check_memory(rows, OpsBench(), CPU)
    ops._check_memory(rows[:1], OpsBench(), CPU)


def test_limits_are_measured_anew_when_they_are_old():
    calls = []
    for age, times in ((1000.0, 1), (-1.0, 3)):
        calls.clear()
        limit = recent({"x": lambda: calls.append(1) or float(len(calls))}, age)["x"]
        assert [limit() for _ in range(3)][-1] == times


def test_a_stopwatch_repeats_what_is_fast():
    calls = []
    measure = stopwatch(lambda: calls.append(1), CPU, units=4)
    assert measure() < 0.01
    assert len(calls) == 1
    measure()
    assert len(calls) == 1 + 1 + 20  # one more to warm up


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds is 0; it must be at least 1"),
        ({"tokens": 0}, "tokens is 0"),
        ({"peer_work": -1.0}, "peer_work is -1.0; it must be at least 0"),
        ({"lengths": ()}, "lengths is empty"),
        ({"lengths": (512, 0)}, "lengths has an item that is 0; it must be at least 1"),
        ({"shapes": (HeadShape(8, 0, 64),)}, "shapes is '8x0x64'"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        OpsBench(**options)


def test_options_as_text():
    assert numbers("2048,512,2048", "--lengths", least=1) == [512, 2048]
    assert implementations.parse_shapes("8x256x512,16X64x128") == (LARGE, HeadShape(16, 64, 128))
    for text in ("", "512,", "2k"):
        with pytest.raises(UserError, match=f"--lengths is '{text}'; it must be whole numbers"):
            numbers(text, "--lengths", least=1)
    for text in ("", "8x256", "8x256x512x1", "a,b"):
        with pytest.raises(UserError, match=f"--shapes is '{text}'; write heads"):
            implementations.parse_shapes(text)


def test_defaults_of_devices():
    assert implementations.for_device(CPU, rounds=5) == OpsBench(rounds=5)
    gpu = implementations.for_device(torch.device("cuda"), rounds=2)
    assert (gpu.device, gpu.lengths[-1], gpu.dtype, gpu.rounds) == ("cuda", 131072, torch.bfloat16, 2)
    with pytest.raises(UserError, match="--device is 'meta'; the op is measured on 'cpu' and 'cuda'"):
        implementations.for_device(torch.device("meta"))
