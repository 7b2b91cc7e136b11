"""Every Triton kernel alone, beside the ceilings of the device: which of them is how far from what it could do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retnet.bench.implementations import HeadShape
from retnet.measure.clock import Contender, Sample, Spread, interleave, spread, stopwatch
from retnet.measure.graphs import captured
from retnet.measure.limits import matrix_products, memory_bandwidth, recent
from retnet.measure.records import Record, grouped, measured, said, seen, table_of
from retnet.measure.summary import Bars
from retnet.ops import frequencies, log_decays, positions
from retnet.ops.triton import tile_table
from retnet.progress import Say
from retnet.tables import MISSING, Table

NOTES = (
    "flops: of the algorithm, a multiply-add as two, scores above the diagonal not counted; bytes: every input read once "
    "and every output written once, though tiles read some of them several times, out of the caches where they can",
    "floor: the longer of flops ÷ rate of matrix products and bytes ÷ bandwidth of an update, both measured beside",
)
STEP_BATCH = 64


class Work(NamedTuple):
    """One launch of a kernel, and what it has to do."""

    name: str
    run: Callable[[], object]
    flops: float
    moved: float  # bytes


@dataclass
class KernelRow:
    """One line of the result."""

    work: Work
    shape: HeadShape
    samples: list[Sample] = field(default_factory=list)

    def floor(self, sample: Sample) -> float:
        """Seconds that no kernel can go below."""
        limits = sample.limits
        return max(self.work.flops / limits["torch_mm"], self.work.moved / limits["update"])

    def record(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        by_flops = all(
            self.work.flops / s.limits["torch_mm"] > self.work.moved / s.limits["update"]
            for s in self.samples
        )
        return {
            "kernel": self.work.name,
            **self.shape._asdict(),
            "flops": self.work.flops,
            "moved_bytes": self.work.moved,
            "bound": "products" if by_flops else "memory",
            "seconds": vars(spread(s.seconds for s in self.samples)),
            "flops_per_s": vars(self._rate(self.work.flops)),
            "bytes_per_s": vars(self._rate(self.work.moved)),
            "of_products": vars(
                spread(self.work.flops / s.seconds / s.limits["torch_mm"] for s in self.samples)
            ),
            "of_floor": vars(spread(self.floor(s) / s.seconds for s in self.samples)),
        }

    def _rate(self, amount: float) -> Spread:
        return spread(amount / s.seconds for s in self.samples)


def measure_kernels(
    device: torch.device,
    shapes: tuple[HeadShape, ...],
    say: Say,
    *,
    tokens: int = 32768,
    rounds: int = 5,
    product_size: int = 8192,
    megabytes: int = 1024,
    until: float = float("inf"),
) -> dict[str, Any]:
    """All kernels at some head shapes, interleaved, bf16; plain data.

    Args:
        device: a GPU, or a CPU under Triton's interpreter.
        shapes: heads and their widths.
        say: where progress goes.
        tokens: of the one sequence.
        rounds: of measurements.
        product_size: of the matrices that give the limit.
        megabytes: of the buffer that bandwidth is measured with.
        until: as in `interleave`.
    """
    found = []
    limits = matrix_products(product_size, device, torch.bfloat16)
    limits = {"torch_mm": limits["torch_mm"], "update": memory_bandwidth(megabytes, device=device)["update"]}
    for shape in shapes:  # one after the other: the inputs of one are all that has to fit
        rows = [KernelRow(work, shape) for work in kernels_of(shape, tokens, device)]
        contenders = [
            Contender(f"{row.work.name}, {shape}", stopwatch(row.work.run, device, budget=0.05))
            for row in rows
        ]
        samples = interleave(contenders, recent(limits), rounds, say, until)
        for row, contender in zip(rows, contenders, strict=True):
            row.samples = samples[contender.name]
        found += [row.record() for row in rows]
        del rows, contenders
    return {"notes": NOTES, "tokens": tokens, "rows": found}


def kernels_of(shape: HeadShape, tokens: int, device: torch.device) -> list[Work]:
    """Every launch that a layer makes forward, backward and in decoding, on random numbers in bf16."""
    H, K, V = shape
    bf16, C = torch.bfloat16, tile_table.CHUNK
    q, k, v, d_out, gate = (
        torch.randn(1, tokens, H, width, device=device, dtype=bf16) for width in (K, K, V, V, V)
    )
    q_size, v_size, states = q.nbytes, v.nbytes, 2 * H * K * V * -(-tokens // C)
    between = 2.0 * H * tokens * K * V  # flops of reading or updating the state
    inside = 2.0 * H * tokens * (min(C, tokens) + 1) / 2 * (K + V)  # of scores and of what they weigh
    # what STATE reads; OUT reads three of q, k, v, do and writes one like the fourth: twice as much
    ends = q_size + v_size
    work = []
    for name, run in chunkwise_passes(q, k, v, d_out).items():
        inner = name.startswith("OUT")
        work.append(Work(name, run, between + inside * inner, ends * (1 + inner) + states))
    return [*work, *_rows(q, k, v, gate, d_out), _step(shape, device)]


def chunkwise_passes(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> dict[str, partial[Any]]:
    """Name → a launch that the chunkwise form makes, forward or backward, on these inputs [B,T,H,K or V]."""
    from retnet.ops.triton import launch

    H, K, V = *q.shape[2:], v.shape[3]
    log_decay, scale = log_decays("paper", H).to(q.device), K**-0.5
    chunks = launch.cut(q, None, tile_table.CHUNK)
    h = torch.randn(chunks.total, H, K, V, device=q.device, dtype=q.dtype)
    shared = (h, log_decay, scale, chunks)
    return {
        "STATE h": partial(launch.state_pass, k, v, None, log_decay, chunks, reverse=False),
        "STATE dh": partial(launch.state_pass, q, d_out, None, log_decay, chunks, reverse=True, scale=scale),
        "OUT o": partial(launch.out_pass, q, k, v, *shared, reverse=False, transposed=False),
        "OUT dq": partial(launch.out_pass, d_out, v, k, *shared, reverse=False, transposed=True),
        "OUT dk": partial(launch.out_pass, v, d_out, q, *shared, reverse=True, transposed=True),
        "OUT dv": partial(launch.out_pass, k, q, d_out, *shared, reverse=True, transposed=False),
    }


def _rows(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, d_out: Tensor) -> list[Work]:
    from retnet.ops.triton import rotary_norm_launch

    tokens, _H, K = q.shape[1:]
    position, theta = positions(tokens).to(q.device), frequencies(K).to(q.device)
    gate, d_out = gate.flatten(-2), d_out.flatten(-2)
    _, mean, rstd = rotary_norm_launch.norm_pass(v, gate, None, None, None, "group", 1e-6)
    statistics = mean.nbytes + rstd.nbytes
    turn = partial(rotary_norm_launch.rotary_pass, q, k, position, theta, True, False)
    forward = partial(rotary_norm_launch.norm_pass, v, gate, None, None, None, "group", 1e-6)
    backward = partial(rotary_norm_launch.norm_backward_pass, d_out, v, gate, None, None, mean, rstd, "group")
    return [
        Work("ROTARY", turn, 0.0, 4 * q.nbytes),
        Work("NORM", forward, 0.0, 3 * v.nbytes + statistics),
        Work("NORM dx", backward, 0.0, 5 * v.nbytes + statistics),
    ]


def _step(shape: HeadShape, device: torch.device) -> Work:
    from retnet.ops.triton import launch

    H, K, V = shape
    batch = STEP_BATCH if device.type == "cuda" else 1
    q, k, v = (torch.randn(batch, H, width, device=device, dtype=torch.bfloat16) for width in (K, K, V))
    state, log_decay = torch.zeros(batch, H, K, V, device=device), log_decays("paper", H).to(device)
    run = captured(partial(launch.step_pass, q, k, v, log_decay, state, None, K**-0.5), device)
    return Work(f"STEP, {batch} rows", run, 0.0, 2 * state.nbytes)


def parts(record: Record) -> tuple[list[Table], list[Bars]]:
    """A table of all kernels, and for each head shape the share of the floor as bars."""
    flops = measured("flops_per_s", 1e-12, 1)
    cells = {
        "kernel": said("kernel"),
        "H/K/V": lambda row: "/".join(str(row[key]) for key in HeadShape._fields),
        "ms": measured("seconds", 1e3, 3),
        "TFLOP/s": lambda row: flops(row) if row["flops"] else MISSING,
        "GB/s": measured("bytes_per_s", 1e-9, 0),
        "bound by": said("bound"),
        "floor ÷ time": measured("of_floor"),
    }
    title = f"Each kernel alone, {record['tokens']:,} tokens, bf16: median (least..greatest) over rounds"
    bars = []
    for shape, rows in grouped(record["rows"], *HeadShape._fields).items():
        names, shares = zip(*((row["kernel"], seen(row, "of_floor")) for row in rows), strict=True)
        bars.append(Bars("H {}, K {}, V {}".format(*shape), "floor ÷ time", names, shares, limit=1.0))
    return [table_of(title, record["rows"], cells, record["notes"])], bars
