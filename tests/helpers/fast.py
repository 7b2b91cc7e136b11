"""Which of many like cases `make test-fast` runs too; the whole suite runs all."""

from collections.abc import Iterable

import pytest


def few_fast(cases: Iterable, *fast) -> list:
    """Parameters of a test: all cases, of which those that are not named here, by themselves or by their ids, are slow."""
    return [case if case in fast or getattr(case, "id", None) in fast else _slow(case) for case in cases]


def _slow(case):
    if hasattr(case, "values"):  # of pytest.param
        return pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.slow])
    return pytest.param(case, marks=pytest.mark.slow)
