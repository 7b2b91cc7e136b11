"""Tests are small; one thread each keeps them quick and steady, in the processes they start as well."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# A shell starts what runs in the background deaf to Ctrl-C, and what that starts; here it is pressed.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
