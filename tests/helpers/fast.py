"""Which of many like cases `make test-fast` runs too; the whole suite runs all."""

from collections.abc import Iterable

import pytest


def few_fast(cases: Iterable, *fast) -> list:
    """Parameters of a test: all cases, of which those that are not named here, by their ids if they have some, are slow."""
    return [case if (case.id if _is_param(case) else case) in fast else _slow(case) for case in cases]


def _is_param(case):
    return hasattr(case, "marks")  # of pytest.param


def _slow(case):
    if _is_param(case):
        return pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.slow])
    return pytest.param(case, marks=pytest.mark.slow)
