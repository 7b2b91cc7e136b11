"""Any shape, cut, packing and γ, with tiles so small that little shapes have many of them."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from retnet.ops import log_decays, retention
from retnet.ops.triton import tile_table
from tests.helpers.parity import assert_same, outputs_and_gradients, random_inputs, relative

SIZES = st.sampled_from([1, 15, 16, 17, 32, 33])
GAMMA = st.one_of(st.just(1.0), st.floats(1e-4, 1.0))


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(tile_table, "WIDE_STATE", tile_table.StateTiles(16, 16, 16, 1, 1))
    monkeypatch.setattr(tile_table, "WIDE_OUT", tile_table.OutTiles(32, 16, 16, 16, 16, 1, 1))


def check(few):
    return settings(
        max_examples=few, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )


@check(16)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=4),
    heads=st.integers(1, 2),
    key_dim=SIZES,
    value_dim=SIZES,
    chunk_size=st.sampled_from([1, 16, 32, 48]),
    gamma=GAMMA,
    packed=st.booleans(),
    state=st.booleans(),
    keep_states=st.booleans(),
    data_seed=st.integers(0, 2**16),
)
def test_it_is_the_law(
    lengths, heads, key_dim, value_dim, chunk_size, gamma, packed, state, keep_states, data_seed
):
    assume(heads * key_dim * value_dim >= 8)  # a state of one number may cancel to nothing but rounding
    log_decay = log_decays(gamma, heads).double()
    shape = (heads, key_dim, value_dim)
    options = {}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)])
        inputs = random_inputs(
            1, sum(lengths), *shape, rows=len(lengths), dtype=torch.float32, seed=data_seed
        )
    else:
        inputs = random_inputs(
            min(2, len(lengths)), max(lengths), *shape, dtype=torch.float32, seed=data_seed
        )
    inputs = [*inputs[:3], inputs[3] if state else None]
    exact = [None if x is None else x.detach().double() for x in inputs]
    want = outputs_and_gradients(exact, log_decay, backend="reference", form="recurrent", **options)
    got = outputs_and_gradients(
        inputs, log_decay, backend="triton", chunk_size=chunk_size, keep_states=keep_states, **options
    )
    assert_same(got, want, 2e-6)


@check(8)
@given(
    length=st.integers(1, 70),
    cuts=st.lists(st.integers(0, 70), max_size=3),
    gamma=GAMMA,
    chunk_size=st.sampled_from([16, 48]),
    data_seed=st.integers(0, 2**16),
)
def test_cut_anywhere_and_carried(length, cuts, gamma, chunk_size, data_seed):
    q, k, v, state = (
        x.detach() for x in random_inputs(1, length, 2, 17, 16, dtype=torch.float32, seed=data_seed)
    )
    log_decay = log_decays(gamma, 2)
    want, final = retention(
        *(x.double() for x in (q, k, v)), log_decay.double(), state.double(), backend="reference"
    )
    bounds = sorted({0, length, *(c for c in cuts if c < length)})
    parts = []
    for a, b in itertools.pairwise(bounds):
        part, state = retention(
            q[:, a:b], k[:, a:b], v[:, a:b], log_decay, state, chunk_size=chunk_size, backend="triton"
        )
        parts.append(part)
    assert relative(torch.cat(parts, dim=1), want) < 2e-6
    assert relative(state, final) < 2e-6
