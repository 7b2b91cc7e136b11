"""The permutation behind the order of training."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.data.order import permute


def order(size, seed=0, epoch=0):
    return permute(np.arange(size, dtype=np.uint64), size, seed, np.full(size, epoch, np.uint64))


@settings(deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
def test_every_index_goes_to_a_place_of_its_own(size, seed, epoch):
    assert sorted(order(size, seed, epoch).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 15, 16, 17, 255, 256, 257, 65535, 65537])
def test_sizes_around_powers_of_two(size):
    assert sorted(order(size).tolist()) == list(range(size))


@settings(deadline=None)
@given(size=st.integers(2**32, 2**62), start=st.integers(0, 2**31), seed=st.integers(0, 2**63))
def test_huge_sizes_stay_inside_and_do_not_collide(size, start, seed):
    index = np.arange(start, start + 200, dtype=np.uint64)
    values = permute(index, size, seed, np.zeros(200, np.uint64)).tolist()
    assert len(set(values)) == 200
    assert max(values) < size


def test_seeds_and_epochs_give_different_orders():
    orders = {tuple(order(100, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_epochs_may_be_mixed_in_one_call():
    index = np.array([3, 3, 7], np.uint64)
    mixed = permute(index, 50, 9, np.array([0, 4, 2], np.uint64))
    assert mixed.tolist() == [order(50, 9, 0)[3], order(50, 9, 4)[3], order(50, 9, 2)[7]]


def test_the_order_never_changes_between_versions():
    assert order(10, seed=1234, epoch=5).tolist() == [9, 8, 5, 2, 1, 4, 3, 6, 0, 7]


def test_it_looks_shuffled():
    """Neighbours must not stay neighbours, nor may any place be favoured: 4000 epochs of 8 places, chi-squared."""
    size, epochs = 8, 4000
    epoch = np.repeat(np.arange(epochs, dtype=np.uint64), size)
    values = permute(np.tile(np.arange(size, dtype=np.uint64), epochs), size, 1, epoch).reshape(epochs, size)
    counts = np.stack([np.bincount(values[:, place].astype(int), minlength=size) for place in range(size)])
    expected = epochs / size
    assert ((counts - expected) ** 2 / expected).sum() < 100  # 49 degrees of freedom: p < 1e-4
    follows = (values[:, 1:] == values[:, :-1] + 1).mean()
    assert abs(follows - 1 / size) < 0.02
    assert abs(np.corrcoef(np.arange(5000), order(5000).astype(float))[0, 1]) < 0.05
