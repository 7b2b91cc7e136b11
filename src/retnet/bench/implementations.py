"""Implementations of retention and attention that `retnet bench ops` compares, their flops, and its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from retnet.host import fast_dtype
from retnet.measure import peers
from retnet.ops import CHUNK, log_decays, retention
from retnet.ops.cpu import jit
from retnet.ops.triton import tile_table
from retnet.settings import At, Checked, Count, UserError

OURS, LOOP, REFERENCE = "retnet", "retnet, torch operators", "retnet, reference"
INDEXED, SPLIT, PARALLEL = "autograd, indexed chunks", "autograd, split chunks", "autograd, parallel form"
NARROW, WIDE = "SDPA, H·K wide", "SDPA, H·V wide"
FORWARD, BOTH = "forward", "forward + backward"
FLA = "flash-linear-attention"  # what the names of its kernels begin with
PEER_CHUNK = 128  # of the chunkwise forms that autograd differentiates


class HeadShape(NamedTuple):
    """Heads and their widths."""

    heads: int
    key_dim: int
    value_dim: int

    def __str__(self) -> str:
        return f"H{self.heads} K{self.key_dim} V{self.value_dim}"


LARGE = HeadShape(8, 256, 512)  # the paper's head size


class Algorithm(NamedTuple):
    """What is multiplied, and so credited: K's and V's of each pair of tokens that meet, K·V's of each token."""

    chunk: int | None  # C; None: all tokens are one chunk
    triangle: bool  # scores above the diagonal are not computed
    forward: tuple[int, int, int]
    backward: tuple[int, int, int]

    def flops(self, length: int, shape: HeadShape, mode: str) -> float:
        """Of one sequence, a multiply-add as two."""
        H, K, V = shape
        full, rest = divmod(length, min(self.chunk or length, length))
        pairs = full * self._pairs((length - rest) // full) + self._pairs(rest)
        parts = [self.forward] if mode == FORWARD else [self.forward, self.backward]
        return 2.0 * H * sum(pairs * (k * K + v * V) + length * s * K * V for k, v, s in parts)

    def _pairs(self, tokens: int) -> int:
        return tokens * (tokens + 1) // 2 if self.triangle else tokens**2


COMPILED = Algorithm(CHUNK, True, (1, 1, 2), (3, 2, 5))
TRITON = Algorithm(tile_table.CHUNK, True, (1, 1, 2), (3, 3, 5))
LOOPED = Algorithm(CHUNK, False, (1, 1, 2), (3, 2, 5))
CHUNKWISE = Algorithm(PEER_CHUNK, False, (1, 1, 2), (2, 2, 4))
SQUARE = Algorithm(None, False, (1, 1, 0), (2, 2, 0))
ATTENTION = Algorithm(None, True, (1, 1, 0), (3, 2, 0))  # its backward makes the scores anew


class TimedImplementation(NamedTuple):
    """One contender; it maps q [B,T,H,K], k [B,T,H,K], v [B,T,H,V] to [B,T,H,V]."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    inputs: HeadShape  # H, K and V, which for attention are its own
    algorithm: Algorithm | None  # None: not known
    longest: int | None = None  # sequence that it is tried with
    multiple: int = 1  # of which a length must be one

    def flops(self, length: int, mode: str) -> float | None:
        """Of one sequence, where the algorithm is known."""
        return self.algorithm.flops(length, self.inputs, mode) if self.algorithm else None


@dataclass(frozen=True)
class OpsBench(Checked):
    """What `measure_ops` measures.

    Attributes:
        shapes: heads and their widths.
        lengths: tokens of a sequence.
        tokens: of a call, at least: short sequences come in batches.
        peer_work: Gflop of a call above which everything but ours is left out.
        rounds: of the op; of its step, many more.
        minutes: that it may take: fewer rounds beyond, but at least 3; None is all rounds.
        device: that it runs on.
        product_size: of the matrices that give the limit.
        buffer_megabytes: that bandwidth is measured with, and that the states of large steps fill.
        steps: whether the decoding step is measured, too.
        without: contenders whose names begin so are left out.
    """

    shapes: tuple[HeadShape, ...] = (HeadShape(16, 64, 128), HeadShape(8, 128, 256), LARGE)
    lengths: tuple[Count, ...] = (512, 2048, 4096, 65536)
    tokens: Count = 2048
    peer_work: Annotated[float, At(least=0)] = 160.0
    rounds: Count = 3
    minutes: Annotated[float, At(above=0)] | None = None
    device: str = "cpu"
    product_size: Count = 1536
    buffer_megabytes: Count = 256
    steps: bool = True
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lengths:
            raise UserError("lengths is empty; give at least one")
        if not self.shapes or min(map(min, self.shapes)) < 1:
            shown = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
            raise UserError(f"shapes is {shown!r}; give at least one, all numbers at least 1")

    @property
    def dtype(self) -> torch.dtype:
        """Of q, k and v."""
        return fast_dtype(torch.device(self.device))

    def batch(self, length: int) -> int:
        """Sequences of a call."""
        return max(1, self.tokens // length)

    def why_not(self, one: TimedImplementation, length: int, mode: str) -> str:
        """Why a contender is not measured with sequences of this length; empty if it is."""
        if one.name == OURS:
            return ""
        if one.longest is not None and length > one.longest:
            return f"tried up to T {one.longest:,}"
        if length % one.multiple:
            return f"T must be a multiple of {one.multiple}"
        work = (one.flops(length, mode) or 0.0) * self.batch(length)
        if work > 1e9 * self.peer_work:
            return f"a call takes {work / 1e9:,.0f} Gflop, and peers are given {self.peer_work:,.0f}"
        return ""


def for_device(device: torch.device, **options: Any) -> OpsBench:  # noqa: ANN401  (any of its fields)
    """What is measured on a device, in some minutes, changed by `options`.

    Raises:
        UserError: a kind of device that no backend is made for, or an option out of its range.
    """
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {str(device)!r}; the op is measured on 'cpu' and 'cuda'")
    if device.type == "cpu":
        return OpsBench(**options)
    gpu: dict[str, Any] = {
        "device": str(device),
        "lengths": (512, 2048, 4096, 16384, 65536, 131072),
        "tokens": 16384,
        "peer_work": 200e3,
        "rounds": 7,
        "product_size": 8192,
        "buffer_megabytes": 1024,
    }
    return OpsBench(**{**gpu, **options})


def parse_shapes(text: str) -> tuple[HeadShape, ...]:
    """``"8x256x512,16x64x128"`` → heads, K and V of each.

    Raises:
        UserError: something that is not of this form.
    """
    try:
        return tuple(dict.fromkeys(HeadShape(*map(int, word.lower().split("x"))) for word in text.split(",")))
    except (ValueError, TypeError):
        raise UserError(
            f"--shapes is {text!r}; write heads x K x V, commas between, such as 8x256x512,16x64x128"
        ) from None


def implementations_on(device: torch.device, shape: HeadShape) -> list[TimedImplementation]:
    """Everything that can run on a device, ours first."""
    H, K, V = shape
    log_decay, scale = log_decays("paper", H).to(device), K**-0.5
    cpu = device.type == "cpu"

    def ours(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: retention(q, k, v, log_decay, backend=backend)[0]

    compiled = cpu and jit.compiler() is not None
    found = [TimedImplementation(OURS, ours("auto" if cpu else "triton"), shape, _algorithm(cpu, compiled))]
    if compiled:
        found.append(TimedImplementation(LOOP, ours("torch"), shape, LOOPED))
    found.append(
        TimedImplementation(REFERENCE, ours("reference"), shape, CHUNKWISE._replace(chunk=CHUNK), longest=512)
    )
    for name, form in ((INDEXED, peers.indexed_states), (SPLIT, peers.chunk_loop)):
        chunked = partial(form, log_decay=log_decay, scale=scale, chunk=PEER_CHUNK)
        found.append(TimedImplementation(name, chunked, shape, CHUNKWISE, longest=4096, multiple=PEER_CHUNK))
    parallel = partial(peers.parallel_form, log_decay=log_decay, scale=scale)
    found.append(TimedImplementation(PARALLEL, parallel, shape, SQUARE, longest=4096))
    for name, width in ((NARROW, H * K), (WIDE, H * V)):
        heads, one = peers.attention_heads(width)
        found.append(TimedImplementation(name, peers.causal_attention, HeadShape(heads, one, one), ATTENTION))
    if not cpu:
        found += [
            TimedImplementation(name, form, shape, None)
            for name, form in peers.flash_linear_attention().items()
        ]
    return found


def _algorithm(cpu: bool, compiled: bool) -> Algorithm:
    if not cpu:
        return TRITON
    return COMPILED if compiled else LOOPED
