"""Gated retention in the kernels: decays by token, against the law in fp64."""

import itertools

import pytest
import torch

from retnet.ops import reference
from retnet.ops.triton import tile_table
from tests.helpers.parity import (
    assert_confined,
    assert_same,
    outputs_and_gradients,
    random_inputs,
    relative,
    token_decays,
)


@pytest.mark.parametrize(
    ("dtype", "unit", "lengths"),
    [(torch.float32, 3e-6, None), (torch.bfloat16, 2e-2, [0, 33, 1, 50, 0])],
    ids=["fp32, rows", "bf16, packed"],
)
def test_it_is_the_law(dtype, unit, lengths, seed, monkeypatch):
    """Chunks of several blocks of tokens, of which the last is not whole."""
    monkeypatch.setattr(tile_table, "WIDE_STATE", tile_table.StateTiles(16, 16, 16, 1, 1))
    monkeypatch.setattr(tile_table, "WIDE_OUT", tile_table.OutTiles(32, 16, 16, 16, 16, 1, 1))
    T = 84
    inputs = random_inputs(1, T, 2, 17, 20, dtype=dtype, rows=lengths and len(lengths), seed=seed)
    decays = token_decays(1, T, 2, dtype=torch.float32, seed=seed)
    options = {} if lengths is None else {"cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)])}
    exact = [x.detach().double() for x in inputs]
    law = decays.detach().double().requires_grad_()
    want = outputs_and_gradients(exact, law, backend="reference", form="recurrent", **options)
    got = outputs_and_gradients(inputs, decays, backend="triton", chunk_size=48, **options)
    assert_same(got, want, unit)


def test_what_is_no_number_stays_in_its_document():
    assert_confined("triton", torch.float32, 3e-6)


def test_steps(seed):
    q, k, v, _ = (x.detach() for x in random_inputs(3, 4, 2, 16, 24, dtype=torch.float32, seed=seed))
    decays = token_decays(3, 4, 2, dtype=torch.float32, seed=seed).detach()
    pool, slots = torch.randn(5, 2, 16, 24), torch.tensor([4, -1, 0])
    exact, wanted = [x.double() for x in (q, k, v, decays)], pool.double()
    got = torch.ops.retnet.retention_step_triton(q, k, v, decays, pool, slots, 0.5)
    for t in range(4):
        want = reference.retention_step(*(x[:, t] for x in exact), wanted, slots, 0.5)
        assert relative(got[:, t], want) < 1e-6
    assert relative(pool, wanted) < 1e-6
