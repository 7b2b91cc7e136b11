import math

import numpy as np
import pytest

from retnet.evals.statistics import ByContext, Ratio


def ratio_of(y, x):
    ratio = Ratio()
    for pair in zip(y, x, strict=True):
        ratio.add(*pair)
    return ratio.estimate()


def test_one_document_has_a_value_and_no_interval():
    assert ratio_of([3.0], [2.0]) == (1.5, None, None, None)
    assert math.isnan(ratio_of([], []).value)


def test_documents_that_agree_leave_no_doubt():
    estimate = ratio_of([1.5, 3.0, 4.5], [1.0, 2.0, 3.0])
    assert estimate.value == 1.5
    assert estimate.standard_error == pytest.approx(0, abs=1e-7)


def test_equal_documents_give_the_textbook_interval_of_a_mean():
    """With x = 1 the ratio is a mean: 3.25 ± t(0.975, 3) · s/√4; 3.182446 stands in tables of t."""
    estimate = ratio_of([2.0, 3.0, 3.5, 4.5], [1, 1, 1, 1])
    error = np.std([2.0, 3.0, 3.5, 4.5], ddof=1) / 2
    assert estimate.value == 3.25
    assert estimate.standard_error == pytest.approx(error, rel=1e-12)
    assert estimate.high - 3.25 == pytest.approx(3.182446 * error, rel=1e-6)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Twenty documents of very different lengths, tokens that depend on each other: 95 % of intervals hold the truth."""
    chance = np.random.default_rng(0)
    rounds, covered = 2000, 0
    for _ in range(rounds):
        tokens = chance.integers(20, 400, size=20)
        level = chance.normal(2.0, 0.3, size=20)  # each document is easy or hard as a whole
        nats = level * tokens + chance.normal(0, 1, size=20) * np.sqrt(tokens)
        estimate = ratio_of(nats, tokens)
        covered += estimate.low <= 2.0 <= estimate.high
    assert 0.925 <= covered / rounds <= 0.97


def test_buckets_of_context():
    by_context = ByContext()
    by_context.add(np.arange(1.0, 10.0), 1)  # contexts 1 … 9
    by_context.add(np.array([100.0]), 1024)
    by_context.add(np.array([200.0]), 1025)
    rows = [tuple(row) for row in by_context.rows()]
    assert rows == [
        (1, 1, 1, 1.0),
        (2, 2, 1, 2.0),
        (3, 4, 2, 3.5),
        (5, 8, 4, 6.5),
        (9, 16, 1, 9.0),
        (513, 1024, 1, 100.0),
        (1025, 2048, 1, 200.0),
    ]
