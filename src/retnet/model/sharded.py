"""Sharded checkpoints: PyTorch's distributed checkpoint (DCP), all of it behind this module.

Every process writes what it holds of the tensors into safetensors of its own, whose headers say where in the whole tensors
that lies; every process reads what it needs, however the tensors were cut (resharding). There is no metadata beside them:
DCP's own format has a pickle (`.metadata`), its Hugging Face storage, which is used here, has not.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor

from retnet.errors import UserError, file_errors, reason_of, told
from retnet.io import flush
from retnet.model.checkpoint_layout import (
    KINDS,
    Entry,
    TensorPart,
    entry,
    is_sharded,
    part_file,
    tensor_files,
)
from retnet.model.safetensors_files import save_tensors
from retnet.ops.torch_private import begin_of_part

Held = Mapping[str, Mapping[str, TensorPart]]  # kind → name → part


def local_part(x: Tensor) -> TensorPart:
    """What this process holds of a tensor: of a DTensor its piece, of any other all."""
    if not isinstance(x, DTensor):
        return TensorPart(x.detach(), tuple(x.shape), (0,) * x.dim())
    return TensorPart(x.to_local().detach(), tuple(x.shape), begin_of_part(x))


class SavedTensors:
    """The tensors of one kind in a checkpoint of several processes, or of one.

    Args:
        path: the checkpoint, verified.
        kind: of `KINDS`.

    Attributes:
        shapes: by name, of the whole tensors.

    Raises:
        UserError: a file that cannot be read.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self._path, self._prefix = path, f"{kind}/" if is_sharded(path) else ""
        files = tensor_files(path, kind)
        with told(f"read the checkpoint {path}", "take another one"):
            self._reader = _PartFilesReader(path, files)
        saved = cast(dict[str, TensorStorageMetadata], self._reader.read_metadata().state_dict_metadata)
        self._saved = {name.removeprefix(self._prefix): found for name, found in saved.items()}
        self.shapes = {name: tuple(found.size) for name, found in self._saved.items()}

    def read(self, into: Mapping[str, TensorPart]) -> None:
        """Copies saved numbers into parts of tensors. All names and shapes must be those of `shapes`.

        Raises:
            UserError: a file that cannot be read.
        """
        parts = {self._prefix + name: part for name, part in into.items()}
        tensors: dict[str, Any] = {name: part.tensor for name, part in parts.items()}
        with warnings.catch_warnings():  # each process reads for itself, and is told so
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            try:
                load(tensors, storage_reader=self._reader, planner=_PartLoadPlanner(parts), no_dist=True)
            except CheckpointException as error:  # of this process, which reads for itself
                _, first = _first(error)
                raise _mistake(first, f"read the checkpoint {self._path}", "take another one") from error

    def whole(self) -> dict[str, Tensor]:
        """All tensors, put together in this process's memory."""
        found = {
            name: torch.empty(saved.size, dtype=saved.properties.dtype) for name, saved in self._saved.items()
        }
        self.read({name: local_part(x) for name, x in found.items()})
        return found


class PartWriting(NamedTuple):
    """A checkpoint that `PartWriter` writes."""

    copied: Event  # until then its tensors must stay as they are; set too where it fails
    complete: Future[Any]  # its error is for `failure`


