"""The compiled kernels and the loops they replace are the same function; `test_retention` holds both to the law."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from retnet.ops import log_decays
from retnet.ops.cpu import chunkwise_numba, jit
from retnet.ops.cpu.gemm import ALL, LOWER_LEFT, LOWER_RESULT, UPPER_LEFT, compile_packed_gemm
from tests.helpers.fast import few_fast
from tests.helpers.parity import assert_same, outputs_and_gradients, random_inputs

pytest.importorskip("numba")


# widths that fill registers and widths that do not, one head and more than a thread keeps at hand
@pytest.mark.parametrize(("H", "K", "V"), [(1, 1, 1), (5, 60, 100), (2, 64, 128), (3, 33, 31)])
@pytest.mark.parametrize("chunk", few_fast([1, 16, 50, 64, 200], 1, 50, 200))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kernels_equal_the_loops(H, K, V, chunk, dtype):
    inputs = random_inputs(2, 130, H, K, V, dtype=dtype)
    got, want = (
        outputs_and_gradients(inputs, log_decays("paper", H), chunk_size=chunk, backend=backend)
        for backend in ("numba", "torch")
    )
    assert_same(got, want, {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype])


def test_a_result_does_not_depend_on_the_number_of_threads():
    inputs = random_inputs(2, 200, 5, 16, 48, dtype=torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(inputs, log_decays("paper", 5), backend="numba"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[name], x) for name, x in results[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("number", [np.float32, np.float64])
def test_products_of_panels(number):
    compiler = jit.compiler()
    assert compiler is not None
    panels = compile_packed_gemm(compiler, number)
    rng = np.random.default_rng(0)
    elsewhere = np.zeros((9, 2, 30), number)  # what products fetch must not show in them, wherever it lies
    fetch = (panels.rows(elsewhere, 4, 3, 1), (0, 8, 100, 1000))

    def matrix(rows, columns):
        x = rng.standard_normal((rows, 1, columns)).astype(number)
        made = panels.view(panels.empty(1, rows, columns)[0], rows, columns)
        made[:] = np.nan
        panels.load(made, x, 0, rows, 0, np.ones(rows, number))
        return x[:, 0], made

    def content(made, rows, columns):
        x = np.full((rows, 1, columns), np.nan, number)
        panels.store(made, x, 0, rows, 0, False)
        return x[:, 0]

    for (M, N, inner), transpose, beta in itertools.product(
        [(5, 7, 3), (32, 64, 40), (70, 33, 65)], [False, True], [0.0, 0.5]
    ):
        a, in_panels = matrix(inner, M) if transpose else matrix(M, inner)
        b, right = matrix(inner, N)
        c, result = matrix(M, N)
        panels.product(in_panels, transpose, right, result, beta, ALL, fetch)
        want = (a.T if transpose else a) @ b + beta * c
        assert np.abs(content(result, M, N) - want).max() < 1e-5 * inner

    lower = np.tril(rng.standard_normal((40, 40))).astype(number)
    left = panels.view(panels.empty(1, 40, 40)[0], 40, 40)
    panels.load(left, lower[:, None], 0, 40, 0, np.ones(40, number))
    b, right = matrix(40, 20)
    for part, transpose, want in ((LOWER_LEFT, False, lower @ b), (UPPER_LEFT, True, lower.T @ b)):
        _, result = matrix(40, 20)
        panels.product(left, transpose, right, result, 0.0, part, fetch)
        assert np.abs(content(result, 40, 20) - want).max() < 1e-4
    a, in_panels = matrix(40, 24)
    b, right = matrix(24, 40)
    _, result = matrix(40, 40)
    panels.product(in_panels, False, right, result, 0.0, LOWER_RESULT, fetch)
    assert np.abs(np.tril(content(result, 40, 40) - a @ b)).max() < 1e-4


@pytest.mark.slow
def test_another_process_finds_the_kernels_on_disk():
    assert chunkwise_numba._kernels(torch.float32) is not None
    code = (
        "import torch; from retnet.ops.cpu import chunkwise_numba; kernels = chunkwise_numba._kernels(torch.float32);"
        "print([kernel.cache_hits for kernel in kernels])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[1, 1]"
