"""The dispatch table: which cell of an op's row runs, and what is said where none can."""

import pytest
import torch

from retnet.ops.dispatch import BACKENDS, TABLE, Implementation, Op

X = torch.zeros(1)


def named(name):
    return lambda x: name


def op(monkeypatch, **cells):
    monkeypatch.setattr("retnet.ops.dispatch.TABLE", {})
    return Op("toy", **cells)


def test_auto_takes_the_first_that_can_and_is_not_slow(monkeypatch):
    toy = op(
        monkeypatch,
        triton=Implementation(named("triton"), unfit=lambda x: "no GPU"),
        numba=Implementation(named("numba"), slow=lambda x: "too few numbers"),
        reference=Implementation(named("reference")),
    )
    assert toy.choose("auto", X)(X) == "reference"
    assert toy.choose("numba", X)(X) == "numba"  # slow, but asked for


def test_what_cannot_run_says_why(monkeypatch):
    toy = op(
        monkeypatch,
        triton=Implementation(named("triton"), unfit=lambda x: "no GPU"),
        numba=Implementation(named("numba"), unfit=lambda x: "no numba"),
    )
    with pytest.raises(
        ValueError, match=r"backend 'triton' cannot run toy: no GPU; or use backend 'auto' or"
    ):
        toy.choose("triton", X)(X)
    with pytest.raises(
        ValueError, match=r"'torch' cannot run toy: its row of the table has no such cell; or"
    ):
        toy.choose("torch", X)(X)
    with pytest.raises(ValueError, match="no backend can run toy: triton: no GPU; numba: no numba"):
        toy.choose("auto", X)(X)


def test_every_row_has_the_law():
    assert TABLE
    for row in TABLE.values():
        assert "reference" in row.implementations
        assert set(row.implementations) < set(BACKENDS)
