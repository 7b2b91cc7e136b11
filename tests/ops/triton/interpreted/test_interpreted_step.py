"""The decoding step: in place, on slots, one token or several, against the law in fp64."""

import pytest
import torch

from retnet.ops import reference, retention
from tests.helpers.parity import random_inputs, relative

UNIT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
step = torch.ops.retnet.retention_step_triton


def tokens(B, T, H, K, V, dtype, seed):
    """q, k, v [B,T,H,·], an exact copy of them, ln γ, and a pool of states."""
    narrow = [x.detach() for x in random_inputs(B, T, H, K, V, dtype=dtype, seed=seed)[:3]]
    log_decay = torch.tensor([1.0, 0.9, 0.5, 1e-3], dtype=torch.float64)[:H].log()
    pool = torch.randn(7, H, K, V, generator=torch.Generator().manual_seed(seed))
    return narrow, [x.double() for x in narrow], log_decay, pool


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("K", "V", "dtype"),
    [
        (256, 512, torch.bfloat16),
        (60, 100, torch.float16),
        (128, 256, torch.float32),
        (1, 3, torch.float32),
        (100, 513, torch.bfloat16),
    ],
    ids=str,
)
def test_slots(K, V, dtype, index, seed):
    """Slots out of order, padding among them; every other row of the pool stays as it is, to the bit."""
    narrow, exact, log_decay, pool = tokens(5, 1, 2, K, V, dtype, seed)
    slots = torch.tensor([6, -1, 0, -1, 3], dtype=index)
    wanted, before = pool.double(), pool.clone()
    got = step(*(x[:, 0] for x in narrow), log_decay.float(), pool, slots, 0.5)
    want = reference.retention_step(*(x[:, 0] for x in exact), log_decay, wanted, slots, 0.5)
    assert got.dtype == dtype
    assert relative(got, want) < UNIT[dtype]
    assert relative(pool, wanted) < 1e-6  # the state is fp32, whatever the tokens are
    assert not got[slots < 0].any()
    assert torch.equal(pool[[1, 2, 4, 5]], before[[1, 2, 4, 5]])


def test_without_slots_row_b_has_state_b(seed):
    narrow, exact, log_decay, pool = tokens(3, 1, 3, 20, 40, torch.float32, seed)
    wanted, before = pool.double(), pool.clone()
    got = step(*(x[:, 0] for x in narrow), log_decay.float(), pool, None, 0.5)
    assert (
        relative(got, reference.retention_step(*(x[:, 0] for x in exact), log_decay, wanted, None, 0.5))
        < 1e-6
    )
    assert relative(pool, wanted) < 1e-6
    assert torch.equal(pool[3:], before[3:])


def test_the_state_stays_where_it_is(seed):
    narrow, _, log_decay, pool = tokens(2, 1, 2, 16, 16, torch.float32, seed)
    where = pool.data_ptr()
    step(*(x[:, 0] for x in narrow), log_decay.float(), pool, None, 0.5)
    assert pool.data_ptr() == where


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 2, 9])
def test_several_tokens_on_slots_are_single_tokens_in_turn(T, dtype, seed):
    narrow, exact, log_decay, pool = tokens(4, T, 2, 30, 50, dtype, seed)
    slots = torch.tensor([5, 2, -1, 0], dtype=torch.int32)
    wanted = pool.double()
    got = step(*narrow, log_decay.float(), pool, slots, 0.5)
    singles = [
        reference.retention_step(*(x[:, t] for x in exact), log_decay, wanted, slots, 0.5) for t in range(T)
    ]
    assert relative(got, torch.stack(singles, dim=1)) < UNIT[dtype]
    assert relative(pool, wanted) < 1e-6


def test_a_prompt_in_pieces_then_steps_equal_the_whole(seed):
    """Chunked prefill from a state, a few tokens at once, then one by one: the state passes between kernels."""
    narrow, exact, log_decay, _ = tokens(2, 60, 2, 32, 48, torch.float32, seed)
    want, final = retention(*exact, log_decay, backend="reference")
    parts, state = [], None
    for piece in (slice(0, 23), slice(23, 24), slice(24, 55)):
        part, state = retention(*(x[:, piece] for x in narrow), log_decay.float(), state, backend="triton")
        parts.append(part)
    scale = 32**-0.5
    parts.append(step(*(x[:, 55:58] for x in narrow), log_decay.float(), state, None, scale))
    for t in (58, 59):
        parts.append(step(*(x[:, t] for x in narrow), log_decay.float(), state, None, scale)[:, None])
    assert relative(torch.cat(parts, dim=1), want) < 1e-6
    assert relative(state, final) < 1e-6


def test_a_slice_of_a_wider_projection(seed):
    narrow, exact, log_decay, pool = tokens(3, 1, 2, 16, 24, torch.float32, seed)
    wanted = pool.double()
    q, k, v = torch.cat(narrow, dim=-1)[:, 0].split([16, 16, 24], dim=-1)
    assert not q.is_contiguous()
    got = step(q, k, v, log_decay.float(), pool, None, 0.5)
    assert (
        relative(got, reference.retention_step(*(x[:, 0] for x in exact), log_decay, wanted, None, 0.5))
        < 1e-6
    )


def test_a_slot_that_is_not_there_gives_nan_and_touches_nothing(seed):
    narrow, _, log_decay, pool = tokens(3, 2, 2, 16, 16, torch.float32, seed)
    before = pool.clone()
    got = step(*narrow, log_decay.float(), pool, torch.tensor([7, -2, -1]), 0.5)
    assert got[:2].isnan().all()
    assert not got[2].any()
    assert torch.equal(pool, before)


def test_nothing_to_do():
    pool = torch.zeros(2, 2, 16, 16)
    none = torch.zeros(0, 2, 16)
    assert step(none, none, none, torch.zeros(2), pool, None, 0.5).shape == (0, 2, 16)
    none = torch.zeros(2, 0, 2, 16)
    assert step(none, none, none, torch.zeros(2), pool, None, 0.5).shape == (2, 0, 2, 16)
