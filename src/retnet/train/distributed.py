"""Distributed training on one mesh of processes: FSDP2, HSDP, tensor and context parallelism; how the processes agree.

Everything here is applied to the model from outside: each process keeps its part of every weight, of
its gradient and of the optimiser's memory; the weights of a block are put together while it computes. Processes that share
a sequence (context parallelism) hold a stretch of it each, those that share a computation (tensor parallelism) some heads.
Without a launcher nothing of it happens: there is one process, and no process group.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from retnet import host
from retnet.data import Batch
from retnet.errors import UserError, told
from retnet.model import LanguageModel, ModelConfig
from retnet.model.checkpoint import weights
from retnet.ops.context_parallel import ContextParallel
from retnet.ops.tensor_parallel import TensorParallel
from retnet.train import elastic
from retnet.train.config import ParallelConfig
from retnet.train.tensor_parallel import connect, cut, global_tensors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process
ONE = ParallelConfig(shard=1)  # process
PATIENCE = timedelta(days=30)  # while one prepares data or writes a checkpoint


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, numbered by their rank: which one this is, of how many, how they agree and share the work.

    What is said to gather, sum, lead or tell must be called by all ranks, in the same order. On the mesh of `arranged` ranks
    are counted by replica, then by shard, then by stretch of a sequence, then by part of heads and widths.

    Attributes:
        rank: of this process.
        world: how many there are.
        group: for words between them, on the CPU; None for a single process.
        axes: of the mesh.
        mesh: of all ranks, by those of the names "replicate", "tp" and "shard" (its ranks with all stretches) over which
            there are several; None for a single process.
        tp: what ranks that have a part of the heads each exchange; None where each computes with all of them.
        context: what tells mixers which stretch of a sequence they see; None where each process reads whole ones.
    """

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None
    axes: ParallelConfig = ONE
    mesh: DeviceMesh | None = None
    tp: TensorParallel | None = None
    context: ContextParallel | None = None

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    @property
    def reader(self) -> int:
        """Which of the processes, or groups of processes, that read batches at the same time this is, or is in."""
        return self.rank // (self.axes.cp * self.axes.tp)

    @property
    def stretch(self) -> int:
        """Which stretch of the sequences this process reads."""
        return self.rank // self.axes.tp % self.axes.cp

    @property
    def counts(self) -> bool:
        """Whether sums over ranks have to count what this process reads: of those that read the same, the first does."""
        return self.rank % self.axes.tp == 0

    def arranged(self, axes: ParallelConfig, device: torch.device) -> Ranks:
        """The same on a mesh with these axes."""
        if self.alone:
            return self
        from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

        sizes = {"replicate": axes.replicate, "tp": axes.tp, "shard": axes.parts}
        names = tuple(name for name, size in sizes.items() if size > 1)
        if axes.replicate > 1 and axes.parts == 1:  # FSDP repeats nothing that it does not cut
            names = (*names, "shard")
        ranks = torch.arange(self.world).view(axes.replicate, axes.parts, axes.tp).transpose(1, 2)
        mesh = DeviceMesh(device.type, ranks.reshape([sizes[name] for name in names]), mesh_dim_names=names)
        tp = TensorParallel(mesh["tp"].get_group()) if axes.tp > 1 else None
        context = None
        if axes.cp > 1:
            rows = (axes.readers, axes.cp, axes.tp)
            order = init_device_mesh(device.type, rows, mesh_dim_names=("read", "cp", "tp"))
            context = ContextParallel(order["cp"].get_group())
        return replace(self, axes=axes, mesh=mesh, tp=tp, context=context)

    @property
    def sharding(self) -> DeviceMesh | None:
        """The mesh over whose last dimension FSDP cuts weights, and over whose first of two it repeats them, if it does."""
        if self.mesh is None:
            return None
        names = tuple(name for name in self.mesh.mesh_dim_names or () if name != "tp")
        return self.mesh[names] if names else None

    def leave_uncompiled(self) -> None:
        """Keeps what ranks exchange inside blocks out of graphs that torch.compile makes of these."""
        disable: Callable[..., Any] = torch.compiler.disable
        if self.context is not None:
            begin = self.context.begin
            self.context.begin = disable(lambda *x: disable(begin(*x)))  # type: ignore[method-assign]  # of this object alone
        if self.tp is not None:
            self.tp.replicated = disable(self.tp.replicated)  # type: ignore[method-assign]  # of this object alone
            self.tp.summed = disable(self.tp.summed)  # type: ignore[method-assign]  # of this object alone

    def new_group(self) -> dist.ProcessGroup:
        """Another group for words on the CPU, for a thread that speaks while others do; all ranks must ask for it."""
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=PATIENCE)
        return group

    def part(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, targets and bounds of documents that this rank reads of a batch: all, or its stretch of them end to end.

        The mixers of the model read that until the next call.
        """
        if self.context is None:
            return batch[:3]
        stretch = self.context.read(batch.tokens.numel(), batch.cu_seqlens)
        tokens, targets = (x.flatten()[None, stretch.own] for x in batch[:2])
        assert stretch.cu_seqlens is not None
        return tokens, targets, stretch.cu_seqlens

    def sum(self, numbers: Sequence[float | Tensor], device: torch.device) -> list[float]:
        """Each of these numbers summed over ranks, on all of them: one small reduction, on the device of the model."""
        if self.alone:
            return [float(number) for number in numbers]
        total = torch.stack(
            [torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers]
        )
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: T) -> list[T]:
        """What each rank gives here, in the order of ranks, on all of them; anything that JSON can say."""
        if self.alone:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(text)]), group=self.group)
        longest = max(int(size) for size in sizes)
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(texts, nn.functional.pad(text, (0, longest - len(text))), group=self.group)
        return [
            json.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)
        ]

    def tell(self, value: T) -> T:
        """What the first rank gives here; what others give is not looked at."""
        return self.gather(value if self.first else None)[0]  # type: ignore[return-value]  # the first's, which is no None

    def together(self, act: Callable[[], T]) -> T:
        """Does what may end in a mistake of the user on all ranks, and waits for all.

        Raises:
            UserError: on every rank, if on any.
        """
        if self.alone:
            return act()
        result, mistake = None, None
        try:
            with told("go on"):  # an error of files too: the others would wait for ever
                result = act()
        except UserError as error:
            mistake = str(error)
        mistakes = [found for found in self.gather(mistake) if found is not None]
        if mistakes:
            raise UserError(mistakes[0])
        return result  # type: ignore[return-value]  # there was no mistake

    def lead(self, act: Callable[[], T]) -> T | None:
        """Lets the first rank do something, however long it takes; the others wait, and get None.

        Raises:
            UserError: on every rank, if on the first.
        """
        return self.together(lambda: act() if self.first else None)

    def device(self, name: str) -> torch.device:
        """The device of this process: of GPUs, each process on a machine has one of its own.

        Raises:
            UserError: no such device, fewer GPUs than processes, or one GPU for all of them.
        """
        if self.alone or not torch.cuda.is_available() or not name.startswith(("auto", "cuda")):
            return host.choose_device(name)
        here, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if name not in ("auto", "cuda"):
            raise UserError(f"train.device {name!r} is one GPU for {self.world} processes; set it to 'cuda'")
        if here >= gpus:
            raise UserError(
                f"process {here} of this machine has no GPU, since there are {gpus}; "
                f"start torchrun with --nproc-per-node {gpus}, or set train.device to 'cpu'"
            )
        torch.cuda.set_device(here)
        return host.choose_device(f"cuda:{here}")


ALONE = Ranks()


@contextmanager
def processes() -> Iterator[Ranks]:
    """Joins the processes that torchrun started for one run; without it, there is this one alone.

    Collectives on GPUs go over NCCL, those on CPUs over gloo. A process group that the caller has is used and left as
    it is.
    """
    if not set(LAUNCHED) <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    own = not dist.is_initialized()
    if own:
        store = elastic.own_store()
        place = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if store else (-1, -1)
        dist.init_process_group(store=store, rank=place[0], world_size=place[1])
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    except UserError:  # raised by all together; after anything else, others may never answer again
        _leave(own, group)
        raise
    _leave(own, group)


def _leave(own: bool, group: dist.ProcessGroup) -> None:
    dist.destroy_process_group(None if own else group)


@contextmanager
def one_voice() -> Iterator[bool]:
    """Whether this process speaks for all. A mistake that all processes of a machine make is said by its first alone."""
    try:
        yield os.environ.get("RANK", "0") == "0"
    except UserError:
        elastic.note(elastic.MISTAKE)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        time.sleep(30)  # torchrun ends all as soon as one has ended, and the first must have its say
        sys.exit(2)


def shard(
    config: ModelConfig, device: torch.device, ranks: Ranks, dtype: torch.dtype | None = None
) -> LanguageModel:
    """A model of which every rank holds its part: block by block, and the rest together. Its weights are any numbers.

    Gradients are summed over ranks, in the type of the weights: `dtype`, or torch's default.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    # the logits are one, and nobody changes them in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    with torch.device("meta"):
        model = LanguageModel(config)
    if dtype is not None:
        model.to(dtype)
    if ranks.tp is not None:
        cut(model, ranks.tp.rank, ranks.tp.size)
        connect(model, ranks.tp)
    mesh = ranks.sharding
    for part in (*model.blocks, model) if mesh is not None else ():
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
        for way in ("features", "mix"):  # that it is called in, beside `forward`
            if hasattr(part, way):
                register_fsdp_forward_method(part, way)
        assert isinstance(part, FSDPModule)
        part.set_gradient_divide_factor(1.0)  # the loss is divided already, by the targets of all ranks
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    model.to_empty(device=device)
    if mesh is None and config.tie_embeddings:
        model.head.weight = model.embedding.weight  # of which `to_empty` makes two, and FSDP one again
    if ranks.context is not None:
        for block in model.blocks:
            setattr(block.mixer, "context", ranks.context)  # noqa: B010  mypy takes parts of a module for tensors
    return model


def take_parts(model: LanguageModel, whole: Iterable[tuple[str, Tensor]], ranks: Ranks) -> None:
    """Copies this rank's part of whole weights, which come one at a time and are the same on all ranks, into a model."""
    from retnet.model.sharded import local_part

    parts = global_tensors(weights(model), model, ranks.mesh)
    for name, x in whole:
        own = local_part(parts[name])
        own.tensor.copy_(own.of(x))


def broadcast_weights(
    tensors: Mapping[str, Tensor] | None, model: LanguageModel, ranks: Ranks
) -> Iterator[tuple[str, Tensor]]:
    """Name → whole weight of a model, one at a time, on all ranks: those that the first rank has; others give None."""
    for name, part in global_tensors(weights(model), model, ranks.mesh).items():
        if tensors is None:
            whole = torch.empty(part.shape, dtype=part.dtype, device=part.device)
        else:
            whole = tensors[name].to(part.device, part.dtype).contiguous()
        dist.broadcast(whole, 0)
        yield name, whole


def own_part(x: Tensor, ranks: Ranks) -> Tensor:
    """What this rank holds of a tensor."""
    if ranks.alone:
        return x
    from torch.distributed.tensor import DTensor

    return x.to_local() if isinstance(x, DTensor) else x


def holders(x: Tensor, ranks: Ranks) -> int:
    """How many ranks hold the same part of a tensor as this one."""
    if ranks.alone:
        return 1
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(x, DTensor):
        return ranks.world
    cuts = [
        size
        for size, placement in zip(x.device_mesh.shape, x.placements, strict=True)
        if placement != Replicate()
    ]
    return ranks.world // math.prod(cuts)


def complete(part: Tensor, ranks: Ranks) -> Tensor:
    """A tensor as a whole, put together if it lies in parts; all ranks must ask for it."""
    if ranks.alone:
        return part
    from torch.distributed.tensor import DTensor

    return part.full_tensor() if isinstance(part, DTensor) else part
