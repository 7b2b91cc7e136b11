"""What sharded checkpoints say of what goes wrong; tests/train has those that processes write."""

import errno
import os
from concurrent.futures import Future

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from retnet.model import sharded
from retnet.model.checkpoint import write_checkpoint
from retnet.model.safetensors_files import save_tensors
from retnet.model.sharded import SavedTensors, failure, local_part
from retnet.settings import UserError

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failed(*failures) -> BaseException:
    future = Future()
    future.set_exception(CheckpointException("write", {rank: (error, None) for rank, error in failures}))
    return failure(future, "write the checkpoint of step 4", lambda: "step-00000002 is whole")


def test_an_error_of_files_is_one_sentence_that_names_the_first_process_that_met_it():
    found = failed((5, OSError("later")), (3, FULL))
    assert isinstance(found, UserError)
    says = "cannot write the checkpoint of step 4: process 3: No space left on device; step-00000002 is whole"
    assert str(found) == says
    mistake = UserError("a weight is not finite")
    assert failed((1, mistake)) is mistake


def test_a_bug_is_no_mistake_of_the_user_and_keeps_the_traceback_of_its_process():
    bug = AssertionError("numbers are in none of its files")
    assert failed((1, bug)) is bug
    assert isinstance(bug.__cause__, CheckpointException)


def test_reading_names_no_process_for_each_reads_for_itself(tmp_path, monkeypatch):
    x = torch.ones(3)
    write_checkpoint(tmp_path / "c", {"model.safetensors": lambda path: save_tensors({"x": x}, path)})
    saved = SavedTensors(tmp_path / "c", "model")

    def load(*_, **__):
        raise CheckpointException("read", {0: (EOFError(), None)})

    monkeypatch.setattr(sharded, "load", load)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with pytest.raises(UserError, match=r"cannot read the checkpoint \S+/c: it ends too early; take another"):
        saved.read({"x": local_part(x)})