class PartWriter:
    """Writes checkpoints of several processes while they go on: a thread of each copies what it writes, and writes that.

    Args:
        group: of all of them, on the CPU, that nothing else uses: DCP speaks over it from its threads.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        gpu = torch.cuda.is_available()
        # keeps its copies' memory for the next checkpoint
        self._stager = DefaultStager(StagingOptions(gpu, False, False, gpu))
        self._stream = torch.Stream() if gpu else None  # beside that which computes

    def write(
        self,
        path: Path,
        held: Held,
        *,
        begin: Callable[[], None],
        check: Callable[[Mapping[str, Tensor]], None],
        finish: Callable[[Mapping[str, Entry]], None],
    ) -> PartWriting:
        """Begins to write what this process holds; all must call it, none before the last is written.

        Args:
            path: the folder that files are written into.
            held: by kind and name. What several hold alike, one of them copies and writes.
            begin: makes the folder; called in the first process.
            check: raises an error if the tensors that this process is about to write, by ``KIND/NAME``, are not to be saved.
            finish: completes the checkpoint, of which it is given the files with sizes and hashes; called in the first
                process when all have written.
        """
        parts = {f"{kind}/{name}": part for kind, named in held.items() for name, part in named.items()}
        ready = None if self._stream is None else torch.accelerator.current_stream().record_event()
        copied = Event()

        def copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            with self._stream or nullcontext():
                if ready is not None:
                    ready.wait()  # the step that was made last
                copies = cast("dict[str, Tensor]", self._stager.stage(tensors))
            copied.set()
            return copies

        thread = ThreadPoolExecutor(1, "retnet-checkpoint")  # for this one: its OpenMP team ends with it
        complete = thread.submit(
            save,
            {name: part.tensor for name, part in parts.items()},
            storage_writer=_PartFilesWriter(path, copy, begin, check, finish),
            planner=_PartSavePlanner(parts),
            process_group=self._group,
        )
        complete.add_done_callback(lambda _: copied.set())
        thread.shutdown(wait=False)
        return PartWriting(copied, complete)

    def close(self) -> None:
        """Gives back the memory of copies; nothing may be under way."""
        self._stager.close()


def failure(future: Future[Any], doing: str, whole: Callable[[], str]) -> BaseException | None:
    """What went wrong with a checkpoint that is written or failed: the same on all processes.

    Args:
        future: as `PartWriter.write` returned it; waited for.
        doing: what was done, for the message.
        whole: says what is still whole, for the message.

    Returns:
        A `UserError` where a process met a user's mistake or an error of files; another error as it is; None if all is well.
    """
    error = future.exception()
    if not isinstance(error, CheckpointException):
        return error
    rank, first = _first(error)
    found = _mistake(first, doing, whole(), f"process {rank}: ")
    found.__cause__ = error  # which has the traceback of that process
    return found


def _first(error: CheckpointException) -> tuple[int, BaseException]:
    """The first of the processes that failed, and its error."""
    rank, (first, _) = min(error.failures.items())
    return rank, first


def _mistake(error: BaseException, doing: str, whole: str, where: str = "") -> BaseException:
    """An error of files told as `told` tells it; another one as it is."""
    if not isinstance(error, file_errors()):
        return error
    return UserError(f"cannot {doing}: {where}{reason_of(error, without=doing)}; {whole}")


class _PartSavePlanner(DefaultSavePlanner):
    """Plans to write parts, of which DCP need not know how they came about."""

    def __init__(self, parts: Mapping[str, TensorPart]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = parts

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_item(name, part) for name, part in self._parts.items() if part.tensor.numel()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return cast(Tensor, self.state_dict[index.fqn])


def _item(name: str, part: TensorPart) -> WriteItem:
    properties = TensorProperties.create_from_tensor(part.tensor)
    data = TensorWriteData(chunk=_chunk(part), properties=properties, size=torch.Size(part.shape))
    return WriteItem(MetadataIndex(name, part.offset), WriteItemType.SHARD, tensor_data=data)


def _chunk(part: TensorPart) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(part.offset), sizes=part.tensor.shape)


class _PartFilesWriter(StorageWriter):
    """Copies, writes and hashes one file of each kind, in the layout of DCP's `HuggingFaceStorageWriter`.

    That one first lays out a whole file in memory, under the interpreter lock: training stood still for 0.75 s a GB, and
    each process needed as much memory again. The first process ends with what it is given to do.
    """

    def __init__(
        self,
        path: Path,
        copy: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        begin: Callable[[], None],
        check: Callable[[Mapping[str, Tensor]], None],
        finish: Callable[[Mapping[str, Entry]], None],
    ) -> None:
        self._path, self._copy = path, copy
        self._begin, self._check, self._finish = begin, check, finish

    def reset(self, checkpoint_id: object = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *words: object, **options: object) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        return True

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._begin()
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        tensors = self._copy(
            {item.index.fqn: cast(Tensor, planner.resolve_data(item)) for item in plan.items}
        )
        self._check(tensors)
        begins = {
            item.index.fqn: list(item.tensor_data.chunk.offsets) for item in plan.items if item.tensor_data
        }
        sums: dict[str, Entry] = {}
        for kind in KINDS:
            own = [name for name in tensors if name.startswith(f"{kind}/")]
            if own:
                file = self._path / part_file(plan.storage_data, kind)
                save_tensors(
                    {name: tensors[name] for name in own}, file, _about({name: begins[name] for name in own})
                )
                flush(file)
                sums[file.name] = entry(file)
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result([WriteResult(MetadataIndex(""), 0, sums)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._finish({name: sums for of in results for one in of for name, sums in one.storage_data.items()})


def _about(begins: Mapping[str, list[int]]) -> dict[str, str]:
    """What the header of a file says of its tensors, in the words of DCP's reader: where in the whole ones they begin."""
    where = {name: {"saved_offsets": begin} for name, begin in begins.items()}
    return {"DCP_SHARDING_INFO": json.dumps(where), "DCP_VERSION": "1.0", "format": "pt"}


class _PartLoadPlanner(DefaultLoadPlanner):
    """Plans to read parts."""

    def __init__(self, parts: Mapping[str, TensorPart]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._parts = parts

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved = cast(dict[str, TensorStorageMetadata], self.metadata.state_dict_metadata)
        reads = [
            read
            for name, part in self._parts.items()
            for read in create_read_items_for_chunk_list(name, saved[name], [_chunk(part)])
        ]
        missing = sum(part.tensor.numel() for part in self._parts.values()) - sum(
            math.prod(read.lengths) for read in reads
        )
        if missing:
            raise EOFError(f"{missing} numbers are in none of its files")
        return LoadPlan(reads)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return cast(Tensor, self.state_dict[index.fqn])


class _SomeFiles(FileSystem):
    """Some files of a folder, as if there were no others."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    def ls(self, path: object) -> list[str]:
        return [str(file) for file in self._files]


class _PartFilesReader(HuggingFaceStorageReader):
    """Reads some files of a folder, whose headers it reads once."""

    def __init__(self, path: Path, files: list[Path]) -> None:
        super().__init__(str(path))
        self.fs = _SomeFiles(files)
        self._metadata = super().read_metadata()

    def read_metadata(self) -> Metadata:
        return self._metadata
