"""These tests run Triton's interpreter, which is chosen by an environment variable when the kernels are decorated.

So they have a process of their own: `tests/ops/triton/test_interpreted.py` starts it, and without the variable nothing
here is collected. By hand: `TRITON_INTERPRET=1 python -m pytest tests/ops/triton/interpreted`.
"""

import os
import secrets

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from tests.ops.triton.interpreted import bf16

    bf16.install()


@pytest.fixture
def seed():
    """A new one every time, shown where a test fails; RETNET_SEED repeats it."""
    chosen = int(os.environ.get("RETNET_SEED") or secrets.randbits(31))
    print(f"RETNET_SEED={chosen} repeats this")
    return chosen


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that nobody wrote is NaN, so that whoever reads it shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
