"""exp, SiLU and GELU of the compiled decoder against fp64."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from retnet.ops.cpu.jit import compiler
from tests.helpers.fast import few_fast

pytest.importorskip("numba")


@pytest.mark.parametrize("name", few_fast(["silu", "gelu"], "silu"))
def test_every_size_of_number(name):
    from retnet.ops.cpu.activations import compile_activations

    made = compiler()
    function = getattr(compile_activations(made), name)

    @made.function
    def every(x, y):
        for i in range(len(x)):
            y[i] = function(x[i])

    x = torch.cat(
        [torch.linspace(-20, 20, 20001), torch.tensor([-1e30, -100.0, -1e-30, 0.0, 1e-30, 100.0, 1e30])]
    )
    y = torch.empty_like(x)
    every(x.numpy(), y.numpy())
    want = getattr(F, name)(x.double())
    assert ((y - want).abs() <= 1e-6 * want.abs() + 1e-7).all()
    (code,) = every.inspect_llvm().values()
    assert re.search(r"fdiv.* <\d+ x float>", code), "one number at a time"
    every(np.full(3, np.nan, np.float32), y.numpy())
    assert y[:3].isnan().all()
