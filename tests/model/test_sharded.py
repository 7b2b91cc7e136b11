"""What sharded checkpoints say of what goes wrong; tests/train has those that processes write."""

import errno
import os
from concurrent.futures import Future
from threading import Event

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

from retnet.model import sharded
from retnet.model.checkpoint import write_checkpoint
from retnet.model.checkpoint_layout import part_file
from retnet.model.safetensors_files import save_tensors
from retnet.model.sharded import PartWriter, SavedTensors, failure, local_part
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


@pytest.fixture
def writer():
    """Of one process, which is a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = PartWriter(dist.group.WORLD)
    yield found
    found.close()
    dist.destroy_process_group()


def test_what_changes_once_it_is_copied_does_not_show(writer, tmp_path):
    """Twice, for the second checkpoint has the memory of the first; parts of one memory, and numbers, are no exception."""
    memory, step = torch.randn(4, 50), torch.tensor(1.0)
    parts = {"a": local_part(memory[1:]), "b": local_part(memory.mT), "step": local_part(step)}
    for name in ("one", "two"):
        made, changed, sums = Event(), Event(), {}
        path, want = tmp_path / name, {name: part.tensor.clone() for name, part in parts.items()}

        def begin(path=path, made=made):
            made.wait(60)
            path.mkdir()

        writing = writer.write(
            path,
            {"model": parts},
            begin=begin,
            check=lambda tensors, changed=changed: changed.wait(60),
            finish=sums.update,
        )
        assert not writing.copied.wait(0.05)
        made.set()
        assert writing.copied.wait(60)
        assert not writing.complete.done()
        memory.add_(1)
        step.add_(1)
        changed.set()
        writing.complete.result()
        file = part_file(0, "model")
        assert list(sums) == [file]
        got = load_file(path / file)
        assert got.keys() == {f"model/{name}" for name in want}
        assert all(torch.equal(got[f"model/{name}"], x) for name, x in want.items())


def test_nobody_waits_for_a_copy_that_comes_to_nothing(writer, tmp_path):
    def full():
        raise FULL

    held = {"model": {"x": local_part(torch.ones(3))}}
    writing = writer.write(tmp_path, held, begin=full, check=lambda _: None, finish=lambda _: None)
    assert writing.copied.wait(60)
    assert str(failure(writing.complete, "write it", lambda: "all is well")) == (
        "cannot write it: process 0: No space left on device; all is well"
    )
