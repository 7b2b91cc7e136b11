"""Pickles: data is read, everything else is refused, and nothing is ever run."""

import argparse
import pickle

import pytest
import torch

from retnet.convert import read
from retnet.settings import UserError
from tests.helpers.checkpoints import TORCHSCALE, Payload, save_torchscale, torchscale_weights


@pytest.mark.parametrize(
    "write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))], ids=["zip", "raw"]
)
def test_a_malicious_pickle_runs_nothing(write, tmp_path):
    target, file = tmp_path / "pwned", tmp_path / "checkpoint.pt"
    write({"model": torchscale_weights(TORCHSCALE), "args": Payload(target)}, file)
    with pytest.raises(
        UserError, match=r"was refused and nothing in it was run: it holds (posix.system|more than data)"
    ):
        read(file)
    assert not target.exists()


def test_a_malicious_pickle_among_the_arguments_of_a_namespace(tmp_path):
    target = tmp_path / "pwned"
    args = argparse.Namespace(**TORCHSCALE, evil=Payload(target))
    source = save_torchscale(tmp_path / "a", torchscale_weights(TORCHSCALE), cfg=args)
    with pytest.raises(UserError, match=r"was refused and nothing in it was run: it holds posix.system"):
        read(source)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no readable checkpoint"),
        (b"garbage", "was refused|is no readable checkpoint"),
        (None, "is no readable checkpoint"),  # the first half of a good one
        ([1, 2], r"holds a list, not a dictionary"),
        ({}, "holds no weights: .* this file has nothing"),
        ({"state": {"a": 1}}, "holds no weights: .* this file has 'state'"),
        ({"model": {"a": 1, 2: torch.zeros(1)}}, "holds no weights: .*not tensors: a, 2"),
    ],
)
def test_files_that_are_no_checkpoints(content, message, tmp_path):
    file = tmp_path / "checkpoint.pt"
    if content is None:
        torch.save({"model": torchscale_weights(TORCHSCALE)}, file)
        content = file.read_bytes()[: file.stat().st_size // 2]
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(UserError, match=message) as error:
        read(file)
    assert "weights_only" not in str(error.value)  # no advice to unpickle it
