"""`retnet bench ops`: the op beside its peers, the machine's matrix products and the speed of its memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retnet.bench.implementations import (
    BOTH,
    FORWARD,
    LARGE,
    LOOP,
    NARROW,
    OURS,
    PEER_CHUNK,
    REFERENCE,
    WIDE,
    HeadShape,
    OpsBench,
    TimedImplementation,
    implementations_on,
)
from retnet.bench.op_steps import SHORT, StepRow, measure_steps, step_targets
from retnet.host import keep_freed_memory, versions
from retnet.measure.clock import (
    Budget,
    Contender,
    Sample,
    Spread,
    Target,
    interleave,
    rounds_made,
    spread,
    stopwatch,
    times_faster,
)
from retnet.measure.limits import matrix_products, recent
from retnet.measure.memory import free_memory
from retnet.ops import CHUNK
from retnet.ops.triton import tile_table
from retnet.progress import Say
from retnet.settings import UserError

OWN = (OURS, LOOP, REFERENCE)
CHECKED = 512  # tokens that every contender is compared with fp64 on, before anything is timed
NOTES = (
    "forward: without a graph. forward + backward: gradients of q, k and v. fp32 on a CPU, bf16 on a GPU; γ of the paper",
    f"{OURS}: the fastest backend here (numba on a CPU, where it is installed; triton on a GPU). {LOOP}: what runs on a "
    f"CPU without numba. Indexed chunks: chunkwise as usually written, torchscale's form, C {PEER_CHUNK}; split chunks: the "
    "same without what makes its backward quadratic",
    "SDPA: torch's causal scaled_dot_product_attention (FlashAttention), heads of 128. Equal width means q, k, v and output "
    "are all H·K wide, as in a Transformer of the same d_model, or all H·V wide, as many numbers out as the op has",
    "flops: of the algorithm, a multiply-add as two. Forward takes 2·(p·(K + V) + 2·K·V) a token and head, p being the keys "
    "of its chunk that a token meets; backward 2·(p·(3K + 2V) + 5·K·V) on a CPU, 2·(p·(3K + 3V) + 5·K·V) in Triton's "
    "kernels, twice the forward under autograd. Parallel form and attention (backward: as on a CPU) lack the terms of K·V",
    f"p: our kernels (C {CHUNK} on a CPU, {tile_table.CHUNK} in Triton) and SDPA skip blocks above the diagonal and get "
    "credit for the triangle alone, p = (C + 1)/2; what they compute above it gets none. The others compute full squares, "
    "p = C. Masks, decay factors, copies and softmax count nothing",
    "of_torch_mm: flops per second ÷ rate of matrix products by torch.mm; of_limit: ÷ that of torch's fastest library. "
    "Limits stand on both sides of every contender, measured anew where the last is older than a second",
    "step: one token for each row; bytes are those of the state, in and out. Large states take turns over more memory "
    "than caches hold; the small ones, of 12 layers, stay in the caches and show what a call costs. Steps take turns in "
    f"{SHORT} short rounds for each round of the op. On a GPU they are replayed as a CUDA graph",
)


@dataclass
class OpRow:
    """One line of the result."""

    implementation: TimedImplementation
    shape: HeadShape  # of the op that it stands beside
    length: int  # tokens of a sequence
    batch: int  # sequences of a call
    mode: str  # FORWARD or BOTH
    samples: list[Sample] = field(default_factory=list)  # seconds of a token

    @property
    def name(self) -> str:
        """Of the contender."""
        return self.implementation.name

    def numbers(self) -> int:
        """In q, k, v and the gradient of the output."""
        H, K, V = self.implementation.inputs
        return 2 * self.batch * self.length * H * (K + V)

    def rate(self, limit: Callable[[Sample], float]) -> Spread | None:
        """Flops per second ÷ a limit; None where the algorithm is not known."""
        if (flops := self.implementation.flops(self.length, self.mode)) is None:
            return None
        return spread(flops / self.length / s.seconds / limit(s) for s in self.samples)

    @property
    def of_torch_mm(self) -> Spread | None:
        """Flops per second as a fraction of the rate of torch.mm."""
        return self.rate(lambda s: s.limits["torch_mm"])

    @property
    def of_limit(self) -> Spread | None:
        """Flops per second as a fraction of the rate of the fastest library."""
        return self.rate(lambda s: max(s.limits.values()))

    def record(self, ours: OpRow) -> dict[str, Any]:
        """Plain data for a JSON file; `ours` is our row of the same size and mode."""
        rates = {"of_torch_mm": self.of_torch_mm, "of_limit": self.of_limit}
        return {
            "name": self.name,
            **self.shape._asdict(),
            "length": self.length,
            "batch": self.batch,
            "mode": self.mode,
            "flops_per_sequence": self.implementation.flops(self.length, self.mode),
            "seconds_per_token": vars(spread(s.seconds for s in self.samples)),
            "seconds": vars(spread(s.seconds * self.batch * self.length for s in self.samples)),
            **{name: rate and vars(rate) for name, rate in rates.items()},
            "times_ours": vars(times_faster(ours.samples, self.samples)),
            "rounds": [s._asdict() for s in self.samples],
        }


def measure_ops(bench: OpsBench, say: Say) -> dict[str, Any]:
    """Runs all contenders, interleaved; plain data for the record (see `retnet.bench.report`).

    Raises:
        UserError: the device cannot run the op, or has not enough memory.
    """
    budget = Budget(bench.minutes)
    keep_freed_memory()
    torch.manual_seed(0)
    device = torch.device(bench.device)
    found = {
        shape: [one for one in implementations_on(device, shape) if not one.name.startswith(bench.without)]
        for shape in bench.shapes
    }
    _check_memory(_rows(bench, found), bench, device)
    errors, left_out = _errors(found, bench.dtype, device, say)
    rows = _rows(bench, found)
    limits = matrix_products(bench.product_size, device, bench.dtype)
    contenders = _contenders(rows, bench.dtype, device)
    until = budget.deadline(0.8 if bench.steps else 1.0)
    samples = interleave(contenders, recent(limits), bench.rounds, say, until)
    for row, contender in zip(rows, contenders, strict=True):
        row.samples = samples[contender.name]
    del contenders  # and the memory of their inputs
    steps: list[StepRow] = []
    if bench.steps:
        steps = measure_steps(device, bench.rounds, bench.buffer_megabytes, say, budget.deadline())
    ours = {(row.shape, row.length, row.mode): row for row in rows if row.name == OURS}
    our_steps = {row.step: row for row in steps if row.name == OURS}
    updates = [s.limits["update"] for r in steps for s in r.samples]
    products = f"{'fp32' if device.type == 'cpu' else 'bf16'}_{{}}_flops_per_s"
    return {
        "notes": NOTES,
        "rounds": rounds_made({"op": samples, "steps": {row.name: row.samples for row in steps}}),
        "peers": versions("numba", "triton", "flash-linear-attention"),
        "limits": {
            **{
                products.format(n): vars(spread(s.limits[n] for r in rows for s in r.samples)) for n in limits
            },
            **({"update_bytes_per_s": vars(spread(updates))} if updates else {}),
        },
        "errors": errors,
        "left_out": left_out,
        "not_measured": _not_measured(bench, found),
        "rows": [row.record(ours[row.shape, row.length, row.mode]) for row in rows],
        "steps": [row.record(our_steps[row.step]) for row in steps],
        "targets": [
            target.record()
            for target in [
                *error_targets(errors, device),
                *op_targets(rows, device),
                *step_targets(steps, device),
            ]
        ],
    }


def error_targets(errors: dict[str, float], device: torch.device) -> list[Target]:
    """What is timed is right."""
    allowed = 1e-5 if device.type == "cpu" else 1e-2
    seen = Spread(*3 * (errors[OURS] / allowed,))
    return [Target(f"op: error of output and gradients against fp64 ÷ {allowed:g}", seen, most=1.0)]


def op_targets(rows: list[OpRow], device: torch.device) -> list[Target]:
    """What the op should reach, as far as the rows were measured: near the limit, flat in T, ahead of every peer."""
    at = {(row.shape, row.length): row for row in rows if (row.name, row.mode) == (OURS, BOTH)}
    found = []
    if (row := at.get((LARGE, 2048))) and device.type == "cpu" and (seen := row.of_torch_mm):
        found.append(Target(f"op: flops ÷ rate of torch.mm, {BOTH}, T 2048, {LARGE}", seen, least=0.70))
    for shape in dict.fromkeys(row.shape for row in rows):
        if (long := at.get((shape, 65536))) and (short := at.get((shape, 2048))):
            what = f"op: time of a token, {BOTH}, at T 65536 ÷ at T 2048, {shape}"
            found.append(Target(what, times_faster(short.samples, long.samples), most=1.1))
    for name in dict.fromkeys(row.name for row in rows if row.name not in OWN):
        for least, judged in _judged([row for row in rows if (row.name, row.mode) == (name, BOTH)]):
            ratios = [(times_faster(at[row.shape, row.length].samples, row.samples), row) for row in judged]
            if ratios:
                ratio, row = min(ratios, key=lambda pair: pair[0].median)
                what = f"op: times faster than {name}, {BOTH}, at worst (T {row.length}, {row.shape})"
                found.append(Target(what, ratio, least=least))
    return found


def _judged(rows: list[OpRow]) -> list[tuple[float, list[OpRow]]]:
    """Rows of one peer, grouped by how many times faster ours should be."""
    if all(row.name in (NARROW, WIDE) for row in rows):
        return [(1.0, [row for row in rows if row.length >= 4096])]  # quadratic: short ones are its own
    # flash-linear-attention: at the paper's width, and below
    if all(row.implementation.algorithm is None for row in rows):
        wide = [row for row in rows if row.shape.key_dim >= 256]
        return [(3.0, wide), (1.0, [row for row in rows if row.shape.key_dim < 256])]
    return [(1.0, rows)]


def _rows(bench: OpsBench, found: dict[HeadShape, list[TimedImplementation]]) -> list[OpRow]:
    return [
        OpRow(one, shape, length, bench.batch(length), mode)
        for shape in bench.shapes
        for length in bench.lengths
        for one in found[shape]
        for mode in (FORWARD, BOTH)
        if not bench.why_not(one, length, mode)
    ]


def _not_measured(bench: OpsBench, found: dict[HeadShape, list[TimedImplementation]]) -> list[dict[str, Any]]:
    """What `_rows` leaves out: of each contender the lengths for a reason."""
    lengths: dict[tuple[HeadShape, str, str, str], list[int]] = {}
    for shape, length, mode in itertools.product(bench.shapes, bench.lengths, (FORWARD, BOTH)):
        for one in found[shape]:
            if why := bench.why_not(one, length, mode):
                lengths.setdefault((shape, one.name, mode, why), []).append(length)
    return [
        {**shape._asdict(), "name": name, "mode": mode, "lengths": which, "why": why}
        for (shape, name, mode, why), which in lengths.items()
    ]


def _check_memory(rows: list[OpRow], bench: OpsBench, device: torch.device) -> None:
    """Inputs of the largest call, and twice as much for its results and what it works with."""
    largest = max(rows, key=OpRow.numbers)
    needed, free = 3 * bench.dtype.itemsize * largest.numbers(), free_memory(device)
    if needed > free:
        raise UserError(
            f"T {largest.length} with {largest.shape} takes about {needed / 1e9:.1f} GB of memory, and "
            f"{free / 1e9:.1f} GB are free; give shorter --lengths or smaller --shapes"
        )


def _errors(
    all_found: dict[HeadShape, list[TimedImplementation]], dtype: torch.dtype, device: torch.device, say: Say
) -> tuple[dict[str, float], list[str]]:
    """Name → relative error of output and gradients against the reference in fp64, the worst of all shapes.

    Attention is left out, being another function. Everything is compiled here, before it is timed. A peer that cannot run is
    taken out of what is found, and named with its reason.
    """
    worst: dict[str, float] = {}
    left_out: list[str] = []
    for shape, found in all_found.items():
        H, K, V = shape
        inputs = [torch.randn(1, CHECKED, H, W, device=device).to(dtype) for W in (K, K, V, V)]
        *_, exact = (one for one in found if one.name == REFERENCE)
        want = _results(exact, [x.double() for x in inputs])
        for one in [*found]:
            if one.name in (NARROW, WIDE):
                continue
            say(f"checking {one.name}, {shape}")
            try:
                got = _results(one, inputs)
            except Exception as error:  # of a peer, anything
                if one.name in OWN and not isinstance(error, ValueError):
                    raise
                if one.name in OWN:
                    raise UserError(f"{one.name} cannot run {shape} on {device}: {error}") from None
                left_out.append(f"{one.name} cannot run {shape} on {device}: {type(error).__name__}: {error}")
                found.remove(one)
                continue
            errors = torch.stack([(a - b).norm() / b.norm() for a, b in zip(got, want, strict=True)])
            worst[one.name] = max(worst.get(one.name, 0.0), float(errors.nan_to_num(nan=float("inf")).max()))
    return worst, left_out


def _results(one: TimedImplementation, inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients of q, k and v."""
    *leaves, d_out = inputs
    q, k, v = (x.detach().requires_grad_() for x in leaves)
    out = one.forward(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), d_out)]


def _contenders(rows: list[OpRow], dtype: torch.dtype, device: torch.device) -> list[Contender]:
    """All inputs lie in the same memory: there is only as much as the largest call takes."""
    noise = torch.randn(1 << 20, dtype=dtype, device=device)
    size = max(row.numbers() for row in rows)
    memory = noise.repeat(-(-size // len(noise)))
    return [_contender(row, memory, device) for row in rows]


def _contender(row: OpRow, memory: Tensor, device: torch.device) -> Contender:
    H, K, V = row.implementation.inputs
    tokens = row.batch * row.length
    parts = memory[: row.numbers()].split([tokens * H * width for width in (K, K, V, V)])
    q, k, v, d_out = (x.view(row.batch, row.length, H, -1) for x in parts)
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))

    def forward() -> None:
        with torch.no_grad():
            row.implementation.forward(*leaves)

    def both() -> None:
        torch.autograd.grad(row.implementation.forward(*leaves), leaves, d_out)

    timed = stopwatch(forward if row.mode == FORWARD else both, device, units=tokens)
    return Contender(f"{row.name}, {row.shape}, T {row.length}, {row.mode}", timed)
