"""The compiled products and state update of decoding against torch's operators."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from retnet.ops import product, retention_step
from retnet.ops.cpu import decode, jit, openmp, skinny_gemm
from tests.helpers.parity import relative

numba = pytest.importorskip("numba")


def parts_alone(monkeypatch):
    """Without numba: everything is composed of torch's operators."""
    monkeypatch.setattr(decode, "_kernels", lambda _: None)


@pytest.mark.parametrize("rows", [1, 3, 9, 64, 65])
def test_product(rows):
    x, weight = torch.randn(rows, 130), torch.randn(513, 130)
    with torch.no_grad():
        assert relative(product(x, weight), F.linear(x, weight)) < 1e-5
        assert torch.equal(product(x[None], weight)[0], product(x, weight)) or rows > decode.MAX_ROWS
        strided = torch.randn(rows, 260)[:, ::2]
        assert relative(product(strided, weight), F.linear(strided, weight)) < 1e-5
        strided = torch.randn(513, 260)[:, ::2]
        assert relative(product(x, strided), F.linear(x, strided)) < 1e-5


def int8(weight):
    """Codes and scales of a weight."""
    scale = weight.abs().amax(1) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


@pytest.mark.parametrize("rows", [1, 4, 9, 64, 65])
def test_product_with_int8_weights(rows, monkeypatch):
    x = torch.randn(rows, 131)
    codes, scale = int8(torch.randn(513, 131) * torch.logspace(-3, 3, 513)[:, None])
    weight = codes.double() * scale.double()[:, None]
    want, size = F.linear(x.double(), weight), F.linear(x.double().abs(), weight.abs())
    with torch.no_grad():
        assert (decode.no_skinny_gemm(x, codes, scale) is None) == (rows <= decode.MAX_ROWS)
        for _ in range(2):
            got = product(x, codes, scale)
            assert ((got - want).abs() <= 1e-6 * size).all()  # each row by its own measure
            strided = product(torch.stack((x, x), -1)[..., 0], codes.t().contiguous().t(), scale)
            assert relative(strided, want) < 1e-5
            parts_alone(monkeypatch)


SIZES = [
    (513, 130),
    (200, 131),
    (130, 400),
]  # rows and columns that fill no tile and no panel, and some that do


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_a_row_of_a_product_is_the_same_bits_in_any_company(size, kind):
    weight = torch.randn(size)
    weights = (weight,) if kind == "fp32" else int8(weight)
    x = torch.randn(64, size[1])
    with torch.no_grad():
        alone = torch.cat([decode.skinny_gemm(row[None], *weights) for row in x])
        for rows in range(2, 65):
            order = torch.randperm(64)[:rows]
            assert torch.equal(decode.skinny_gemm(x[order], *weights), alone[order]), f"{rows} rows"


@pytest.mark.slow
def test_tiles_for_a_cpu_without_avx512_give_the_same_bits(monkeypatch):
    weights, x = int8(torch.randn(513, 130)), torch.randn(8, 130)
    with torch.no_grad():
        want = decode.skinny_gemm(x, *weights)
        monkeypatch.setattr(skinny_gemm, "has_feature", lambda _: False)
        monkeypatch.setattr(skinny_gemm, "MAX_ROWS", len(x))
        compiler = jit.compiler()
        kernel = skinny_gemm.compile_product(compiler, skinny_gemm.compile_skinny_gemm(compiler, np.int8))
        monkeypatch.setattr(decode, "_kernels", lambda _: decode.DecodeKernels(kernel, None))
        for rows in range(1, 9):
            assert torch.equal(decode.skinny_gemm(x[:rows], *weights), want[:rows]), f"{rows} rows"


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
        assert decode.no_skinny_gemm(torch.randn(1, 130), *WRONG[wrong](weight, *int8(weight))) is not None


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
        assert jit._compiler.__wrapped__()[0] is None
    assert "pip install 'retnet[fast]'" in caplog.text


def test_large_pages_change_no_number_and_no_address(monkeypatch):
    x, asked = torch.randn(3 << 20), []
    want, address = x.clone(), x.data_ptr()
    openmp.in_large_pages([x, None, torch.empty(0)])
    assert (x.data_ptr(), x.nbytes) == (address, 12 << 20)
    assert torch.equal(x, want)

    class System:
        def madvise(self, start, length, advice):
            asked.append((start.value, length.value))
            return -1  # refused, as by an old system

    monkeypatch.setattr(openmp, "_libc", System)
    openmp.in_large_pages([x, x[:100]])
    assert asked == [(start, 1 << 21) for start in range(address >> 21 << 21, address + x.nbytes, 1 << 21)]
    monkeypatch.setattr(openmp, "LARGE_PAGES", 2)
    asked.clear()
    openmp.in_large_pages([x])
    assert len(asked) == 2
    monkeypatch.setattr(openmp.sys, "platform", "darwin")
    openmp.in_large_pages([x])
    assert len(asked) == 2


def test_zeros_in_large_pages_stay_zeros_where_they_are(monkeypatch):
    x, asked = torch.zeros(3 << 20), []
    address, small = x.data_ptr(), torch.ones(100)
    openmp.zeros_in_large_pages([x, small])
    assert x.data_ptr() == address
    assert not x.any()
    assert small.all()

    class System:
        def madvise(self, start, length, advice):
            asked.append((start.value, start.value + length.value, advice))

    monkeypatch.setattr(openmp, "_libc", System)
    openmp.zeros_in_large_pages([x, small])
    begin, end = -(-address >> 21 << 21), address + x.nbytes >> 21 << 21  # whole pages of its own
    assert asked == [(begin, end, 4), (begin, end, 14)]  # MADV_DONTNEED, MADV_HUGEPAGE


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
